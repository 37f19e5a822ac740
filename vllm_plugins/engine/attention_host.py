"""How a plug-in's attention backend enters: under a name that vLLM asks for while a model loads.

On CUDA the name is vLLM's own placeholder for backends from outside, chosen by
``--attention-backend``. The CPU platform takes one backend whatever was chosen, so there the
plug-in stands in for that one, for as long as the model loads. Layers keep the backend that they
were made with: a later engine of the same process finds the stock one again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from vllm_plugins.plugin import ATTENTION_BACKENDS, AttentionPlugin

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from vllm.config import VllmConfig

    from vllm_plugins.registry import Enabled


@contextmanager
def plugin_attention(enabled: Sequence[Enabled]) -> Iterator[None]:
    """Let the attention layers that are made meanwhile have the enabled plug-in's backend.

    Args:
        enabled: The plug-ins that are on; without an attention backend among them nothing happens.
    """
    plugins = [item.plugin for item in enabled if isinstance(item.plugin, AttentionPlugin)]
    if not plugins:
        yield
        return
    device = current_platform.device_type
    member = AttentionBackendEnum[ATTENTION_BACKENDS[device]]
    before = member.get_path() if member.is_overridden() else None
    # vLLM remembers which class it chose, whatever is registered afterwards.
    _cached_get_attn_backend.cache_clear()
    register_backend(member, plugins[0].backends[device])
    try:
        yield
    finally:
        member.clear_override()
        if before is not None:
            register_backend(member, before)
        _cached_get_attn_backend.cache_clear()


def attention_layers(config: VllmConfig, impl: type[Any]) -> dict[str, torch.nn.Module]:
    """Return the attention layers of a loaded model that a backend's implementation serves.

    Args:
        config: The engine's configuration.
        impl: The implementation's class.

    Returns:
        Layers by name, in the order in which the model made them.
    """
    layers = config.compilation_config.static_forward_context
    return {name: x for name, x in layers.items() if isinstance(getattr(x, "impl", None), impl)}

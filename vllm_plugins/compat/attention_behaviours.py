"""Behaviours of vLLM that attention backends rely on."""

from __future__ import annotations

import inspect

from vllm_plugins.compat.behaviours import expect


def the_cpu_backend_can_be_overridden() -> None:
    """The CPU platform asks the registry for its one backend, which honours overrides."""
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.attention.selector import AttentionSelectorConfig

    config = AttentionSelectorConfig(64, torch.float32, None, None)
    stock = CpuPlatform.get_attn_backend_cls(None, config)
    expect(stock == AttentionBackendEnum.CPU_ATTN.get_path(), f"the CPU's backend is {stock}")
    register_backend(AttentionBackendEnum.CPU_ATTN, "a.module.Backend")
    try:
        found = CpuPlatform.get_attn_backend_cls(None, config)
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
    expect(found == "a.module.Backend", f"an override is not honoured: {found}")


def layers_keep_their_backend() -> None:
    """An attention layer returns the backend that it was made with."""
    from vllm.model_executor.layers.attention import Attention

    source = inspect.getsource(Attention.get_attn_backend)
    expect("return self.attn_backend" in source, "a layer's backend is looked up anew")

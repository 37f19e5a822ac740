"""vLLM configurations for an engine without a model: real ones, made from a folder's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_plugins.activation import engine_args

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

# A scheduler asks nothing of a model but its lengths; the shape is that of a very small Llama.
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131072,
    "rope_theta": 10000.0,
    "bos_token_id": 509,
    "eos_token_id": 510,
}


def write_model_config(folder: Path) -> Path:
    """Write the ``config.json`` of a small Llama, without weights, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(_LLAMA))
    return folder


def make_config(
    model: Path,
    *plugins: str,
    asynchronous: bool = False,
    stages: int = 1,
    **arguments: Any,
) -> VllmConfig:
    """Return the configuration of an engine that is only simulated.

    Args:
        model: Folder with a ``config.json``.
        plugins: Plug-ins in the language of ``--plugin``.
        asynchronous: Asynchronous scheduling, which the CPU platform would always turn off.
        stages: Pipeline-parallel size; no process is started.
        arguments: Other engine arguments by field name.
    """
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(
        str(model),
        **{
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "max_model_len": 32768,
            "pipeline_parallel_size": stages,
            "distributed_executor_backend": "uni" if stages == 1 else "mp",
            **engine_args(*plugins),
            **arguments,
        },
    ).create_engine_config()
    config.scheduler_config.async_scheduling = asynchronous
    return config


def make_kv_cache(config: VllmConfig, blocks: int) -> KVCacheConfig:
    """Return a KV cache of so many blocks for one group of full-attention layers."""
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

    spec = FullAttentionSpec(
        block_size=config.cache_config.block_size, num_kv_heads=2, head_size=32, dtype=torch.float32
    )
    config.cache_config.num_gpu_blocks = blocks
    return KVCacheConfig(
        num_blocks=blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
    )

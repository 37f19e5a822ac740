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


def dummy_batches_have_no_slots() -> None:
    """A batch of no requests, which either runner may run amid others, has slots below zero."""
    import torch
    from vllm.v1.worker.gpu.block_table import BlockTables
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    tables = object.__new__(BlockTables)
    tables.slot_mappings = torch.zeros(1, 4, dtype=torch.int64)
    found = tables.get_dummy_slot_mappings(2)
    expect(bool((found < 0).all()), "the second runner's would be written to")
    source = inspect.getsource(GPUModelRunner._dummy_run)  # noqa: SLF001
    expect("fill_(-1)" in source, "the first runner's may be written to")


def flash_attention_takes_pages() -> None:
    """The stock CUDA kernel, which only a CUDA build imports, takes paged keys and an output."""
    from importlib.util import find_spec
    from pathlib import Path

    from vllm.v1.attention.backends import fa_utils

    expect("flash_attn_varlen_func," in inspect.getsource(fa_utils), "it is imported otherwise")
    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    source = (folder / "vllm_flash_attn" / "flash_attn_interface.py").read_text()
    _, _, function = source.partition("def flash_attn_varlen_func(")
    signature, _, _ = function.partition("):")
    wanted = ("q", "k", "v", "out", "cu_seqlens_q", "max_seqlen_q", "seqused_k", "max_seqlen_k",
              "softmax_scale", "causal", "block_table", "fa_version")  # fmt: skip
    names = {line.partition("=")[0].partition(":")[0].strip(" ,") for line in signature.split("\n")}
    expect(names >= set(wanted), f"it lacks {sorted(set(wanted) - names)}")

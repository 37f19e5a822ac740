"""What must be equal on two instances that exchange KV, in one digest."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig

DIGEST_BYTES = 16
# Of each file of weights: its header, and enough of the last tensor to tell two trainings apart.
SAMPLE_BYTES = 1 << 16


def fingerprint(config: VllmConfig, cache: torch.Tensor | None) -> str:
    """Return the digest of an instance, in hexadecimal.

    Paths, parallelism and sizes of pools may differ; weights, numeric types and the layout within
    a block may not. Weights that are not local files count by name and revision.

    Args:
        config: The engine's configuration.
        cache: The KV cache of one attention layer; None where there is none.
    """
    model = config.model_config
    architecture = model.hf_config.to_dict()
    for name in ("transformers_version", "_name_or_path"):
        architecture.pop(name, None)
    folder = Path(model.model)
    local = folder.is_dir()
    facts: dict[str, Any] = {
        "architecture": architecture,
        "weights": _samples(folder) if local else [model.model, model.revision],
        "load_format": str(config.load_config.load_format),
        "dtype": str(model.dtype),
        "quantization": model.quantization,
    }
    if cache is not None:
        facts["kv_dtype"] = str(cache.dtype)
        facts["kv_form"] = [cache.dim(), cache.shape[-1]]
        # The CPU's kernels keep keys transposed, those of other devices do not.
        facts["device"] = cache.device.type
    if model.is_hybrid:
        facts["state_layout"] = _state_layout()
    text = json.dumps(facts, sort_keys=True, default=str).encode()
    return blake2b(text, digest_size=DIGEST_BYTES, person=b"pd-instance").hexdigest()


def _state_layout() -> bool:
    """Return whether convolution states lie channels first, which their shape need not show."""
    from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

    return is_conv_state_dim_first()


def _samples(folder: Path) -> list[tuple[str, int, str]]:
    """Return name, size and a digest of both ends of each file of weights."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    return [(path.name, path.stat().st_size, _sample(path)) for path in files]


def _sample(path: Path) -> str:
    digest = blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        digest.update(file.read(SAMPLE_BYTES))
        file.seek(max(0, path.stat().st_size - SAMPLE_BYTES))
        digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()

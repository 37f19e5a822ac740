"""What stored KV depends on, in one digest: an engine finds only what an equal one stored."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_plugins.kv_connectors.kvshare.segment_file import FORMAT_VERSION

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions

DIGEST_BYTES = 16
WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})


def fingerprint(config: VllmConfig, options: KVShareOptions) -> str:
    """Return the digest of an engine, in hexadecimal.

    Equal digests mean the same weights, numeric types and distribution over ranks, and anchors
    that are selected alike. Sizes of blocks and chunks, and how much is recomputed, do not matter.

    Args:
        config: The engine's configuration.
        options: The plug-in's options.
    """
    model, parallel = config.model_config, config.parallel_config
    architecture = model.hf_config.to_dict()
    architecture.pop("transformers_version", None)
    facts: dict[str, Any] = {
        "version": FORMAT_VERSION,
        "model": model.model,
        "revision": model.revision,
        "commit": getattr(model.hf_config, "_commit_hash", None),
        "weights": _weights(Path(model.model)),
        "load_format": str(config.load_config.load_format),
        "architecture": architecture,
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "kv_dtype": str(config.cache_config.cache_dtype),
        "tensor_parallel": parallel.tensor_parallel_size,
        "data_parallel": parallel.data_parallel_index,
        "min_run": options.min_run,
    }
    text = json.dumps(facts, sort_keys=True, default=str).encode()
    return blake2b(text, digest_size=DIGEST_BYTES, person=b"kvshare-engine").hexdigest()


def _weights(model: Path) -> list[tuple[str, int, int]]:
    """Return names, sizes and times of a local model's weights: others may take their place.

    Of a model that is not named by its path, the revision says which weights it has.
    """
    files = sorted(model.iterdir()) if model.is_dir() else [model]
    weights = [path for path in files if path.suffix in WEIGHTS and path.is_file()]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]

"""Turn a GGUF file of a Llama model into a model folder: `gguf_to_hf.py FILE.gguf OUT`.

Run by `smollm2.py` with `gguf` and `accelerate` on the path.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def convert(gguf: Path, out: Path) -> None:
    """Write config, bfloat16 safetensors and tokenizer of the model in `gguf` into folder `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    _write_weights(model, out)
    _write_config(model, out)


def _write_weights(model, out: Path) -> None:
    from safetensors.torch import save_file

    # `save_pretrained` refuses a model that came from a GGUF file, hence by hand.
    weights = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def _write_config(model, out: Path) -> None:
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    for stale in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        config.pop(stale, None)
    (out / "config.json").write_text(json.dumps(config, indent=1))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

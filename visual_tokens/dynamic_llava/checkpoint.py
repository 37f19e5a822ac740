"""A Dynamic-LLaVA checkpoint: a LLaVA folder that any vLLM serves, with predictors beside it.

::

    config.json                   the model's, with `sparse_config`
    model*.safetensors            the fine-tuned LLaVA, under the names that vLLM expects
    predictors/model.safetensors  `image_predictor.*` and `text_predictor.*`
    tokenizer, processor, ...     as in the model that was trained

Weights of a folder's subfolders are not read with the model's own, so stock vLLM and transformers
serve the same folder as a plain LLaVA. vLLM reads the predictors where a model class asks for them
by a secondary source of weights with the pattern `PREDICTOR_FILES`.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vllm_plugins.errors import PluginError
from vllm_plugins.visual_tokens.dynamic_llava.predictors import Predictors
from vllm_plugins.visual_tokens.dynamic_llava.sparse_config import KEY, SparseConfig

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

PREDICTOR_FILES = "predictors/*.safetensors"
"""Pattern of the predictors' weights below a checkpoint's folder."""

_PREDICTORS = Path("predictors") / "model.safetensors"
# Tokenizer and processor; weights and what describes them are written anew.
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
_WRITTEN = ("config.json", "model.safetensors.index.json")
_SHARD = "5GB"


def save_checkpoint(
    out: Path,
    model: LlavaForConditionalGeneration,
    predictors: Predictors,
    source: Path,
    dtype: torch.dtype,
) -> None:
    """Write a checkpoint's folder.

    Args:
        out: Made where it does not exist.
        model: The fine-tuned LLaVA; parameters without a gradient are written as they were.
        predictors: Trained with it.
        source: Folder of the model before training, which has tokenizer and processor too.
        dtype: Of the weights written.
    """
    from huggingface_hub import save_torch_state_dict

    out.mkdir(parents=True, exist_ok=True)
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.name not in _WRITTEN and path.resolve() != (out / path.name).resolve():
                shutil.copyfile(path, out / path.name)
    # Frozen parts were perhaps rounded for training. The state would have tied parameters twice.
    before = dict(type(model).from_pretrained(source, dtype=dtype).named_parameters())
    weights = {
        name: (trained if trained.requires_grad else before[name]).data.to(dtype)
        for name, trained in model.named_parameters()
    }
    save_torch_state_dict(served_names(weights), str(out), max_shard_size=_SHARD)
    save_predictors(out, predictors, dtype)
    config = copy.deepcopy(model.config)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    setattr(config, KEY, predictors.config.model_dump())
    config.save_pretrained(out)


def save_predictors(out: Path, predictors: Predictors, dtype: torch.dtype) -> None:
    """Write the predictors' weights below a checkpoint's folder."""
    from safetensors.torch import save_file

    (out / _PREDICTORS).parent.mkdir(parents=True, exist_ok=True)
    weights = {n: t.to(dtype).contiguous() for n, t in predictors.state_dict().items()}
    save_file(weights, out / _PREDICTORS, metadata={"format": "pt"})


def load_predictors(folder: Path, hidden_size: int) -> Predictors:
    """Return the predictors of a checkpoint, in float32.

    Args:
        folder: Of the checkpoint.
        hidden_size: Of its language model.

    Raises:
        PluginError: The folder is no such checkpoint, or its weights are not those that its
            configuration asks for.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = SparseConfig.read(folder)
    if config is None:
        raise PluginError(
            str(folder), f"config.json has no {KEY}", "train it: vllm-plugins train dynamic_llava"
        )
    path = folder / _PREDICTORS
    predictors = Predictors(hidden_size, config)
    try:
        predictors.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PluginError(str(path), reason, "use a folder that training wrote") from None
    return predictors.float()


def served_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a LLaVA's weights under the names of published checkpoints, which vLLM expects.

    transformers dropped one level of the vision tower's names.

    Args:
        weights: Of the whole model, under transformers' names.
    """
    old, new = "vision_tower.", "vision_tower.vision_model."
    return {
        name if new in name else name.replace(old, new, 1): tensor
        for name, tensor in weights.items()
    }

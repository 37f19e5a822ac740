"""A tiny LLaVA in the engine with image tokens dropped, and the same in plain torch."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vision import IMAGE_TOKEN, tiny_llava

from tests.models import make_engine
from vllm_plugins import engine_args
from vllm_plugins.visual_tokens.dynamic_llava.reference import reference_logits

PIXELS = 168
TOKENS = 144
"""Of an image."""
BLOCK = 32
RATE = 0.25
LAYER = 2
TOLERANCE = 1e-4
"""Of log-probabilities in float32."""

ENGINE: dict[str, Any] = {
    "block_size": BLOCK,
    "max_model_len": 1024,
    "max_num_seqs": 64,
    "limit_mm_per_prompt": {"image": 3},
    "seed": 0,
}


@dataclass(frozen=True)
class Ask:
    """A prompt: text, then images each before one token of text, then text.

    Attributes:
        before: Tokens before the first image.
        images: Their seeds.
        after: Tokens behind the last one.
        start: First token, so that prompts need not begin alike.
        ends: Whether the last image ends the prompt, without a token behind it.
    """

    before: int
    images: tuple[int, ...]
    after: int
    start: int = 7
    ends: bool = False

    @property
    def prompt(self) -> dict[str, Any]:
        """What the engine is given."""
        ids = [10 + (self.start + i) % 50 for i in range(self.before)]
        for seed in self.images:
            ids += [IMAGE_TOKEN, 20 + seed]
        ids += [30 + i % 20 for i in range(self.after)]
        if self.ends:
            ids.pop()
        if not self.images:
            return {"prompt_token_ids": ids}
        images = [image(seed) for seed in self.images]
        return {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}


@cache
def folder() -> Path:
    """The model's folder."""
    return tiny_llava(layers=4, pixels=PIXELS)


@cache
def image(seed: int) -> Any:
    """Return a noisy picture."""
    from PIL import Image

    noise = np.random.default_rng(seed).integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@cache
def pixels(seed: int) -> torch.Tensor:
    """Return what the vision tower reads of a picture, shape (1, 3, height, width)."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder()).image_processor
    return torch.tensor(np.asarray(processor(image(seed), return_tensors="np")["pixel_values"]))


@cache
def plain_model(where: Path | None = None) -> Any:
    """Return the model in transformers, float32."""
    from safetensors.torch import load_file
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    where = where or folder()
    config = LlavaConfig.from_pretrained(where, attn_implementation="eager")
    model = LlavaForConditionalGeneration(config).eval()
    own = model.state_dict().keys()
    weights = {
        name if name in own else name.replace("vision_tower.vision_model.", "vision_tower."): tensor
        for name, tensor in load_file(where / "model.safetensors").items()
    }
    model.load_state_dict({name: weights[name] for name in own})
    return model


def with_predictors(
    where: Path,
    sparse_config: dict[str, Any],
    seed: int = 0,
    keeps_all: bool = False,
    plain: Path | None = None,
) -> Path:
    """Make the model with random predictors in a folder of its own.

    Args:
        where: The folder.
        sparse_config: Of the predictors.
        seed: Of their weights.
        keeps_all: Whether the text predictor keeps every token.
        plain: The model's folder without predictors, if it is not the module's.
    """
    from safetensors.torch import save_file

    from vllm_plugins.visual_tokens.dynamic_llava.predictors import Predictors
    from vllm_plugins.visual_tokens.dynamic_llava.sparse_config import SparseConfig

    for path in (plain or folder()).iterdir():
        (where / path.name).write_bytes(path.read_bytes())
    config = json.loads((where / "config.json").read_text())
    torch.manual_seed(seed)
    predictors = Predictors(
        config["text_config"]["hidden_size"], SparseConfig.of(sparse_config, "test")
    )
    if predictors.text_predictor is not None:
        layer, decoder = sparse_config["sparse_layer"], plain_model(plain)
        _make_undecided(predictors.text_predictor, decoder, layer, keeps_all)
    (where / "predictors").mkdir()
    save_file(predictors.state_dict(), where / "predictors" / "model.safetensors")
    (where / "config.json").write_text(json.dumps(config | {"sparse_config": sparse_config}))
    return where


def _make_undecided(predictor: torch.nn.Module, model: Any, layer: int, keeps_all: bool) -> None:
    """Make a text predictor drop about half of all tokens, or none."""
    from vllm_plugins.visual_tokens.dynamic_llava.decoder import Decoder
    from vllm_plugins.visual_tokens.dynamic_llava.reference import causal_mask

    with torch.no_grad():
        decoder, positions = Decoder(model), torch.arange(256)
        embedded = decoder.embed(10 + torch.randint(50, (1, 256)), None)
        mask = causal_mask(256, embedded)
        hidden = decoder.run(embedded, range(layer), positions[None], mask)
        logits = predictor(hidden)[0]
        surplus = 1e6 if keeps_all else -float((logits[:, 0] - logits[:, 1]).median())
        predictor.head[-1].bias[0] += surplus


def predictors_of(where: Path) -> Any:
    """Return the predictors of a folder that `with_predictors` made."""
    from safetensors.torch import load_file

    from vllm_plugins.visual_tokens.dynamic_llava.predictors import Predictors
    from vllm_plugins.visual_tokens.dynamic_llava.sparse_config import SparseConfig

    config = json.loads((where / "config.json").read_text())
    predictors = Predictors(
        config["text_config"]["hidden_size"], SparseConfig.of(config["sparse_config"], "test")
    )
    predictors.load_state_dict(load_file(where / "predictors" / "model.safetensors"))
    return predictors.eval()


def pruned(options: dict[str, Any] | None = None, model: Path | None = None, **arguments: Any):
    """Run an engine with the plug-in; options over a rate of `RATE` by norm."""
    chosen = {"image_keep_rate": RATE, "image_scorer": "norm"} | (options or {})
    chosen = {name: value for name, value in chosen.items() if value is not None}
    plugin = engine_args("dynamic_llava", **chosen)
    return make_engine(model or folder(), **plugin, **(ENGINE | arguments))


def sampling(tokens: int, temperature: float = 0.0) -> Any:
    """Return parameters with log-probabilities, which are of logits before any bias."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=temperature,
        max_tokens=tokens,
        logprobs=5,
        ignore_eos=True,
        # An answer with this token in it could not be given to the reference.
        logit_bias={IMAGE_TOKEN: -100},
    )


def answers(llm: Any, asks: list[Ask], tokens: int = 4, temperature: float = 0.0) -> list[Any]:
    """Return outputs with log-probabilities."""
    params = sampling(tokens, temperature)
    return llm.generate([ask.prompt for ask in asks], params, use_tqdm=False)


def norm(hidden: torch.Tensor) -> torch.Tensor:
    """Score image tokens as the engine does with image_scorer=norm."""
    return hidden.norm(dim=-1)


def reference(
    ask: Ask, output: Any, *, scorer: Any = norm, rate: float = RATE, **options: Any
) -> Any:
    """Return what plain torch computes for a prompt and the answer it got."""
    ids = torch.tensor([*output.prompt_token_ids, *output.outputs[0].token_ids])
    images = torch.cat([pixels(seed) for seed in ask.images]) if ask.images else None
    return reference_logits(
        options.pop("model", None) or plain_model(),
        options.pop("predictors", None),
        ids,
        sparse_layer=options.pop("layer", LAYER),
        keep_rate=rate,
        pixel_values=images,
        block_size=BLOCK,
        scorer=scorer,
        **options,
    )


def worst(output: Any, expected: Any) -> float:
    """Return the largest difference of a log-probability from the reference's."""
    return max(abs(x) for step in _differences(output, expected) for x in step)


def worst_of_allowed(output: Any, expected: Any) -> float:
    """Return the largest difference of two tokens' log-probabilities from that in the reference.

    Of those that a grammar allows: it leaves the others with none, and these with more.
    """
    allowed = [[x for x in step if x > -math.inf] for step in _differences(output, expected)]
    return max(max(step) - min(step) for step in allowed)


def _differences(output: Any, expected: Any) -> Iterator[list[float]]:
    """Yield what each step of an answer gives of log-probabilities, less the reference's."""
    wanted = expected.logits.log_softmax(-1)
    prompt = len(output.prompt_token_ids)
    for step, given in enumerate(output.outputs[0].logprobs):
        [row] = (expected.kept == prompt - 1 + step).nonzero()
        yield [value.logprob - float(wanted[row, token]) for token, value in given.items()]


def assert_equal(asks: list[Ask], outputs: list[Any], **options: Any) -> None:
    """Fail unless every answer has the reference's log-probabilities."""
    differences = {
        ask: worst(output, reference(ask, output, **options))
        for ask, output in zip(asks, outputs, strict=True)
    }
    assert max(differences.values()) < TOLERANCE, differences


def assert_idle(llm: Any) -> None:
    """Fail if a KV block is lost; then forget what the prefix cache holds."""
    from tests.models import scheduler_of

    pool = scheduler_of(llm).kv_cache_manager.block_pool
    # One block is vLLM's own, for padding.
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    llm.reset_prefix_cache()

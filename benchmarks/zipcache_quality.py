"""What ZipCache's bits cost in perplexity, and what a token takes.

    python benchmarks/zipcache_quality.py MODEL [--passages 8] [--key-transform FILE] \
        [--context 1024] [--only "keys r=1"] [--out FILE.json] [--plot FILE.png]

The model is transformers' own, in float32. A prompt is computed exactly, as the plug-in does it in
one chunk; then its keys and values go through the plug-in's quantiser, with the salient tokens
chosen by the plug-in's probes, and the text's continuation is computed on what they became. Its own
keys stay as they are, as in a block that is not full. Every setting sees the same prompts, so what
is reported is the ratio to the exact cache. How fast decoding is says
`vllm-plugins bench --kernel zipcache`.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from in_process import write
from zipcache_settings import RATIOS, Setting, settings

from vllm_plugins.attention_backends.zipcache import quantiser, saliency
from vllm_plugins.attention_backends.zipcache.key_transform import KeyTransform, KeyTransformFile
from vllm_plugins.attention_backends.zipcache.page import PageFormat
from vllm_plugins.attention_backends.zipcache.saliency import Probing

FOLLOWING = 128
MODULES = ("argparse", "ast", "datetime", "decimal", "difflib", "doctest", "inspect", "ipaddress",
           "mailbox", "optparse", "pathlib", "pickle", "shutil", "subprocess", "tarfile",
           "typing")  # fmt: skip


class Recorder:
    """Remembers the queries of each layer while the model computes a prompt."""

    def __init__(self) -> None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
        from transformers.modeling_utils import AttentionInterface

        self.queries: list[torch.Tensor] = []
        self.recording = False

        def attention(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.recording:
                self.queries.append(query[0].transpose(0, 1))
            return sdpa_attention_forward(module, query, *args, **kwargs)

        AttentionInterface.register("recorded", attention)
        # Without it queries behind a cache would be masked as if they began the sequence.
        AttentionMaskInterface.register("recorded", sdpa_mask)


@dataclass
class Prompt:
    """A prompt's keys, values and scores, one entry for each layer; shape (kv heads, n, ...)."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    sums: list[torch.Tensor]
    seen: Any
    following: torch.Tensor


def load(folder: Path) -> Any:
    """Return the model, its attention recorded."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.set_attn_implementation("recorded")
    return model.eval()


def texts(folder: Path, count: int, context: int) -> dict[str, list[torch.Tensor]]:
    """Return token ids of code and prose; both come with Python.

    Args:
        folder: The model's.
        count: Passages of each.
        context: Tokens of a prompt.
    """
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer, length = AutoTokenizer.from_pretrained(folder), context + FOLLOWING + 1
    prose = tokenizer("\n".join(topics[name] for name in sorted(topics)))["input_ids"]
    code = [
        tokenizer(Path(str(find_spec(name).origin)).read_text())["input_ids"][500:]
        for name in MODULES
    ]
    code = [x for x in code if len(x) >= length][:count]
    step = len(prose) // count
    return {
        "prose": [torch.tensor(prose[i * step : i * step + length]) for i in range(count)],
        "code": [torch.tensor(x[:length]) for x in code],
    }


def compute(model: Any, recorder: Recorder, ids: torch.Tensor) -> Prompt:
    """Compute a prompt exactly, and its probes' attention."""
    recorder.queries, recorder.recording = [], True
    context = len(ids) - FOLLOWING - 1
    cache = model(ids[None, :context], use_cache=True, logits_to_keep=1).past_key_values
    recorder.recording = False
    probes = Probing(0.05, 0.05).chosen(0, context, context)
    rows, scale = torch.from_numpy(probes), recorder.queries[0].shape[-1] ** -0.5
    keys = [layer.keys[0] for layer in cache.layers]
    sums = [
        saliency.attention_sums(q[rows], k.transpose(0, 1), rows, scale)
        for q, k in zip(recorder.queries, keys, strict=True)
    ]
    seen = len(probes) - torch.searchsorted(rows, torch.arange(context)).numpy()
    values = [layer.values[0] for layer in cache.layers]
    return Prompt(keys, values, sums, seen, ids[context:])


def salient_tokens(prompt: Prompt, layer: int, setting: Setting, page: PageFormat) -> torch.Tensor:
    """Return whose keys and values a setting calls salient, bool, (kv heads, blocks, 2, N)."""
    context = prompt.keys[layer].shape[1]
    positions = torch.arange(context).numpy()
    weight = saliency.weights(prompt.seen, positions, context, setting.normalizer)
    scores = prompt.sums[layer] * torch.from_numpy(weight)
    if setting.choice == "random":
        scores = torch.rand(scores.shape, generator=torch.Generator().manual_seed(layer))
    scores[:, : setting.first] = torch.inf
    if setting.choice == "global":
        whole = PageFormat.of(context, page.head_size, setting.bits, setting.ratio, setting.keys)
        chosen = saliency.choose_both(scores, whole)
        return chosen.unflatten(-1, (-1, setting.block)).transpose(1, 2)
    return saliency.choose_both(scores.unflatten(1, (-1, setting.block)), page)


def transforms(path: str, config: Any) -> list[KeyTransform]:
    """Read the bases of all layers."""
    file, heads = KeyTransformFile(path), config.num_key_value_heads
    names = [f"model.layers.{i}.self_attn.attn" for i in range(config.num_hidden_layers)]
    size = head_size(config)
    return [file.layer(name, heads, slice(heads), size, torch.float32) for name in names]


def head_size(config: Any) -> int:
    """Return the channels of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def packed(
    prompt: Prompt, setting: Setting, bases: list[KeyTransform]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return keys and values of each layer as a setting's cache gives them back."""
    page = setting.page(prompt.keys[0].shape[-1])
    for layer, (keys, values) in enumerate(zip(prompt.keys, prompt.values, strict=True)):
        by = bases[layer] if setting.transformed else None
        inside = keys if by is None else keys @ by.keys - by.centre[:, None]
        k, v = (x.unflatten(1, (-1, setting.block)) for x in (inside, values))
        root = torch.ones(())
        if setting.scale == "root":
            root = v.abs().amax(dim=-2, keepdim=True).sqrt().half().float()
            root = torch.where(root > 0, root, torch.ones_like(root))
        codes = quantiser.quantise(k, v / root, setting.scale == "largest")
        k, v = quantiser.dequantise(codes, salient_tokens(prompt, layer, setting, page))
        k, v = k.flatten(1, 2), (v * root).flatten(1, 2)
        if by is not None:
            # Queries would be transformed instead: scores are the same.
            k = (k + by.centre[:, None]) @ by.queries.mT
        yield keys if setting.exact == "keys" else k, values if setting.exact == "values" else v


def predictions(
    model: Any, prompt: Prompt, setting: Setting | None, bases: list[KeyTransform]
) -> torch.Tensor:
    """Return the logarithms of what follows, on the cache of a setting or the exact one."""
    from transformers import DynamicCache

    exact = zip(prompt.keys, prompt.values, strict=True)
    layers = exact if setting is None else packed(prompt, setting, bases)
    cache = DynamicCache()
    for i, (k, v) in enumerate(layers):
        cache.update(k[None], v[None], i)
    inputs = prompt.following[None, :-1]
    return model(inputs, past_key_values=cache, use_cache=True).logits[0].log_softmax(dim=-1)


@dataclass(frozen=True)
class Loss:
    """What a cache costs on one passage, in nats a token.

    Attributes:
        increase: Of the text's loss. Its spread over passages hides what is small.
        divergence: From the exact cache's predictions. It is what the increase would be in the mean
            were the text drawn from them, and has no such spread.
    """

    increase: float
    divergence: float

    @classmethod
    def between(cls, exact: torch.Tensor, other: torch.Tensor, text: torch.Tensor) -> Loss:
        """Compare two caches' predictions of a text."""
        nll = torch.nn.functional.nll_loss
        divergence = (exact.exp() * (exact - other)).sum(dim=-1).mean()
        return cls((nll(other, text) - nll(exact, text)).item(), divergence.item())


def overlap(prompt: Prompt, setting: Setting) -> float:
    """Return the share of the salient tokens that a quota for the whole prompt chooses too."""
    other = Setting(setting.bits, setting.ratio, "global", setting.block)
    page, shares = setting.page(prompt.keys[0].shape[-1]), []
    for layer in range(len(prompt.keys)):
        ours, theirs = (salient_tokens(prompt, layer, x, page) for x in (setting, other))
        shares.append(((ours & theirs).sum() / ours.sum()).item())
    return statistics.mean(shares)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return losses of every setting, relative to the exact cache."""
    recorder = Recorder()
    model, found, path = load(args.model), {}, args.key_transform
    bases = transforms(path, model.config) if path is not None else []
    compared = [x for x in settings(bool(bases)) if args.only in x.label]
    for kind, passages in texts(args.model, args.passages, args.context).items():
        exact, losses, overlaps = [], {x: [] for x in compared}, []
        for ids in passages:
            prompt = compute(model, recorder, ids)
            text, stock = prompt.following[1:], predictions(model, prompt, None, bases)
            exact.append(torch.nn.functional.nll_loss(stock, text).item())
            overlaps.append(overlap(prompt, Setting("4/2")))
            for setting in losses:
                ours = predictions(model, prompt, setting, bases)
                losses[setting].append(Loss.between(stock, ours, text))
        found[kind] = {
            "exact perplexity": math.exp(statistics.mean(exact)),
            "overlap with a global quota, r=0.6": statistics.mean(overlaps),
            "settings": {x.label: row(model, x, y) for x, y in losses.items()},
        }
        for label, y in found[kind]["settings"].items():
            loss = f"{y['increase']:+.2%} ± {y['error']:.2%}"
            print(f"{kind}: {label}: {loss}, divergence {y['divergence']:.4f}", flush=True)
    return found


def row(model: Any, setting: Setting, losses: list[Loss]) -> dict[str, Any]:
    """Return what is reported of a setting."""
    config = model.config
    size = head_size(config)
    each = setting.page(size).token_bytes
    token = each * config.num_key_value_heads * config.num_hidden_layers
    mean, spread = mean_and_error([x.increase for x in losses])
    divergence, its_spread = mean_and_error([x.divergence for x in losses])
    return {
        "bits": setting.bits,
        "salient ratio": setting.ratio,
        "choice": setting.choice,
        "value scale": setting.scale,
        "exact": setting.exact,
        "transformed": setting.transformed,
        "salient ratio of keys": setting.ratio if setting.keys is None else setting.keys,
        "increase": math.exp(mean) - 1,
        "error": spread,
        "divergence": divergence,
        "error of divergence": its_spread,
        "bytes per token": token,
        "tokens per GiB": 2**30 // (token * setting.block) * setting.block,
        "smaller than bfloat16": 4 * size / each,
        "smaller than bfloat16, heads of 128": 512 / setting.page(128).token_bytes,
    }


def mean_and_error(numbers: list[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    error = statistics.stdev(numbers) / len(numbers) ** 0.5 if len(numbers) > 1 else 0.0
    return statistics.mean(numbers), error


def pages_at_128() -> dict[str, float]:
    """Return how much smaller than bfloat16 pages of heads of 128 channels are."""
    return {
        f"N={n}, r={r:g}": 512 / PageFormat.of(n, 128, "4/2", r).token_bytes
        for n in (32, 64, 128)
        for r in (0.0, 0.6, 0.7, 1.0)
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw perplexity against the salient share."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(10, 4), sharey=True)
    for axis, (kind, result) in zip(axes, found.items(), strict=True):
        rows = result["settings"]
        ends = [rows["2/2"], rows["4/4"]]
        for choice, name in (("saliency", ""), ("random", ", random")):
            middle = [rows[f"4/2 r={r:g}{name}"] for r in RATIOS]
            y = [100 * x["increase"] for x in (ends[0], *middle, ends[1])]
            bars = [100 * x["error"] for x in (ends[0], *middle, ends[1])]
            axis.errorbar([0, *RATIOS, 1], y, bars, marker="o", capsize=2, label=choice)
        axis.set_title(f"{kind}: exact perplexity {result['exact perplexity']:.2f}")
        axis.set_xlabel("salient share (0: 2/2, 1: 4/4)")
        axis.set_yscale("symlog", linthresh=1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity, increase in %")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024, help="a multiple of 128")
    parser.add_argument("--only", default="", help="settings that have this in their name")
    parser.add_argument("--key-transform", help="made by `vllm-plugins train zipcache`")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    with torch.inference_mode():
        found = measure(args)
    write(args.out, {"perplexity": found, "smaller than bfloat16, heads of 128": pages_at_128()})
    if args.plot is not None:
        draw(found, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

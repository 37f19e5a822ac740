"""``vllm-plugins train zipcache``: find the bases in which a model's keys lose least.

What they are says `key_transform`. vLLM itself computes the text, without the plug-in, so whatever
it serves can be looked at: on GPUs, quantised, over several ranks. Hooks before its attention
layers count what they are given; nothing is learnt by gradients, and nothing of the model changes.
"""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from vllm_plugins.attention_backends.zipcache import key_transform
from vllm_plugins.attention_backends.zipcache.key_transform import Moments
from vllm_plugins.engine.kv_heads import heads_of_rank
from vllm_plugins.errors import PluginError
from vllm_plugins.training.arguments import at_least

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WHERE = "train zipcache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add = parser.add_argument
    add("model", help="model folder or name, as for `vllm serve`")
    add("--text", type=Path, nargs="+", required=True, metavar="FILE",
        help="text of the kind that is served; a few pages do")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FILE",
        help="result, for --plugin zipcache:key_transform=FILE")  # fmt: skip
    add("--tokens", type=at_least(key_transform.BLOCK), default=8192,
        help="tokens to look at, evenly from all of the text (default: 8192)")  # fmt: skip
    add("--window", type=at_least(2 * key_transform.BLOCK), default=1024,
        help="tokens that are computed as one sequence (default: 1024)")  # fmt: skip
    add("--serve-args", default="",
        help="engine arguments that the model needs, in one string; sequences, steps and the "
        "prefix cache are the command's own")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Compute the text, fit, and write the file.

    Raises:
        PluginError: The text is too short, the file cannot be written, or the model has no keys
            that could be transformed.
    """
    text = "\n".join(_read(path) for path in args.text)
    _check_out(args.out)
    # Hooks are set in the workers, which a process between would forbid.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    llm = _engine(args.model, args.window, _serve_args(args.serve_args))
    prompts = windows(llm.get_tokenizer().encode(text), args.window - 1, args.tokens)
    fitted = {
        name: (key_transform.fit(x.spread, x.queries), x.keys / x.tokens)
        for name, x in count(llm, prompts).items()
    }
    try:
        key_transform.write(args.out, fitted, args.model)
    except (OSError, SafetensorError) as error:
        raise PluginError(
            f"{WHERE}: --out {args.out}", str(error), "choose another place"
        ) from None
    tokens = sum(map(len, prompts))
    print(f"{args.out}: {len(fitted)} layers, from {tokens} tokens")
    return 0


def _check_out(path: Path) -> None:
    """Refuse a place that nothing can be written to, rather now than after the work."""
    found = {
        "its folder does not exist": not path.parent.is_dir(),
        "it is a folder": path.is_dir(),
        "its folder cannot be written to": not os.access(path.parent, os.W_OK),
    }
    for reason, applies in found.items():
        if applies:
            raise PluginError(f"{WHERE}: --out {path}", reason, "choose another file")


def _serve_args(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise PluginError(f"{WHERE}: --serve-args", str(error), "close the quotation") from None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PluginError(f"{WHERE}: --text {path}", str(error), "give a text in UTF-8") from None


def windows(tokens: Sequence[int], size: int, wanted: int) -> list[list[int]]:
    """Cut pieces out of a text, at even distances from its beginning to its end.

    Args:
        tokens: The text's.
        size: Tokens of a piece.
        wanted: Tokens of all pieces, or what there is if that is less.

    Raises:
        PluginError: The text is shorter than one piece.
    """
    count = min(-(-wanted // size), len(tokens) // size)
    if count == 0:
        reason = f"it has {len(tokens)} tokens, and a sequence has {size}"
        raise PluginError(f"{WHERE}: --text", reason, "give more text or lower --window")
    room = len(tokens) - size
    starts = [room * i // max(count - 1, 1) for i in range(count)]
    return [list(tokens[start : start + size]) for start in starts]


def _engine(model: str, window: int, arguments: Sequence[str]) -> Any:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # A sequence at a time, in one step; hooks are passed by in graphs.
    fixed = {"model": model, "max-model-len": window, "max-num-batched-tokens": window}
    flags = [f"--{name}={value}" for name, value in fixed.items()]
    flags += ["--max-num-seqs=1", "--enforce-eager", "--no-enable-prefix-caching"]
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog=f"{WHERE}: --serve-args"))
    parsed = parser.parse_args([*arguments, *flags])
    try:
        return LLM.from_engine_args(EngineArgs.from_cli_args(parsed))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        mend = "mend the model's name, --serve-args or --window"
        raise PluginError(f"{WHERE}: vLLM refuses", reason, mend) from None


def count(llm: Any, prompts: Sequence[list[int]]) -> dict[str, Moments]:
    """Return what a model's attention layers are given while prompts are computed, by layer.

    Args:
        llm: vLLM's ``LLM``, which computes a prompt in one step, eagerly.
        prompts: Token ids.

    Raises:
        PluginError: The model has no attention layers of a kind that ZipCache knows.
    """
    from vllm import SamplingParams

    total = llm.llm_engine.vllm_config.model_config.get_total_num_kv_heads()
    llm.apply_model(_watch)
    given = [{"prompt_token_ids": x} for x in prompts]
    llm.generate(given, SamplingParams(max_tokens=1, temperature=0))
    found: dict[str, list[Moments]] = {}
    for of_rank in llm.apply_model(_counted):
        for name, moments in of_rank.items():
            found.setdefault(name, []).append(moments)
    if not found:
        reason = "it has no layers with keys and values of heads"
        raise PluginError(f"{WHERE}: this model", reason, "ZipCache does not serve it")
    check(found, total)
    return {name: joined(ranks, total) for name, ranks in found.items()}


def check(found: Mapping[str, Sequence[Moments]], total: int) -> None:
    """Refuse layers of which nothing can be told.

    Args:
        found: What each rank has counted, by layer.
        total: KV heads of the model.

    Raises:
        PluginError: A layer has seen nothing, or what cannot be fitted.
    """
    for name, ranks in found.items():
        own, parts = ranks[0], [y for x in ranks for y in (x.spread, x.queries, x.keys)]
        reasons = {
            "has seen nothing": own.tokens == 0,
            "was given numbers that are none": not all(x.isfinite().all() for x in parts),
            "has another number of KV heads than the model's other layers":
                own.kv_heads != heads_of_rank(total, 0, len(ranks)).stop,
        }  # fmt: skip
        for reason, applies in reasons.items():
            if applies:
                raise PluginError(f"{WHERE}: this model", f"{name} {reason}", "it cannot be served")


def _watch(model: torch.nn.Module) -> None:
    """Let a worker's attention layers count."""
    from vllm.model_executor.layers.attention import Attention

    for layer in model.modules():
        if type(layer) is not Attention or layer.kv_sharing_target_layer_name is not None:
            continue
        if layer.attn_type == "decoder":
            layer.zipcache_moments = Moments(layer.num_kv_heads, layer.head_size)
            layer.register_forward_pre_hook(_count, with_kwargs=True)


def _count(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = dict(zip(("query", "key"), args, strict=False)) | kwargs
    query, key = (
        given[name].reshape(len(given[name]), -1, layer.head_size) for name in ("query", "key")
    )
    layer.zipcache_moments.add(query, key)


def _counted(model: torch.nn.Module) -> dict[str, Moments]:
    """Return what a worker's layers have counted, by vLLM's names of them."""
    layers = [x for x in model.modules() if hasattr(x, "zipcache_moments")]
    return {layer.layer_name: layer.zipcache_moments for layer in layers}


def joined(ranks: Sequence[Moments], total: int) -> Moments:
    """Put a layer's heads together that tensor-parallel ranks have counted.

    Args:
        ranks: In their order. Where there are fewer heads than ranks, several have the same one,
            with different queries.
        total: KV heads of the model.
    """
    whole = Moments(total, ranks[0].head_size)
    for name in ("spread", "queries", "keys"):
        heads = torch.cat([getattr(x, name) for x in ranks])
        setattr(whole, name, heads.unflatten(0, (total, -1)).mean(dim=1))
    whole.tokens = ranks[0].tokens
    return whole

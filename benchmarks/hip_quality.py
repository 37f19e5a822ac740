"""What HiP's selection costs in quality while decoding, against how much it keeps.

    python benchmarks/hip_quality.py perplexity MODEL [--context 6000] [--out FILE.json]
    python benchmarks/hip_quality.py needle MODEL [--lengths 2048,4096,8192] [--refresh]

Prompts are computed densely, once, and found in the prefix cache by every setting after the first.
What follows is decoded sparsely: for perplexity the text's own continuation, forced token by token;
for the needle the answer to a question about one sentence of a long prompt.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "models"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from in_process import engine, worker, write
from kvshare_perplexity import forced_processor

MODULES = ("argparse", "inspect")
FOLLOWING = 128
DENSE, DEFAULTS = "dense", "defaults"
REFRESHES = ([1, 1, 1], [16, 8, 1], [16, 8, 4], [32, 16, 8])
BASE = {"dense_threshold": 0, "sink_tokens": 64, "window_tokens": 256}


@dataclass(frozen=True)
class Setting:
    """One set of options, over those that all have."""

    label: str
    options: dict[str, Any]


def settings(top_ks: Sequence[int]) -> list[Setting]:
    """Return dense attention, the curve over ``top_k``, and that over ``refresh``."""
    found = [Setting(DENSE, {**BASE, "dense_threshold": 2**30})]
    found += [Setting(DEFAULTS, {"dense_threshold": 0})]
    found += [Setting(f"top_k={k}", {**BASE, "top_k": k}) for k in top_ks]
    middle = top_ks[len(top_ks) // 2]
    for refresh in ([1, 1, 1], [32, 16, 8], [96, 24, 8]):
        own = {"top_k": middle, "refresh": refresh, "overlap_tokens": max(refresh[0], 64)}
        found.append(Setting(f"top_k={middle}, refresh={refresh}", {**BASE, **own}))
    return found


def use(llm: Any, options: dict[str, Any]) -> None:
    """Give a running engine's layers other options; which are dense stays as it is."""
    from vllm_plugins.attention_backends.hip.batch import BatchPlanner
    from vllm_plugins.attention_backends.hip.plugin import HipOptions

    view = worker(llm).plugin_view()
    chosen = HipOptions.model_validate(options)
    layers = list(view.config.compilation_config.static_forward_context.values())
    rows = view.config.scheduler_config.max_num_seqs
    for i, layer in enumerate(layers):
        plan = chosen.plan(i, len(layers))
        if plan is not None:
            layer.impl.make_sparse(plan, rows)
    for groups in view.attention_groups:
        for group in groups:
            group.get_metadata_builder()._planner = BatchPlanner(chosen, rows, 1)  # noqa: SLF001


def texts(model: Path, context: int) -> dict[str, list[list[int]]]:
    """Return token ids of source code and of prose, for a prompt and what follows.

    Both come with Python: modules of its library, and its reference manual as `help` shows it.
    """
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    manual = "\n".join(topics[name] for name in sorted(topics))
    length = context + FOLLOWING
    sources = [Path(str(find_spec(name).origin)).read_text() for name in MODULES]
    prose = tokenizer(manual)["input_ids"]
    return {
        "code": [tokenizer(text)["input_ids"][:length] for text in sources],
        "prose": [prose[i * length : (i + 1) * length] for i in range(len(MODULES))],
    }


def perplexity(args: argparse.Namespace) -> dict[str, Any]:
    """Measure perplexity of what follows the prompts, over the settings."""
    passages = texts(args.model, args.context)
    result: dict[str, Any] = {"context": args.context, "settings": {}}
    arguments = {
        "max_model_len": args.context + FOLLOWING + 32,
        "logits_processors": [forced_processor()],
        "max_num_batched_tokens": 2048,
    }
    dense: dict[str, float] = {}
    with engine(args.model, "hip:dense_threshold=0", **arguments) as llm:
        for setting in settings(args.top_k):
            use(llm, setting.options)
            found = {k: following(llm, x, args.context) for k, x in passages.items()}
            dense = dense or found
            ratios = {kind: value / dense[kind] for kind, value in found.items()}
            result["settings"][setting.label] = {
                "options": setting.options, "perplexity": found, "ratio": ratios
            }  # fmt: skip
            print(f"{setting.label}: {ratios}", flush=True)
    return result


def following(llm: Any, passages: list[list[int]], context: int) -> float:
    """Return the perplexity of the passages' ends, decoded token by token."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0, max_tokens=FOLLOWING, ignore_eos=True, logprobs=0,
            extra_args={"forced": x[context:]},
        )
        for x in passages
    ]  # fmt: skip
    prompts = [{"prompt_token_ids": x[:context]} for x in passages]
    total = 0.0
    for out in llm.generate(prompts, params, use_tqdm=False):
        answer = out.outputs[0]
        total += sum(p[t].logprob for p, t in zip(answer.logprobs, answer.token_ids, strict=True))
    return math.exp(-total / (len(passages) * FOLLOWING))


def refresh_settings(top_k: int) -> list[Setting]:
    """Return the default preset with other ``refresh``, then one that keeps little."""
    found = [Setting(DENSE, {**BASE, "dense_threshold": 2**30})]
    for label, base in ((DEFAULTS, {"dense_threshold": 0}), (f"top_k={top_k}", BASE)):
        own = {} if label == DEFAULTS else {"top_k": top_k}
        for refresh in REFRESHES:
            options = {**base, **own, "refresh": refresh}
            found.append(Setting(f"{label}, refresh={refresh}", options))
    return found


def needle(args: argparse.Namespace) -> dict[str, Any]:
    """Measure right answers over the settings, in percent, with 95 % intervals."""
    result: dict[str, Any] = {"prompts": args.prompts, "questions": args.questions, "settings": {}}
    arguments = {
        "max_model_len": max(args.lengths) + 64,
        "logits_processors": [forced_processor()],
    }
    chosen = refresh_settings(args.top_k[0]) if args.refresh else settings(args.top_k)
    with engine(args.model, "hip:dense_threshold=0,dense_layers=[0]", **arguments) as llm:
        for setting in chosen:
            use(llm, {**setting.options, "dense_layers": [0]})
            right = {
                f"{task} {length}": answers(llm, prompts_of(task, length, args))
                for task in args.tasks
                for length in args.lengths
            }
            result["settings"][setting.label] = {"options": setting.options, "right": right}
            print(setting.label, right, flush=True)
    return result


def prompts_of(task: str, length: int, args: argparse.Namespace) -> list[Any]:
    """Return prompts of about ``length`` tokens, with their answers at all depths.

    For curves over ``refresh`` lengths differ by up to 15 tokens: refreshes are due at multiples of
    up to 16, and questions shall come at any distance from one.
    """
    from retriever_data import PASSKEY, make_prompt

    count, questions = args.prompts, 1 if task == PASSKEY else args.questions
    return [
        make_prompt(
            task, length - i % 16 * args.refresh, (i + 0.5) / count, seed=i, questions=questions
        )
        for i in range(count)
    ]


def answers(llm: Any, prompts: Sequence[Any]) -> dict[str, Any]:
    """Count the questions whose whole answer is right.

    The question is decoded too: it is forced, so that finding the answer is left to sparse steps.
    """
    from vllm import SamplingParams

    asked = [(p, i) for p in prompts for i in range(len(p.asked))]
    params = [
        SamplingParams(
            temperature=0, max_tokens=len(p.question(i)) + len(p.answer(i)), ignore_eos=True,
            extra_args={"forced": p.question(i)},
        )
        for p, i in asked
    ]  # fmt: skip
    inputs = [{"prompt_token_ids": list(p.context)} for p, _ in asked]
    outs = llm.generate(inputs, params, use_tqdm=False)
    right = sum(
        list(o.outputs[0].token_ids)[len(p.question(i)) :] == p.answer(i)
        for o, (p, i) in zip(outs, asked, strict=True)
    )
    return {"right": right, "asked": len(asked), "percent": interval(right, len(asked))}


def interval(right: int, asked: int) -> list[float]:
    """Return the share in percent, and the ends of its 95 % interval (Wilson's)."""
    share, z = right / asked, 1.96
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z * math.sqrt(share * (1 - share) / asked + (z / (2 * asked)) ** 2)
    half /= 1 + z * z / asked
    return [round(100 * x, 2) for x in (share, middle - half, middle + half)]


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("what", choices=("perplexity", "needle"))
    parser.add_argument("model", type=Path)
    numbers = {"type": lambda text: [int(x) for x in text.split(",")]}
    parser.add_argument("--context", type=int, default=6000)
    parser.add_argument("--lengths", **numbers, default=[2048, 4096, 8192])
    parser.add_argument("--top-k", **numbers, default=[0, 64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--tasks", nargs="+", default=["passkey", "recall"])
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--questions", type=int, default=8, help="of each prompt in recall")
    parser.add_argument(
        "--refresh", action="store_true", help="curves over refresh, not over top_k"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    write(args.out, {"perplexity": perplexity, "needle": needle}[args.what](args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

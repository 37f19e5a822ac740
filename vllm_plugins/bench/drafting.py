"""Drafting for images measured: what each way to draft costs and gains, against none at all."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from vllm_plugins.bench.drafting_engine import Pass, stock_eagle
from vllm_plugins.bench.errors import BenchError

NONE, NGRAM, EAGLE = "none", "ngram", "eagle-text"
MODES = {
    "off": "mode=off",
    "pool": "mode=static,default_operator=pool",
    "prune": "mode=static,default_operator=prune",
    "conv": "mode=static,default_operator=conv",
    "resample": "mode=static,default_operator=resample",
    "text-only": "mode=static,default_operator=text_only",
    "pool-3x": "mode=static,default_operator=pool,pool_ratio=3",
    "prune-3x": "mode=static,default_operator=prune,prune_ratio=3",
    "select": "mode=select",
    "weighted": "mode=weighted",
    "concat": "mode=concat",
}
VARIANTS = (NGRAM, EAGLE, *MODES)


@dataclass(frozen=True)
class DraftingBench:
    """What is measured.

    Attributes:
        model: The target.
        drafter: A checkpoint of SpecVLM.
        prompts: Question and picture, or no picture, of each request.
        tokens: Longest answer.
        ignore_eos: Whether answers always have that length.
        drafts: Tokens of a draft.
        repeats: Alternated passes.
        arguments: Engine arguments of every engine.
        variants: Names of what is paired with no drafting.
    """

    model: str
    drafter: Path
    prompts: Sequence[tuple[str, str | None]]
    tokens: int
    ignore_eos: bool
    drafts: int
    repeats: int
    arguments: dict[str, Any]
    variants: Sequence[str]


@dataclass(frozen=True)
class Drafted:
    """What one way to draft gave.

    Attributes:
        name: Of the variant.
        speedups: Wall time without drafting over that with it, of each pair of passes.
        tokens_per_round: Generated tokens for each step of the target behind the prefill, drafted
            for or not: the paper's sigma, which has a draft in every round.
        draft_rows: Rows of the drafter's prefill over all prompts; 0 without a drafter.
        draft_kv_bytes: That all drafts of a pass read of the drafter's cache, from lengths.
        seconds: Of each pass.
        equal: Whether every answer was the same as without drafting.
    """

    name: str
    speedups: list[float]
    tokens_per_round: float
    draft_rows: int
    draft_kv_bytes: int
    seconds: list[float]
    equal: bool

    @property
    def speedup(self) -> float:
        """Median of the pairs."""
        return median(self.speedups)


def measure(bench: DraftingBench, log: Path) -> Iterator[Drafted]:
    """Measure each variant beside an engine that does not draft, passes alternating.

    Args:
        bench: What to measure.
        log: Takes what the engines say.

    Raises:
        BenchError: An engine ended.
    """
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plain = stack.enter_context(_engine(bench, NONE, scratch, log))
        plain()
        for name in bench.variants:
            with _engine(bench, name, scratch, log) as drafting:
                # The first pass compiles and warms up.
                drafting()
                pairs = [(plain(), drafting()) for _ in range(bench.repeats)]
            yield _summary(name, bench.drafts, pairs)


def _summary(name: str, drafts: int, pairs: Sequence[tuple[Pass, Pass]]) -> Drafted:
    plain, drafted = pairs[0]
    # The first token of an answer belongs to the prefill.
    generated = sum(len(answer) - 1 for answer in drafted.answers)
    has_drafter = name != NGRAM
    return Drafted(
        name,
        [a.seconds / b.seconds for a, b in pairs],
        generated / max(1, sum(drafted.steps)),
        sum(drafted.prompts) - sum(drafted.dropped) if has_drafter else 0,
        _kv_bytes(drafted, drafts) if has_drafter else 0,
        [b.seconds for _, b in pairs],
        all(a.answers == plain.answers == b.answers for a, b in pairs),
    )


def _kv_bytes(drafted: Pass, drafts: int) -> int:
    """Return what drafts read: on average half of the answer lies behind the prompt's rows."""
    per_request = zip(
        drafted.rounds, drafted.prompts, drafted.dropped, drafted.answers, strict=True
    )
    return sum(
        rounds * drafts * (prompt - dropped + len(answer) // 2) * drafted.token_bytes
        for rounds, prompt, dropped, answer in per_request
    )


@contextmanager
def _engine(
    bench: DraftingBench, name: str, scratch: Path, log: Path
) -> Iterator[Callable[[], Pass]]:
    """Start an engine and yield what asks it for a pass."""
    wanted = {
        "model": bench.model,
        "prompts": list(bench.prompts),
        "tokens": bench.tokens,
        "ignore_eos": bench.ignore_eos,
        **_engine_arguments(bench, name, scratch),
    }
    command = [sys.executable, "-m", "vllm_plugins.bench.drafting_engine"]
    with log.open("a") as out:
        out.write(f"--- {name}\n")
        out.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True
        )
        try:
            _ask(process, json.dumps(wanted), name, log)
            yield lambda: Pass(**_ask(process, "{}", name, log))
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def _ask(process: subprocess.Popen[str], line: str, name: str, log: Path) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass
    answer = process.stdout.readline()
    if not answer:
        raise BenchError(f"the engine of '{name}' ended; see {log}")
    found: dict[str, Any] = json.loads(answer)
    return found


def _engine_arguments(bench: DraftingBench, name: str, scratch: Path) -> dict[str, Any]:
    arguments, plugin = dict(bench.arguments), ""
    if name == NGRAM:
        arguments["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": bench.drafts,
            "prompt_lookup_max": 4,
        }
    elif name == EAGLE:
        folder = scratch / name
        folder.mkdir()
        stock_eagle(bench.drafter, folder)
        arguments["speculative_config"] = {
            "method": "eagle",
            "model": str(folder),
            "num_speculative_tokens": bench.drafts,
        }
    elif name != NONE:
        options = f"model={bench.drafter},num_speculative_tokens={bench.drafts}"
        plugin = f"specvlm:{options},{MODES[name]}"
    return {"arguments": arguments, "plugin": plugin}

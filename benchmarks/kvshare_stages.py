"""Where the time to a first token goes when KVShare blends a prompt.

    OMP_NUM_THREADS=1 python benchmarks/kvshare_stages.py MODEL [--length 4096] [--out FILE.json]

The prompts are those of `kvshare_ttft.py`. Each stage of a blend is timed in CPU seconds; what is
left of the whole is vLLM's own prefill of the text after the span, with all that surrounds it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from in_process import engine, write
from kvshare_ttft import PLUGIN, first_token, prompts


def timed(spent: dict[str, float], name: Callable[..., str], function: Any) -> Any:
    """Return the function with its CPU time added up under a name made from its arguments."""

    def run(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        result = function(*args, **kwargs)
        spent[name(*args, **kwargs)] += time.process_time() - began
        return result

    return run


def timed_steps(spent: dict[str, float], name: str, function: Any) -> Any:
    """Return a function whose result is worked on step by step, with its CPU time added up."""

    def run(*args: Any) -> Iterator[Any]:
        steps = function(*args)
        while True:
            began = time.process_time()
            try:
                value = next(steps)
            except StopIteration:
                return
            finally:
                spent[name] += time.process_time() - began
            yield value

    return run


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from vllm_plugins.kv_connectors.kvshare.blend import Blend
    from vllm_plugins.kv_connectors.kvshare.check_pass import CheckForward

    spent: dict[str, float] = defaultdict(float)
    Blend._load = timed_steps(spent, "load", Blend._load)  # noqa: SLF001
    Blend._select = timed(spent, lambda *_: "select", Blend._select)  # noqa: SLF001
    CheckForward.run = timed(
        spent,
        lambda _, parts, layers: f"layers {layers.start}-{layers.stop - 1}",
        CheckForward.run,
    )
    CheckForward.write_keys_values = timed(
        spent,
        lambda _, rows, layer, pages: f"keys and values of layer {layer}",
        CheckForward.write_keys_values,
    )
    settings = {"max_model_len": args.length + 64, "max_num_batched_tokens": 2048}
    with engine(args.model, PLUGIN, block_size=32, **settings) as llm:
        vocab = llm.llm_engine.model_config.get_vocab_size() - 8
        earlier, later, _ = prompts(args.length, 0, vocab)
        first_token(llm, list(range(200)))
        full = first_token(llm, earlier)["cpu_s"]
        spent.clear()
        whole = first_token(llm, later)["cpu_s"]
    stages = {**spent, "rest": whole - sum(spent.values())}
    result = {"full_prefill": full, "blended": whole, "stages": stages}
    print(result)
    write(args.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Time of a decoded token behind a long prompt, on the real engine: stock and attention backends.

    python benchmarks/long_decode.py [--contexts 8192,32768] [--plugins hip zipcache] [--out F.json]

A Llama of random weights answers one prompt, again and again, whose KV the prefix cache has. What a
token takes is the difference between answers of two lengths, over the tokens between them. Each
variant is a process of its own; their rounds take turns. Weights are random, so this is about time
alone: what sparse or packed keys cost in quality, `hip_quality.py` and `zipcache_*.py` measure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from in_process import write

STOCK = "stock"
SHORT, LONG = 4, 68


def llama(folder: Path, layers: int, hidden: int, positions: int) -> Path:
    """Write a configuration without weights: heads of 128, one KV head for four."""
    heads = hidden // 128
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": 4 * hidden, "num_hidden_layers": layers, "head_dim": 128,
        "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4),
        "vocab_size": 32000, "max_position_embeddings": positions, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "hidden_act": "silu", "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def serve(given: dict[str, Any]) -> None:
    """Be one variant: answer each line, a context, with the seconds of a token there."""
    import numpy as np
    from vllm import LLM, SamplingParams

    from vllm_plugins import engine_args

    plugin = engine_args(given["plugin"]) if given["plugin"] else {}
    llm = LLM(given["model"], skip_tokenizer_init=True, load_format="dummy", max_num_seqs=4,
              enable_prefix_caching=True, **(plugin | given["arguments"]))  # fmt: skip

    def seconds(context: int, tokens: int) -> float:
        ids = np.random.default_rng(context).integers(3, 32000, context).tolist()
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        return time.perf_counter() - began

    print("ready", file=OUT, flush=True)
    for line in sys.stdin:
        context = int(line)
        # The first answer fills the prefix cache, the second compiles what is left.
        seconds(context, 1)
        seconds(context, LONG)
        took = [(seconds(context, LONG) - seconds(context, SHORT)) / (LONG - SHORT) for _ in "abc"]
        print(statistics.median(took), file=OUT, flush=True)


def measure(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    """Start the variants and let their rounds take turns."""
    longest = max(args.contexts) + LONG + 1
    arguments = {"max_model_len": longest, **args.engine_args}
    processes = {}
    for name in (STOCK, *args.plugins):
        given = {"model": str(model), "plugin": "" if name == STOCK else name,
                 "arguments": arguments}  # fmt: skip
        command = [sys.executable, __file__, "--serve", json.dumps(given)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if _line(process):
            processes[name] = process
        else:
            print(f"the engine of {name} ended", file=sys.stderr)
    found: dict[str, dict[str, list[float]]] = {str(c): {} for c in args.contexts}
    for context in args.contexts:
        for _ in range(args.rounds):
            for name, process in processes.items():
                assert process.stdin is not None
                process.stdin.write(f"{context}\n")
                process.stdin.flush()
                found[str(context)].setdefault(name, []).append(float(_line(process)))
        print(context, {k: f"{1e3 * statistics.median(v):.2f} ms" for k, v in
                        found[str(context)].items()}, flush=True)  # fmt: skip
    for process in processes.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    return found


def compared(found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Return stock's time over each variant's, round by round."""
    summary: dict[str, Any] = {}
    for context, times in found.items():
        for name, seconds in times.items():
            ratios = [a / b for a, b in zip(times[STOCK], seconds, strict=True)]
            summary.setdefault(context, {})[name] = {
                "token_ms": 1e3 * statistics.median(seconds),
                "faster": statistics.median(ratios), "least": min(ratios), "most": max(ratios),
            }  # fmt: skip
    return summary


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--plugins", nargs="+", default=["hip", "zipcache"])
    parser.add_argument("--contexts", type=lambda t: [int(x) for x in t.split(",")],
                        default=[8192, 32768])  # fmt: skip
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine-args", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        model = llama(Path(folder), args.layers, args.hidden, max(args.contexts) + LONG + 8)
        found = measure(args, model)
    shape = {"layers": args.layers, "hidden": args.hidden}
    write(args.out, {"shape": shape, "summary": compared(found), "seconds": found})
    return 0


if __name__ == "__main__":
    # What engines print must not get between the answers.
    OUT = os.fdopen(os.dup(1), "w")
    if "--serve" in sys.argv:
        os.dup2(2, 1)
    raise SystemExit(main())

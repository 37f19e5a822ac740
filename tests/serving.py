"""A real `vllm serve` for tests."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from serving import Server, ServerDiedError, serve

__all__ = ["Server", "ServerDiedError", "served"]

# Exact arithmetic and a quick start; a later argument of the same name wins.
SERVE_DEFAULTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048")


@contextmanager
def served(
    model: Path | str,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    ready_s: float = 180,
) -> Iterator[Server]:
    """Serve `model` over HTTP on loopback for the length of the block.

    Args:
        model: the model's folder.
        *arguments: arguments of `vllm serve` after `SERVE_DEFAULTS`.
        environment: variables on top of the test's own.
        ready_s: seconds until the start counts as failed.

    Raises:
        ServerDiedError: it ended or did not get ready; the message holds the log's tail.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "vllm.log"
        with serve(
            model,
            *SERVE_DEFAULTS,
            *arguments,
            log_file=log,
            environment=environment,
            ready_s=ready_s,
        ) as server:
            yield server

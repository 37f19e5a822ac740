"""Fixtures that several unit tests share."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def ends() -> Iterator[list[Any]]:
    """Collects what a test has to close, and closes it in the end, last things first."""
    made: list[Any] = []
    yield made
    for end in reversed(made):
        end.close()


@pytest.fixture
def pd_nothing_left(monkeypatch, caplog) -> Iterator[None]:
    """Small pieces for the workers of `pd`, and nothing left of them when the test is over."""
    from tests.pd_problem import PIECE_BYTES, nothing_left
    from vllm_plugins.kv_connectors.pd import decode_worker, prefill_worker

    for module in (decode_worker, prefill_worker):
        monkeypatch.setattr(module, "PIECE_BYTES", PIECE_BYTES)
    with nothing_left():
        yield
        # What was logged keeps errors, these their frames, and those mapped memory.
        caplog.get_records("call").clear()

"""Fixtures of the tests on the real engine."""

import pytest

from tests.engine.kvshare_engine import stock_answers


@pytest.fixture(scope="session")
def stock():
    """Stock vLLM's greedy answers to the prompts of `kvshare_engine`.

    Only one engine may be up in a process: an engine of a test's own asks for this one first.
    """
    return stock_answers()

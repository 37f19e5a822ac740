"""`transport=nixl`: vLLM's NixlConnector under DistServe's admission rule moves a prompt's KV."""

import contextlib
import importlib.util
import os
import signal

import pytest

from tests import models
from tests.pd_servers import COMMON, Pair, prompt, until
from tests.serving import served
from vllm_plugins.bench.server import free_port

pytestmark = [
    pytest.mark.serve,
    # Its threads spin on a core each.
    pytest.mark.alone,
    pytest.mark.skipif(
        importlib.util.find_spec("nixl") is None,
        reason="nixl is not installed: pip install nixl",
    ),
]

LENGTHS = (31, 33, 150, 300)


def start(stack: contextlib.ExitStack, role: str):
    """Serve in a role; both would listen on the same port of NIXL's."""
    port = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()), "UCX_TLS": "tcp,self"}
    words = (*COMMON, "--plugin", f"pd:role={role},transport=nixl")
    return stack.enter_context(served(models.tiny_llama(), *words, environment=port))


@pytest.fixture(scope="module")
def pair():
    with contextlib.ExitStack() as stack:
        # One after the other, as both start with this process's environment.
        yield Pair(*(start(stack, role) for role in ("prefill", "decode")))


def bytes_moved(pair: Pair) -> float:
    """Return how many NIXL has moved; it says so with the steps that follow a transfer."""
    pair.decoded(prompt(20, 2), None)
    return pair.decode.metric("vllm:nixl_bytes_transferred_sum")


@pytest.mark.parametrize("length", LENGTHS)
def test_answers_are_one_engines(pair, length):
    tokens = prompt(length)
    before = pair.decode.metric("vllm_plugins:pd_pulled_tokens_total")
    assert pair.decoded(tokens, pair.prefilled(tokens)) == pair.colocated(tokens)
    assert pair.decode.metric("vllm_plugins:pd_pulled_tokens_total") - before == length


def test_nixl_moves_the_bytes(pair):
    tokens, before = prompt(300, 3), bytes_moved(pair)
    assert pair.decoded(tokens, pair.prefilled(tokens)) == pair.colocated(tokens)
    # Keys and values of 300 tokens are 1 KiB each.
    until(lambda: bytes_moved(pair) - before >= 300 * 1024, 30)


def test_a_dead_prefill_instance_costs_a_prefill(pair):
    """Last: it does not come back."""
    tokens = prompt(200, 1)
    params, expected = pair.prefilled(tokens), pair.colocated(tokens)
    os.killpg(pair.prefill.process.pid, signal.SIGKILL)
    pair.prefill.process.wait()
    assert pair.decoded(tokens, params) == expected

"""Two ranks on one side, one on the other, in both directions; each instance has both roles."""

import contextlib
import http.client
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import models
from tests.pd_servers import Pair, instances, nothing_more, prompt
from vllm_plugins.kv_connectors.pd.reference import KEY

pytestmark = [pytest.mark.serve, pytest.mark.alone]

# Ranks spin for each other: on busy cores vLLM's own steps stall for many seconds.
OPTIONS = "role=both,min_pull_tokens=1,stream_layers=true,lease_s=30,read_timeout_s=120"
PLUGIN = ("--plugin", f"pd:{OPTIONS}")


@pytest.fixture(scope="module")
def instances_of_two_and_one():
    with instances(
        models.tiny_llama(), (*PLUGIN, "--tensor-parallel-size", "2"), PLUGIN
    ) as servers:
        yield servers


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["two to one", "one to two"])
def test_ranks_take_their_heads(instances_of_two_and_one, order):
    hands_over(Pair(*(instances_of_two_and_one[i] for i in order)), order[0])


def hands_over(pair: Pair, seed: int) -> None:
    """Check hand-overs from two ranks to one, or with a seed of 1 from one to two."""
    for length in (33, 300, 900):
        tokens = prompt(length, seed)
        params = pair.prefilled(tokens)
        assert len(params[KEY]["peers"]) == 2 - seed
        assert pair.decoded(tokens, params) == pair.colocated(tokens)
    long = prompt(700, 2 + seed)
    assert pair.streamed(long, params[KEY]["peers"]) == pair.colocated(long)
    assert pair.recomputed() == {}, pair.complaints()
    pair.await_empty(32)


def test_a_killed_decode_instance_leaves_nothing_behind(instances_of_two_and_one):
    """Last: the decode instance does not come back."""
    pair = Pair(*instances_of_two_and_one)
    prompts = [prompt(400 + 60 * i, 5) for i in range(6)]

    def read(tokens: list[int]) -> None:
        params = pair.prefilled(tokens)
        with contextlib.suppress(OSError, http.client.HTTPException):
            pair.decoded(tokens, params, max_tokens=500)

    before = pair.decode.metric("vllm_plugins:pd_received_bytes_total")
    expired = pair.prefill.metric("vllm_plugins:pd_expired_leases_total")
    with nothing_more(pair.prefill), ThreadPoolExecutor(3) as pool:
        readers = list(map(pool.submit, [read] * 6, prompts))
        while pair.decode.metric("vllm_plugins:pd_received_bytes_total") == before:
            assert not all(reader.done() for reader in readers), pair.recomputed()
        os.killpg(pair.decode.process.pid, signal.SIGKILL)
        pair.decode.process.wait()
        for reader in readers:
            reader.result()
        assert pair.prefill.metric("vllm_plugins:pd_held_blocks")
        pair.await_empty(32)
    assert pair.prefill.metric("vllm_plugins:pd_expired_leases_total") > expired
    assert pair.prefilled(prompts[0])

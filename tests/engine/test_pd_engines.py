"""Prompts from one real engine to another: tokens and the KV's bytes are one engine's.

Servers show the same of tokens (`tests/serve/test_serve_pd.py`); here both sides' KV can be read,
and `test_v2_handover.py` has both engines on model runner V2.
"""

import os
import uuid

import pytest

from tests.models import tiny_llama
from tests.pd_engine import BLOCK, instance, prefill_engine
from tests.pd_servers import prompt
from vllm_plugins.kv_connectors.pd.reference import KEY

pytestmark = pytest.mark.engine

# Within a block, at its end, and several chunks with a partial last block.
LENGTHS = (2, 32, 33, 150)


@pytest.fixture(scope="module")
def prefill():
    with prefill_engine(tiny_llama(layers=2), "pd:role=prefill,stream_layers=true") as engine:
        yield engine


@pytest.fixture(scope="module")
def decode():
    plugin = "pd:role=decode,min_pull_tokens=1,waiting_block_prop_threshold=1.0"
    with instance(tiny_llama(layers=2), plugin) as engine:
        yield engine


def alone(decode, tokens):
    """Return what the decode engine generates where it computes the prompt itself."""
    return decode.greedy(tokens, cache_salt="alone")


def test_both_engines_have_the_runner_that_was_asked_for(prefill, decode):
    wanted = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
    assert prefill.has_v2 is decode.has_v2 is wanted


@pytest.mark.parametrize("length", LENGTHS)
def test_a_pulled_prompt_is_the_prefill_engines(prefill, decode, length):
    tokens = prompt(length, 1)
    prefill.order(tokens)
    kept, before = prefill.answer(), decode.metric("pulled_tokens_total")
    answer = decode.greedy(tokens, params=kept["params"])
    assert decode.metric("pulled_tokens_total") - before == length
    assert decode.pulled == kept["digests"]
    assert answer == alone(decode, tokens)


def test_only_what_is_missing_is_pulled(prefill, decode):
    start = prompt(2 * BLOCK + 5, 2)
    decode.greedy(start)
    tokens = start + prompt(40, 3)
    prefill.order(tokens)
    params, before = prefill.answer()["params"], decode.metric("pulled_tokens_total")
    assert decode.greedy(tokens, params=params) == alone(decode, tokens)
    assert decode.metric("pulled_tokens_total") - before == len(tokens) - 2 * BLOCK


def test_layers_come_while_another_request_generates(prefill, decode):
    """And no step of it waits for them: a step rests only if it has nothing to compute."""
    prefill.order(prompt(3, 4))
    params = prefill.answer()["params"]
    decode.greedy(prompt(3, 4), params=params)
    tokens, other, name = prompt(170, 5), prompt(40, 6), uuid.uuid4().hex
    reference = {"version": 1, "transfer_id": name, "peers": params[KEY]["peers"]}
    decode.add(tokens, params={"do_remote_prefill": True, KEY: reference})
    decode.run(until=lambda: decode.connector.admission.accepted)
    decode.add(other, 20)
    rests = decode.rests
    generated = decode.answer()
    # Its pull waits for a prompt of that name meanwhile.
    assert decode.connector.admission.accepted and decode.rests == rests
    prefill.order(tokens, **{KEY: {"transfer_id": name, "stream": True}})
    streamed = decode.answer()
    assert decode.rests > rests
    assert decode.pulled == prefill.answer()["digests"]
    assert streamed == alone(decode, tokens)
    assert generated[:8] == alone(decode, other)
    assert decode.metric("recomputed_total") == 0

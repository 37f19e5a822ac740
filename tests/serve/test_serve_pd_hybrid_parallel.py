"""A hybrid model between two instances of two tensor ranks: each rank pulls its half of a state."""

import pytest

from tests.pd_servers import PREFILL, Pair, instances, post, prompt
from tests.tiny_lfm2 import greedy, tiny_lfm2
from vllm_plugins.kv_connectors.pd.reference import KEY

pytestmark = [pytest.mark.serve, pytest.mark.alone]

TWO = ("--tensor-parallel-size", "2")
# Four ranks spin for each other on whatever cores there are: on few, vLLM's own steps stall for
# many seconds now and then, without a plug-in too.
PATIENT = "lease_s=60,read_timeout_s=120"
PULLED = "vllm_plugins:pd_pulled_tokens_total"


@pytest.fixture(scope="module")
def pair():
    with instances(
        tiny_lfm2(),
        ("--plugin", f"pd:role=prefill,stream_layers=true,{PATIENT}", *TWO),
        ("--plugin", f"pd:role=decode,min_pull_tokens=1,{PATIENT}", *TWO),
    ) as (prefill, decode):
        yield Pair(prefill, decode)


def test_answers_are_the_models(pair):
    for length in (2, 33, 129, 400):
        tokens, before = prompt(length), pair.decode.metric(PULLED)
        params = pair.prefilled(tokens)
        assert len(params[KEY]["peers"]) == 2
        assert pair.decoded(tokens, params) == greedy(tokens, 8)
        # The last token is computed where the answer is.
        assert pair.decode.metric(PULLED) - before == length - 1
    long = prompt(500, 1)
    assert pair.streamed(long, params[KEY]["peers"]) == greedy(long, 8)
    assert pair.recomputed() == {}, pair.complaints()
    pair.await_empty(62)


def test_a_first_token_of_the_prefill_instance_goes_on(pair):
    tokens = prompt(150, 2)
    asked = PREFILL | {KEY: {"continued": True}}
    answer = post(pair.prefill.url, pair.body(tokens, 1, kv_transfer_params=asked))
    first = answer["choices"][0]["token_ids"]
    rest = pair.decoded(tokens + first, answer["kv_transfer_params"], max_tokens=7)
    assert first + rest == greedy(tokens, 8)
    assert pair.recomputed() == {}, pair.complaints()

"""A hybrid model of convolutions and attention: prefilled on one real server, decoded on another.

States stand at one position, so what is handed over must end where the other side goes on.
"""

import json
import os
import signal
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from openai import OpenAI

from tests.pd_servers import PREFILL, Pair, instances, post, prompt, routed, through
from tests.tiny_lfm2 import greedy, tiny_lfm2
from tests.unit.wire_ends import wait_until
from tests.wire_faults import DOWN, Fault, FaultyProxy
from vllm_plugins.kv_connectors.pd.reference import KEY
from vllm_plugins.wire.address import Address

pytestmark = pytest.mark.serve

LEASE_S, READ_TIMEOUT_S = 5.0, 1.5
BLOCK, CHUNK = 32, 128
# Around blocks and chunks, on both sides of them.
LENGTHS = (1, 2, 31, 32, 33, 34, 64, 127, 128, 129, 130, 257, 900)
CONTINUED = {KEY: {"continued": True}}
PULLED = "vllm_plugins:pd_pulled_tokens_total"


@pytest.fixture(scope="module")
def pair():
    lease = f"lease_s={LEASE_S},read_timeout_s={READ_TIMEOUT_S}"
    with instances(
        tiny_lfm2(),
        ("--plugin", f"pd:role=prefill,stream_layers=true,{lease}"),
        ("--plugin", f"pd:role=decode,min_pull_tokens=1,{lease}"),
    ) as (prefill, decode):
        yield Pair(prefill, decode)


@pytest.fixture(scope="module")
def peers(pair):
    """Where the prefill instance serves its blocks, as any answer of it says."""
    params = pair.prefilled(prompt(40, 1000))
    pair.decoded(prompt(40, 1000), params)
    return params[KEY]["peers"]


@pytest.mark.parametrize("length", LENGTHS)
def test_answers_are_the_models(pair, length):
    tokens = prompt(length)
    before = pair.decode.metric(PULLED)
    answer = pair.decoded(tokens, pair.prefilled(tokens))
    # The last token is computed where the answer is.
    assert pair.decode.metric(PULLED) - before == length - 1
    assert answer == greedy(tokens, 8)
    assert answer == pair.colocated(tokens)


@pytest.mark.parametrize("length", LENGTHS)
def test_a_first_token_of_the_prefill_instance_goes_on(pair, length):
    tokens = prompt(length, 1)
    params = PREFILL | CONTINUED
    answer = post(pair.prefill.url, pair.body(tokens, 1, kv_transfer_params=params))
    first = answer["choices"][0]["token_ids"]
    before = pair.decode.metric(PULLED)
    rest = pair.decoded(tokens + first, answer["kv_transfer_params"], max_tokens=7)
    assert pair.decode.metric(PULLED) - before == length
    assert first + rest == greedy(tokens, 8)


@pytest.mark.parametrize("length", [1, 32, 33, 200])
def test_a_state_behind_the_last_token_is_not_taken_back(pair, length):
    """Whoever asked for a token to continue behind, and then does not, has the prompt anew."""
    tokens, reason = prompt(length, 2), {"reason": "position"}
    before = pair.decode.metric("vllm_plugins:pd_recomputed_total", **reason)
    assert pair.decoded(tokens, pair.prefilled(tokens, **CONTINUED)) == pair.colocated(tokens)
    assert pair.decode.metric("vllm_plugins:pd_recomputed_total", **reason) == before + 1


def test_an_answer_of_several_tokens_is_not_handed_over(pair):
    """Its state would stand behind them."""
    params = PREFILL | CONTINUED
    answer = post(pair.prefill.url, pair.body(prompt(50, 3), 4, kv_transfer_params=params))
    assert answer["kv_transfer_params"] is None
    assert answer["choices"][0]["token_ids"] == greedy(prompt(50, 3), 4)


@pytest.mark.parametrize(
    ("shared", "more"), [(1, 40), (32, 1), (32, 2), (100, 33), (192, 1), (192, 200), (256, 2)]
)
def test_what_the_decode_instance_has_of_attention_is_not_pulled_again(pair, shared, more):
    start = prompt(shared, 4)
    pair.decoded(start, None)
    tokens = start + prompt(more, 5 + shared)
    before = pair.decode.metric(PULLED)
    assert pair.decoded(tokens, pair.prefilled(tokens)) == pair.colocated(tokens)
    pulled = pair.decode.metric(PULLED) - before
    # Nothing to pull is left where a prefix ends with the last block.
    assert pulled in (0, len(tokens) - 1 - shared // BLOCK * BLOCK)
    assert pulled or (len(tokens) - 1) // BLOCK == shared // BLOCK


def test_a_conversation_goes_on_from_what_both_sides_have(pair):
    """Each turn's prompt is all that was said, so both sides hit what they have of it."""
    said = prompt(150, 6)
    for turn in range(4):
        answer = pair.decoded(said, pair.prefilled(said), max_tokens=40)
        assert answer == greedy(said, 40)
        said = said + answer + prompt(17, 7 + turn)


def test_many_at_once(pair):
    prompts = [prompt(20 + 37 * i, 20) for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        params = list(pool.map(pair.prefilled, prompts))
        answers = list(pool.map(pair.decoded, prompts, params))
    assert answers == [greedy(tokens, 8) for tokens in prompts]


@pytest.mark.parametrize("length", [2, 33, 129, 700])
def test_attention_leaves_while_the_prompt_is_computed_and_the_state_at_its_end(
    pair, peers, length
):
    name = "vllm_plugins:pd_sent_bytes_total"
    early = pair.prefill.metric(name, when="early")
    late = pair.prefill.metric(name, when="late")
    tokens = prompt(length, 30)
    assert pair.streamed(tokens, peers) == pair.colocated(tokens)
    # A worker's counts come with its engine's next steps.
    wait_until(lambda: pair.prefill.metric(name, when="late") > late)
    if length == 700:
        assert pair.prefill.metric(name, when="early") > early


# Four states of 2 x 256 numbers follow the attention's KV: what is damaged is either.
FAULTS = {
    "reset in the blocks": Fault("reset", at=60_000, direction=DOWN),
    "closed in the blocks": Fault("truncate", at=250_000, direction=DOWN),
    "stalled in the blocks": Fault("stall", at=60_000, direction=DOWN),
    "bit flipped early": Fault("flip", at=3_000, direction=DOWN, bit=7),
    "bit flipped in the middle": Fault("flip", at=150_000, direction=DOWN, bit=7),
    "bit flipped late": Fault("flip", at=520_000, direction=DOWN, bit=7),
}


@pytest.mark.parametrize("hit", [0, 96])
@pytest.mark.parametrize("name", FAULTS)
def test_a_failed_pull_is_computed_anew_from_where_a_state_is(pair, peers, name, hit):
    start = prompt(hit, 40) if hit else []
    if hit:
        pair.decoded(start, None)
    tokens = start + prompt(270, 41 + 2 * list(FAULTS).index(name) + bool(hit))
    recomputed = pair.decode.metric("vllm_plugins:pd_recomputed_total")
    with FaultyProxy(Address.from_json(peers[0]["address"]), FAULTS[name]) as proxy:
        answer = pair.decoded(tokens, through(pair.prefilled(tokens), proxy.address))
        assert proxy.accepted
    assert answer == greedy(tokens, 8)
    assert pair.decode.metric("vllm_plugins:pd_recomputed_total") == recomputed + 1


def test_aborted_at_every_state(pair):
    """Clients leave after more and more time, on both sides; no block is left over."""

    def leave(url: str, body: dict, after_s: float) -> None:
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            urllib.request.urlopen(request, timeout=after_s).read()
        except (TimeoutError, urllib.error.URLError):
            return

    prompts = [prompt(100 + 61 * i, 60) for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        for i, tokens in enumerate(prompts):
            body = pair.body(tokens, 1, kv_transfer_params=PREFILL)
            pool.submit(leave, pair.prefill.url, body, 0.004 * (1 + i))
        references = list(pool.map(pair.prefilled, prompts))
        for i, (tokens, params) in enumerate(zip(prompts, references, strict=True)):
            body = pair.body(tokens, 200, kv_transfer_params=params)
            pool.submit(leave, pair.decode.url, body, 0.008 * (1 + 3 * i))
    pair.await_empty(LEASE_S + 5)
    assert pair.decoded(prompts[3], pair.prefilled(prompts[3])) == pair.colocated(prompts[3])


WAYS = {
    "decode": ("--first-token", "decode"),
    "prefill": ("--first-token", "prefill"),
    "layers": ("--stream-layers",),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_router_serves_one_engines_text(pair, way, tmp_path):
    with routed(pair, tmp_path / "router.log", *WAYS[way]) as url:
        _serves_one_engines_text(pair, url, seed=70 + list(WAYS).index(way))


def _serves_one_engines_text(pair: Pair, url: str, seed: int) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)

    def ask(tokens: list[int]) -> str:
        fixed = {"model": pair.prefill.model, "max_tokens": 8, "temperature": 0}
        more = {"ignore_eos": True}
        stream = client.completions.create(prompt=tokens, stream=True, extra_body=more, **fixed)
        return "".join(chunk.choices[0].text for chunk in stream)

    prompts = [prompt(length, seed) for length in (1, 2, 32, 33, 129, 400)]
    before = pair.decode.metric(PULLED)
    # The first tells the router where the workers are.
    answers = [ask(prompts[-1])]
    with ThreadPoolExecutor(5) as pool:
        answers += pool.map(ask, prompts[:-1])
    assert pair.decode.metric(PULLED) - before >= 399 + 128
    for tokens, answer in zip([prompts[-1], *prompts[:-1]], answers, strict=True):
        expected = post(pair.prefill.url, pair.body(tokens, 8))["choices"][0]["text"]
        assert answer == expected
    pair.await_empty(LEASE_S + 2)


def test_nothing_went_wrong_unseen(pair):
    """Of the reasons to compute a prompt anew, only those that were provoked."""
    provoked = {"position", "local", "gone", "closed", "timeout", "damaged", "cancelled"}
    unasked = [line for line in pair.complaints() if "connector.py" in line]
    assert set(pair.recomputed()) <= provoked, unasked


def test_a_killed_prefill_instance_costs_its_prompts_a_prefill(pair):
    """Last: the prefill instance does not come back."""
    prompts = [prompt(150, 80 + i) for i in range(4)]
    references = [pair.prefilled(tokens) for tokens in prompts]
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(pair.decoded, t, r) for t, r in zip(prompts, references, strict=True)
        ]
        os.killpg(pair.prefill.process.pid, signal.SIGKILL)
        pair.prefill.process.wait()
        assert [answer.result() for answer in answers] == [greedy(t, 8) for t in prompts]
    answers = [pair.decoded(t, r) for t, r in zip(prompts, references, strict=True)]
    assert answers == [greedy(t, 8) for t in prompts]

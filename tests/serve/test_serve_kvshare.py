"""A real server with KVShare: answers over HTTP, what is counted, who hangs up, what is refused."""

import subprocess
import sys
import time
from contextlib import closing

import pytest

from tests.models import make_engine, tiny_llama
from tests.serving import SERVE_DEFAULTS, served

pytestmark = pytest.mark.serve

NEUTRAL = "kvshare:recompute_min=1,recompute_max=1,fix_tokens_per_step=128"
TOKENS = 12
DOCS = [[(7 * i + 31 * j + i * j) % 500 for i in range(160)] for j in range(1, 4)]
ORDERS = ((0, 1, 2), (2, 0, 1), (1, 2, 0))
PROMPTS = [
    [*(t for doc in order for t in DOCS[doc]), 3, 5, 7 + n] for n, order in enumerate(ORDERS)
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama(layers=4)


@pytest.fixture(scope="module")
def stock(model):
    """Stock vLLM's greedy answers, from an engine in this process."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    with make_engine(model) as llm:
        inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = [llm.generate([one], params, use_tqdm=False)[0] for one in inputs]
    return [output.outputs[0].text for output in outputs]


@pytest.fixture(scope="module")
def server(model, stock):
    arguments = ("--block-size", "32", "--max-num-seqs", "8", "--max-num-batched-tokens", "256")
    with served(model, *arguments, "--plugin", NEUTRAL) as running:
        yield running


def ask(server, prompt, *, stream=False, tokens=TOKENS, **extra):
    return server.openai.completions.create(
        model=server.model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        stream=stream,
        extra_body={"ignore_eos": True, **extra},
    )


def answer(server, prompt, **arguments) -> str:
    return ask(server, prompt, **arguments).choices[0].text


def counter(server, name, **labels) -> float:
    try:
        return server.metric(f"vllm_plugins:kvshare_{name}", **labels)
    except KeyError:
        # A series with a label of its own appears with its first value.
        return 0.0


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.1)


def is_idle(server):
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return all(server.metric(name) == 0 for name in names)


def test_documents_in_another_order_are_reused_and_answers_are_stocks(server, stock):
    assert answer(server, PROMPTS[0]) == stock[0]
    assert server.metric("vllm_plugins:active", plugin="kvshare") == 1
    assert counter(server, "stored_tokens") >= sum(map(len, DOCS))
    assert counter(server, "requests_total") == 0
    assert answer(server, PROMPTS[1]) == stock[1]
    assert counter(server, "requests_total", kind="blend") == 1
    pieces = [piece.choices[0].text for piece in ask(server, PROMPTS[2], stream=True)]
    assert "".join(pieces) == stock[2]
    assert sum(map(bool, pieces)) > 3
    assert counter(server, "requests_total", kind="blend") == 2
    reused = counter(server, "reused_tokens_total", kind="approximate")
    assert reused > 0.8 * 2 * sum(map(len, DOCS))
    assert counter(server, "recomputed_tokens_total") == reused


def test_a_request_may_keep_out_of_it_and_a_salt_is_a_domain(server, stock):
    before = counter(server, "requests_total")
    out = {"kv_transfer_params": {"kvshare": {"reuse": False, "store": False}}}
    assert answer(server, PROMPTS[1], cache_salt="x", **out) == stock[1]
    assert answer(server, PROMPTS[1], cache_salt="y") == stock[1]
    assert answer(server, PROMPTS[2], cache_salt="x") == stock[2]
    assert counter(server, "requests_total") == before
    assert answer(server, PROMPTS[2], cache_salt="y") == stock[2]
    assert counter(server, "requests_total") == before + 1


def test_a_client_that_hangs_up_leaves_nothing_behind(server, stock):
    wait_until(lambda: is_idle(server))
    for salt, read in (("a", 3), ("b", 0)):
        answer(server, PROMPTS[0], tokens=1, cache_salt=salt)
        with closing(ask(server, PROMPTS[1], stream=True, tokens=1400, cache_salt=salt)) as stream:
            assert len([next(iter(stream)) for _ in range(read)]) == read
    wait_until(lambda: is_idle(server))
    assert answer(server, PROMPTS[1], cache_salt="a") == stock[1]
    assert answer(server, PROMPTS[2], cache_salt="b") == stock[2]


@pytest.mark.parametrize("value", [7, "yes", {"reuse": "maybe"}, None])
def test_odd_wishes_change_nothing(server, stock, value):
    assert answer(server, PROMPTS[0], kv_transfer_params={"kvshare": value}) == stock[0]


def test_what_cannot_work_is_refused_in_one_line(model):
    command = [sys.executable, "-m", "vllm_plugins.bench.vllm_command", "serve", str(model)]
    done = subprocess.run(
        [*command, *SERVE_DEFAULTS, "--plugin", "kvshare:check_layer=3"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.rstrip().splitlines()[-1] == (
        "vllm: error: --plugin kvshare: check_layer=3: leaves no layer to save work in; the model "
        "has 4; choose at most 2"
    )

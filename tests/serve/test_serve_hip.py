"""HiP attention in a real server: mixed lengths, streams, hang-ups, refusals."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.models import tiny_llama
from tests.serving import ProcessFailedError, served

pytestmark = pytest.mark.serve

OPTIONS = {
    "name": "hip",
    "dense_layers": [0],
    "sink_tokens": 8,
    "window_tokens": 64,
    "overlap_tokens": 16,
    "stages": [{"chunk": 32, "keep": 128}, {"chunk": 8}],
    "top_k": 32,
    "refresh": [8, 4],
    "dense_threshold": 100,
}
TOKENS = 48


@pytest.fixture(scope="module")
def server():
    arguments = ("--max-num-batched-tokens", "256", "--plugin", json.dumps(OPTIONS))
    with served(tiny_llama(layers=4), *arguments) as running:
        yield running


def prompt_of(i):
    length = (1, 60, 101, 300, 900)[i % 5]
    return [(11 * i + j * j) % 500 for j in range(length)]


def completion(server, prompt, **extra):
    return server.openai.completions.create(
        model=server.model, prompt=prompt, max_tokens=TOKENS, temperature=0,
        extra_body={"ignore_eos": True}, **extra,
    )  # fmt: skip


def test_concurrent_answers_are_those_of_each_request_alone(server):
    alone = [completion(server, prompt_of(i)).choices[0].text for i in range(15)]

    def again(i):
        if i % 3 == 0:
            stream = completion(server, prompt_of(i % 15), stream=True)
            return "".join(piece.choices[0].text for piece in stream)
        if i % 7 == 0:
            with completion(server, prompt_of(i % 15), stream=True) as stream:
                next(stream)
            return None
        return completion(server, prompt_of(i % 15)).choices[0].text

    with ThreadPoolExecutor(30) as pool:
        together = list(pool.map(again, range(45)))
    for i, text in enumerate(together):
        assert text is None or text == alone[i % 15]


def test_drafts_are_verified(server):
    """In a server of its own: the drafter imports numba, which vLLM's next engine trips over."""
    wanted = [completion(server, prompt_of(i)).choices[0].text for i in (0, 5)]
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    arguments = ("--plugin", json.dumps(OPTIONS), "--speculative-config", json.dumps(drafts))
    with served(tiny_llama(layers=4), *arguments) as drafting:
        # Short ones are dense; of a long one the drafts share a selection.
        assert [completion(drafting, prompt_of(i)).choices[0].text for i in (0, 5)] == wanted
        assert len(completion(drafting, prompt_of(3)).choices[0].text.split()) == TOKENS
        assert drafting.metric("vllm:spec_decode_num_drafts_total") > 0
        assert drafting.metric("vllm_plugins:hip_decode_queries_total", kind="sparse") > 0


def test_metrics_are_served(server):
    assert server.metric("vllm_plugins:active", plugin="hip") == 1
    assert server.metric("vllm_plugins:hip_decode_queries_total", kind="sparse") > 100
    assert server.metric("vllm_plugins:hip_decode_queries_total", kind="dense") > 100
    assert server.metric("vllm_plugins:hip_reused_selections_total") > 100


def test_ranks_select_alike_in_a_batch_and_alone_and_one_counts():
    arguments = ("--plugin", json.dumps(OPTIONS), "--tensor-parallel-size", "2")
    numbers = [3, 4, 8]
    with served(tiny_llama(layers=4), *arguments) as running:
        alone = [completion(running, prompt_of(i)).choices[0].text for i in numbers]
        with ThreadPoolExecutor(3) as pool:
            texts = pool.map(lambda i: completion(running, prompt_of(i)).choices[0].text, numbers)
        assert list(texts) == alone
        # The first token of an answer is its prompt's.
        decoded = running.metric("vllm_plugins:hip_decode_queries_total", kind="sparse")
        assert decoded == 2 * len(numbers) * (TOKENS - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("hip:top_k=100", "--plugin hip: top_k=100 is not a multiple of the last chunk=8"),
        ("hip:phase=both", "--plugin hip: phase: unknown option; did you mean 'phases'?"),
        ("hip:dense_layers=[9]", "--plugin hip: layer 9: the model has 4 layers; drop it"),
    ],
)
def test_bad_options_are_refused_in_a_line(options, message):
    with (
        pytest.raises(ProcessFailedError) as error,
        served(tiny_llama(layers=4), "--plugin", options),
    ):
        pass
    assert message in str(error.value)
    assert "Traceback" not in str(error.value)

"""ZipCache in a real server: mixed lengths, streams, hang-ups, refusals."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.models import tiny_llama
from tests.serving import ProcessFailedError, served

pytestmark = pytest.mark.serve

TOKENS = 80


@pytest.fixture(scope="module")
def server():
    # Prompts fit into one chunk; prefix caching would let a request read what another has sealed.
    arguments = ("--plugin", "zipcache", "--block-size", "64", "--no-enable-prefix-caching")
    with served(tiny_llama(layers=4), "--max-num-batched-tokens", "16384", *arguments) as running:
        yield running


def prompt_of(i):
    length = (1, 60, 130, 300, 900)[i % 5]
    return [(11 * i + j * j) % 500 for j in range(length)]


def completion(server, prompt, **extra):
    return server.openai.completions.create(
        model=server.model, prompt=prompt, max_tokens=TOKENS, temperature=0,
        extra_body={"ignore_eos": True}, **extra,
    )  # fmt: skip


def test_concurrent_answers_are_those_of_each_request_alone(server):
    alone = [completion(server, prompt_of(i)).choices[0].text for i in range(10)]

    def again(i):
        if i % 3 == 0:
            stream = completion(server, prompt_of(i % 10), stream=True)
            return "".join(piece.choices[0].text for piece in stream)
        if i % 7 == 0:
            with completion(server, prompt_of(i % 10), stream=True) as stream:
                next(stream)
            return None
        return completion(server, prompt_of(i % 10)).choices[0].text

    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(again, range(30)))
    for i, text in enumerate(together):
        assert text is None or text == alone[i % 10]


def test_metrics_are_served(server):
    assert server.metric("vllm_plugins:active", plugin="zipcache") == 1
    assert server.metric("vllm_plugins:zipcache_sealed_blocks_total", reason="prompt") > 10
    assert server.metric("vllm_plugins:zipcache_sealed_blocks_total", reason="decode") > 10
    # 4 layers, 2 heads of 32 channels: a sixth of 512 bytes and more for ranges.
    assert 0 < server.metric("vllm_plugins:zipcache_token_bytes") < 4 * 2 * 256 / 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zipcache", "--block-size", "16"), "--plugin zipcache with --block-size 16"),
        (("zipcache:bits=3/2",), "--plugin zipcache: bits=3/2"),
        (("zipcache", "hip"), "is an attention backend, and so is"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_line(arguments, message):
    with (
        pytest.raises(ProcessFailedError) as error,
        served(tiny_llama(layers=4), "--plugin", *arguments),
    ):
        pass
    assert message in str(error.value)
    assert "Traceback" not in str(error.value)

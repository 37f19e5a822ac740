"""SpecVLM in a real server: images over HTTP, streams, hang-ups, broken and oversized pictures."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.engine.specvlm_engine import drafter, picture, target
from tests.models import tiny_llama
from tests.png import huge_png
from tests.serving import ProcessFailedError, served

pytestmark = pytest.mark.serve

TOKENS = 24
COMMON = ("--block-size", "32", "--max-num-seqs", "8", "--limit-mm-per-prompt", '{"image": 2}')


def encoded(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(seed: int, size: int | None = None) -> bytes:
    image, out = picture(seed), io.BytesIO()
    (image.resize((size, size)) if size else image).save(out, "PNG")
    return out.getvalue()


# Made before a server runs: it hangs up on a client that is silent for so long.
HUGE = huge_png()


def message(i: int) -> list[dict[str, object]]:
    """Return a question with none, one or two images."""
    parts: list[dict[str, object]] = [{"type": "text", "text": f"t{10 + i % 40} t{7 + i % 9}"}]
    for number in range(i % 3):
        url = encoded(png(10 * i + number))
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": " ".join(f"t{5 + (i * j) % 50}" for j in range(20))})
    return parts


def answer(server, content, **extra):
    return server.openai.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": content}], max_tokens=TOKENS,
        temperature=0, extra_body={"ignore_eos": True}, **extra,
    )  # fmt: skip


def text(server, content) -> str:
    return answer(server, content).choices[0].message.content


@pytest.fixture(scope="module")
def plain():
    with served(target(), *COMMON) as server:
        return [text(server, message(i)) for i in range(9)]


@pytest.fixture(scope="module")
def server(plain):
    with served(target(), *COMMON, "--plugin", f"specvlm:model={drafter()}") as running:
        yield running


def test_concurrent_answers_are_the_targets(server, plain):
    def again(i):
        if i % 5 == 0:
            stream = answer(server, message(i % 9), stream=True)
            return "".join(piece.choices[0].delta.content or "" for piece in stream)
        if i % 7 == 0:
            with answer(server, message(i % 9), stream=True) as stream:
                next(stream)
            return None
        return text(server, message(i % 9))

    # One by one at first: where requests show a new image at once, vLLM's two caches of images may
    # differ for a moment, stock too, and it answers 500 and asks for the request again.
    assert [text(server, message(i)) for i in range(9)] == plain
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(again, range(36)))
    for i, got in enumerate(together):
        assert got is None or got == plain[i % 9]


def test_metrics_are_served(server):
    text(server, message(1))
    text(server, message(3))
    assert server.metric("vllm_plugins:active", plugin="specvlm") == 1
    assert server.metric("vllm_plugins:specvlm_draft_rows_total", state="dropped") > 100
    assert server.metric("vllm:spec_decode_num_draft_tokens_total") > 0


@pytest.mark.parametrize(
    "data", [b"no picture", png(1)[:200], b""], ids=["other", "truncated", "empty"]
)
def test_a_broken_picture_is_refused_and_the_server_goes_on(server, plain, data):
    content = [{"type": "image_url", "image_url": {"url": encoded(data)}}, *message(0)]
    with pytest.raises(openai.APIStatusError) as error:
        answer(server, content)
    assert 400 <= error.value.status_code < 500
    assert text(server, message(1)) == plain[1]


def test_an_oversized_picture_is_refused_and_the_server_goes_on(server, plain):
    """By vLLM itself, which calls it an error of its own and closes the connection behind it."""
    content = [{"type": "image_url", "image_url": {"url": encoded(HUGE)}}, *message(0)]
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.InternalServerError, match="400000000 pixels"),
    ):
        client.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": content}], max_tokens=1
        )
    assert text(server, message(1)) == plain[1]


def test_a_large_picture_is_an_image_like_others(server):
    """LLaVA's processor scales what it is given, whatever its size."""
    content = [{"type": "image_url", "image_url": {"url": encoded(png(1, 2000))}}, *message(0)]
    assert answer(server, content).usage.prompt_tokens == answer(
        server, [{"type": "image_url", "image_url": {"url": encoded(png(2))}}, *message(0)]
    ).usage.prompt_tokens  # fmt: skip


def test_more_pictures_than_allowed_are_refused(server, plain):
    content = [*message(2), *message(2)]
    with pytest.raises(openai.BadRequestError, match=r"(?i)at most 2 image"):
        answer(server, content)
    assert text(server, message(2)) == plain[2]


@pytest.mark.parametrize(
    ("model", "arguments", "words"),
    [
        (target, ("specvlm",), "--plugin specvlm: model"),
        (target, (f"specvlm:model={tiny_llama()}",), "no drafter of SpecVLM"),
        (tiny_llama, (f"specvlm:model={drafter()}",), "it takes no images"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_line(model, arguments, words):
    with (
        pytest.raises(ProcessFailedError) as error,
        served(model(), "--block-size", "32", "--plugin", *arguments),
    ):
        pass
    assert words in str(error.value)
    assert "Traceback" not in str(error.value)

"""Dynamic-LLaVA in a real server: images over HTTP, streams, hang-ups, bad images, refusals."""

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import openai
import pytest
from PIL import Image
from vision import tiny_llava

from tests.engine.dynamic_llava_engine import with_predictors
from tests.png import huge_png
from tests.serving import ProcessFailedError, served

pytestmark = pytest.mark.serve

PIXELS, TOKENS, BLOCK = 168, 144, 32
STORY = 600
"""Tokens of a long answer."""
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
# Made before a server runs: it hangs up on a client that is silent for so long.
HUGE = huge_png()
SCORER = "dynamic_llava:image_keep_rate=0.25,image_scorer=attention"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    return (
        *("--max-model-len", "1024", "--block-size", str(BLOCK), "--chat-template", str(template)),
        *("--limit-mm-per-prompt", json.dumps({"image": 3})),
        # Of a prompt in several steps, or found in the cache, the question is read in part only.
        *("--max-num-batched-tokens", "16384", "--no-enable-prefix-caching"),
    )


@pytest.fixture(scope="module")
def server(arguments):
    model = tiny_llava(layers=4, pixels=PIXELS)
    with served(model, *arguments, "--plugin", SCORER) as running:
        yield running


def url_of(data: bytes) -> dict:
    address = "data:image/png;base64," + base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": address}}


def picture(seed: int, size: int = PIXELS, cut: int | None = None) -> dict:
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "PNG")
    return url_of(data.getvalue()[:cut])


def content(i: int) -> list[dict]:
    """Text before, between and behind none to three images."""
    words = [f"t{10 + (7 * i + j) % 50}" for j in range(40)]
    parts = [{"type": "text", "text": " ".join(words[: 1 + i % 17])}]
    for j in range(i % 4):
        # No two requests show the same: vLLM, stock too, may answer 500 to one that shows an image
        # of which another has only just begun, and asks for it again.
        parts += [picture(4 * i + j), {"type": "text", "text": words[j]}]
    return [*parts, {"type": "text", "text": " ".join(words[20 : 25 + i % 9])}]


def chat(server, parts, **extra):
    more = {"ignore_eos": True} | extra.pop("extra_body", {})
    return server.openai.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": parts}],
        extra_body=more,
        **{"max_tokens": 12, "temperature": 0} | extra,
    )


def text(answer) -> str:
    return answer.choices[0].message.content


def dropped(server) -> float:
    return server.metric("vllm_plugins:dynamic_llava_image_tokens_total", fate="dropped")


def test_concurrent_answers_are_those_of_each_request_alone(server):
    alone = [text(chat(server, content(i))) for i in range(8)]
    assert len(set(alone)) > 2

    def again(i):
        if i % 3 == 0:
            stream = chat(server, content(i % 8), stream=True)
            return "".join(p.choices[0].delta.content or "" for p in stream if p.choices)
        if i % 7 == 0:
            with chat(server, content(i % 8), stream=True) as stream:
                next(stream)
            return None
        return text(chat(server, content(i % 8)))

    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(again, range(24)))
    for i, answer in enumerate(together):
        assert answer is None or answer == alone[i % 8]


def test_metrics_are_served(server):
    assert server.metric("vllm_plugins:active", plugin="dynamic_llava") == 1
    before, kept = dropped(server), "vllm_plugins:dynamic_llava_image_tokens_total"
    images = server.metric(kept, fate="kept")
    chat(server, [picture(50)])
    # One token of template text may stand before the image: of 144 tokens 36 are asked for.
    gained = dropped(server) - before
    assert gained in (64, 96)
    assert server.metric(kept, fate="kept") - images == TOKENS - gained


@pytest.mark.parametrize(
    "parts",
    [
        [url_of(b"this is no picture")],
        [url_of(b"")],
        [picture(61, cut=2000)],
        [picture(62 + i) for i in range(4)],
        # One of its own: vLLM takes notice of a picture before it refuses the prompt.
        [picture(66), {"type": "text", "text": "t7 " * 1000}],
    ],
    ids=["broken", "empty", "truncated", "too many", "too long"],
)
def test_bad_requests_are_answered_with_an_error_and_the_server_goes_on(server, parts):
    with pytest.raises(openai.BadRequestError):
        chat(server, parts)
    assert text(chat(server, content(5)))


def test_an_oversized_picture_is_refused_and_the_server_goes_on(server):
    """By vLLM itself, which calls it an error of its own and closes the connection behind it."""
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.InternalServerError, match="400000000 pixels"),
    ):
        client.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": [url_of(HUGE)]}], max_tokens=1
        )
    assert text(chat(server, content(5)))


def test_a_picture_of_another_size_is_scaled(server):
    before = dropped(server)
    assert text(chat(server, [picture(3, 2000)]))
    assert dropped(server) > before


def test_prompt_logprobs_are_refused(server):
    with pytest.raises(openai.BadRequestError, match="prompt_logprobs: image tokens that"):
        chat(server, [picture(77)], extra_body={"prompt_logprobs": 1})
    assert text(chat(server, content(5)))


def test_two_ranks_that_free_holes_answer_as_one_that_does_not(server, arguments):
    expected = [text(chat(server, content(i))) for i in range(8)]
    plugin = ("--plugin", f"{SCORER},free_hole_blocks=true", "--tensor-parallel-size", "2")
    with served(tiny_llava(layers=4, pixels=PIXELS), *arguments, *plugin) as two:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda i: text(chat(two, content(i))), range(8)))
        assert two.metric("vllm_plugins:dynamic_llava_pruned_steps_total") > 0
    assert answers == expected


def test_answers_that_are_forgotten_in_part(arguments, tmp_path):
    """Alone and together: what one request forgets is no other one's."""
    sizes = {"sparse_layer": 2, "d_model": 32, "nhead": 4, "dim_feedforward": 64, "num_layers": 1}
    model = with_predictors(tmp_path, sizes | {"image_keep_rate": 0.3, "text_keep_rate": 0.5})
    with served(model, *arguments, "--plugin", "dynamic_llava:text_keep=true") as forgetful:
        alone = [text(chat(forgetful, content(i))) for i in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda i: text(chat(forgetful, content(i))), range(4))) == alone
        assert len(set(alone)) > 1 and dropped(forgetful) > 0
    both = ("--plugin", "dynamic_llava:text_keep=true,free_hole_blocks=true")
    ranks = ("--tensor-parallel-size", "2")
    with served(model, *arguments, *both, *ranks) as two, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: text(chat(two, content(i))), range(4))) == alone
        most = while_telling(two)
        assert most.forgotten > BLOCK
        # A block has half of the layers there. The rate hides at least two blocks of the image;
        # the last one of all may have been taken for a token that is forgotten now.
        assert most.held <= 2 * -(-most.tokens // BLOCK) - 2 - most.forgotten // BLOCK + 1


class Seen(NamedTuple):
    """What a server shows while a long answer is told.

    Attributes:
        forgotten: Tokens known to be forgotten.
        tokens: Those of prompt and answer.
        held: KV blocks.
    """

    forgotten: int
    tokens: int
    held: int


def seen(server, since: int = 0) -> Seen:
    samples = server.metrics()
    found = {sample.name: sample.value for sample in samples}
    [config] = [x.labels for x in samples if x.name == "vllm:cache_config_info"]
    # One block is vLLM's own, for padding.
    held = found["vllm:kv_cache_usage_perc"] * (int(config["num_gpu_blocks"]) - 1)
    tokens = found["vllm:prompt_tokens_total"] + found["vllm:generation_tokens_total"]
    forgotten = found["vllm_plugins:dynamic_llava_forgotten_tokens"]
    return Seen(int(forgotten), int(tokens) - since, round(held))


def while_telling(server) -> Seen:
    """Return what is seen with the most tokens forgotten, the last of which may not be counted."""
    # The likeliest tokens are soon the same ones again and again, and those are kept; of these
    # the predictor drops about half.
    allowed = {"allowed_token_ids": list(range(10, 60))}
    options = {"temperature": 1, "seed": 0, "max_tokens": STORY, "extra_body": allowed}
    before, most = seen(server).tokens, Seen(0, 0, 0)
    with ThreadPoolExecutor(1) as pool:
        telling = pool.submit(chat, server, content(1), **options)
        while not telling.done():
            most = max(most, seen(server, before))
            # Telling needs the processor, too.
            time.sleep(0.1)
        assert telling.result()
    return most


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("dynamic_llava:image_keep_rate=2", "image_keep_rate=2: input should be less than or"),
        ("dynamic_llava:prune_layer=4,image_scorer=norm", "the model has 4 layers; choose one"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_line(arguments, plugin, message):
    with (
        pytest.raises(ProcessFailedError) as error,
        served(tiny_llava(layers=4, pixels=PIXELS), *arguments, "--plugin", plugin),
    ):
        pass
    assert message in str(error.value)
    assert "Traceback" not in str(error.value)

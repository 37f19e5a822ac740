"""Images through the router: encoded on one server, prefilled on a second, decoded on a third."""

import base64
import contextlib
import io
import json
import os
import random
import signal
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image
from vision import tiny_llava

from tests.pd_servers import PREFILL, Pair, instances, post, routed

pytestmark = pytest.mark.serve

TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """An encode, a prefill and a decode instance, and the router's address."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    common = ("--max-model-len", "1024", "--chat-template", str(template),
              "--limit-mm-per-prompt", json.dumps({"image": 8}))  # fmt: skip
    with instances(
        tiny_llava(),
        (*common, "--plugin", "epd:role=encode"),
        (*common, "--plugin", "epd:role=prefill", "pd:role=prefill,lease_s=5"),
        (*common, "--plugin", "epd:role=prefill", "pd:role=decode,min_pull_tokens=1,lease_s=5"),
    ) as (encode, prefill, decode):  # fmt: skip
        log = tmp_path_factory.mktemp("router") / "router.log"
        with routed(Pair(prefill, decode), log, "--encode", encode.url) as url:
            yield encode, prefill, decode, url


def picture(seed: int) -> str:
    draw = random.Random(seed)
    image = Image.new("RGB", (56, 56))
    image.putdata([tuple(draw.randrange(256) for _ in range(3)) for _ in range(56 * 56)])
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def body(model: str, *parts: int | str, **more: object) -> dict:
    """Return a chat request: numbers are pictures, texts are text."""
    content = [
        {"type": "image_url", "image_url": {"url": picture(part)}}
        if isinstance(part, int)
        else {"type": "text", "text": part}
        for part in parts
    ]
    return {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 8,
            "temperature": 0, "ignore_eos": True, **more}  # fmt: skip


def text(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


REQUESTS = {
    "no image": ("t7 t8 t9",),
    "one image": ("t7 t8", 1, "t9"),
    "the same image again": ("t9", 1, "t8"),
    "three images": (2, "t10 t11", 3, 4, "t12"),
    "an image twice": (5, "t13", 5),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_answers_are_one_servers(servers, name):
    _, prefill, decode, url = servers
    asked = body(prefill.model, *REQUESTS[name])
    expected = text(post(decode.url, asked, "/v1/chat/completions"))
    pulled = decode.metric("vllm_plugins:pd_pulled_tokens_total")
    assert text(post(url, asked, "/v1/chat/completions")) == expected
    assert decode.metric("vllm_plugins:pd_pulled_tokens_total") > pulled
    assert decode.metric("vllm_plugins:pd_recomputed_total") == 0
    # The prompt's KV is all that decode needs.
    assert decode.metric("vllm_plugins:epd_fetched_items_total") == 0


def test_each_image_travels_once(servers):
    _, prefill, decode, url = servers
    before = prefill.metric("vllm_plugins:epd_fetched_items_total")
    asked = body(prefill.model, "t20", 40, "t21", 41)
    answers = {text(post(url, asked, "/v1/chat/completions")) for _ in range(3)}
    assert answers == {text(post(decode.url, asked, "/v1/chat/completions"))}
    assert prefill.metric("vllm_plugins:epd_fetched_items_total") - before == 2


def test_many_at_once(servers):
    _, prefill, decode, url = servers
    asked = [body(prefill.model, "t7", i, "t8", i + 1, f"t{10 + i}") for i in range(60, 70)]
    expected = [text(post(decode.url, one, "/v1/chat/completions")) for one in asked]
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda one: post(url, one, "/v1/chat/completions"), asked))
    assert list(map(text, answers)) == expected


def test_a_broken_image_is_refused_and_the_servers_go_on(servers):
    _, prefill, _, url = servers
    asked = body(prefill.model, "t7", 1)
    asked["messages"][0]["content"][1]["image_url"]["url"] = "data:image/png;base64,AAAA"
    with pytest.raises(urllib.error.HTTPError) as error:
        post(url, asked, "/v1/chat/completions")
    assert 400 <= error.value.code < 500, error.value.read()
    assert text(post(url, body(prefill.model, "t7", 1), "/v1/chat/completions"))


def test_clients_that_leave_leave_nothing_behind(servers):
    _, prefill, decode, url = servers
    for i in range(8):
        asked = body(prefill.model, "t7", 80 + i, "t8", max_tokens=200, stream=True)
        # A stream that was faster than its client's patience is no JSON.
        with contextlib.suppress(TimeoutError, urllib.error.URLError, json.JSONDecodeError):
            post(url, asked, "/v1/chat/completions", timeout=0.05 * (1 + i))
    Pair(prefill, decode).await_empty(8)


def test_an_encode_instance_that_dies_after_prefill_costs_decode_nothing(servers):
    """The last test of this file, as it kills the encode instance."""
    encode, prefill, decode, _ = servers
    chat = "/v1/chat/completions"
    asked = body(prefill.model, "t7", 500, "t8", 501)
    expected = text(post(decode.url, asked, chat))
    for number, part in enumerate(asked["messages"][0]["content"]):
        if part["type"] != "text":
            # A name of its own, so that decode has neither the image nor its KV.
            part["uuid"] = f"of-the-dead-{number}"
    asked["ec_transfer_params"] = post(encode.url, asked | {"max_tokens": 1}, chat)[
        "ec_transfer_params"
    ]
    held = post(prefill.url, asked | {"max_tokens": 1, "kv_transfer_params": PREFILL}, chat)
    os.killpg(encode.process.pid, signal.SIGKILL)
    encode.process.wait(10)
    pulled = decode.metric("vllm_plugins:pd_pulled_tokens_total")
    asked["kv_transfer_params"] = held["kv_transfer_params"]
    assert text(post(decode.url, asked, chat)) == expected
    assert decode.metric("vllm_plugins:pd_pulled_tokens_total") > pulled
    assert decode.metric("vllm_plugins:epd_missing_items_total") == 0

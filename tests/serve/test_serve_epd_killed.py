"""An encode instance is killed under load: every image is encoded elsewhere, nothing stays."""

import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from vision import tiny_llava

from tests.pd_fleet import kill
from tests.pd_servers import instances, nothing_more, post, router, stopped, until
from tests.serve.test_serve_epd import TEMPLATE, body, text
from vllm_plugins.kv_connectors.epd.fetcher import IDLE_S

pytestmark = pytest.mark.serve

CHAT = "/v1/chat/completions"
PUBLISHED = "vllm_plugins:epd_published_items_total"
# An instance that is stopped for some seconds is not down yet.
PATIENT = ("--retries", "2", "--probe-s", "0.5", "--fail-threshold", "20")


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two encode instances, one that prefills and decodes, and the router's address."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    common = ("--max-model-len", "1024", "--chat-template", str(template),
              "--limit-mm-per-prompt", json.dumps({"image": 8}))  # fmt: skip
    encode = (*common, "--plugin", "epd:role=encode")
    with instances(
        tiny_llava(),
        encode,
        encode,
        (*common, "--plugin", "epd:role=prefill,on_missing=encode_local"),
    ) as (first, second, prefill):
        log = tmp_path_factory.mktemp("router") / "router.log"
        urls = ("--encode", first.url, second.url, "--prefill", prefill.url)
        with router(log, *urls, *PATIENT) as url:
            yield first, second, prefill, url


def test_an_encode_instance_that_is_killed_costs_nobody_an_answer(servers):
    """Some of its images are encoded and wait to be fetched, others are being encoded."""
    first, second, prefill, url = servers
    asked = [body(prefill.model, "t7", 200 + 2 * i, "t8", 201 + 2 * i) for i in range(24)]
    expected = [text(post(prefill.url, one, CHAT)) for one in asked]
    warm = [body(prefill.model, "t7", 400 + i) for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        # As many connections of the router as there will be: it keeps them for its own questions.
        list(pool.map(lambda one: post(url, one, CHAT), warm))
    before = first.metric(PUBLISHED)
    # The warm-up's connections would hide those that stay open to the killed one.
    time.sleep(IDLE_S + 1)
    with nothing_more(prefill, 30), nothing_more(second, 30), ThreadPoolExecutor(24) as pool:
        with stopped(prefill):
            answers = [pool.submit(post, url, one, CHAT) for one in asked[:12]]
            until(lambda: first.metric(PUBLISHED) > before, 30)
            with stopped(first):
                answers += [pool.submit(post, url, one, CHAT) for one in asked[12:]]
                until(lambda: _instance(url, first.url)["requests"] >= 1, 30)
                traces = kill(first)
        assert [text(answer.result()) for answer in answers] == expected
        until(lambda: _instance(url, first.url)["state"] == "down", 30)
        for i in range(4):
            one = body(prefill.model, "t9", 300 + i)
            assert text(post(url, one, CHAT)) == text(post(prefill.url, one, CHAT))
    assert prefill.metric("vllm_plugins:epd_missing_items_total") > 0
    # Its embeddings were in memory without a name: nothing of them is left on the host.
    until(lambda: not traces.left(), 15)


def _instance(url: str, address: str) -> dict:
    with urllib.request.urlopen(f"{url}/instances", timeout=10) as answer:
        shown = json.load(answer)["instances"]
    return next(one for one in shown if one["url"] == address)

"""An encode instance is killed under load: every image is encoded elsewhere, nothing stays."""

import contextlib
import json
import os
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from vision import tiny_llava

from tests.pd_servers import instances, post, router
from tests.serve.test_serve_epd import TEMPLATE, body, text

pytestmark = pytest.mark.serve


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
        with router(log, *urls, "--retries", "2") as url:
            yield first, second, prefill, url


def memory_files(pid: int) -> int:
    """Return how many nameless memory files a process and its children hold."""
    parent, count = psutil.Process(pid), 0
    for process in (parent, *parent.children(recursive=True)):
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            # Others come and go meanwhile.
            with contextlib.suppress(FileNotFoundError):
                count += "memfd:" in str(link.readlink())
    return count


def test_a_killed_encode_instance_costs_nobody_an_answer(servers):
    first, second, prefill, url = servers
    asked = [body(prefill.model, "t7", 200 + 2 * i, "t8", 201 + 2 * i) for i in range(24)]
    expected = [text(post(prefill.url, one, "/v1/chat/completions")) for one in asked]
    # New to every cache, but the same model's answer.
    post(url, body(prefill.model, "t7", 190), "/v1/chat/completions")
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda one: post(url, one, "/v1/chat/completions"), asked)
        time.sleep(0.3)
        os.killpg(first.process.pid, signal.SIGKILL)
        assert [text(answer) for answer in answers] == expected
    deadline = time.monotonic() + 10
    while first.process.poll() is None or _instance(url, first.url)["state"] != "down":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Its embeddings were in memory without a name: nothing of them is left on the host.
    assert not [path for path in Path("/dev/shm").iterdir() if "epd" in path.name]
    before = memory_files(prefill.process.pid)
    for i in range(4):
        one = body(prefill.model, "t9", 300 + i)
        local = text(post(prefill.url, one, "/v1/chat/completions"))
        assert text(post(url, one, "/v1/chat/completions")) == local
    assert memory_files(prefill.process.pid) <= before
    assert second.process.poll() is None


def _instance(url: str, address: str) -> dict:
    with urllib.request.urlopen(f"{url}/instances", timeout=10) as answer:
        shown = json.load(answer)["instances"]
    return next(one for one in shown if one["url"] == address)

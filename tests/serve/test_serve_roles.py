"""Instances change their role under load, within two seconds, and answers stay one engine's."""

import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.pd_servers import Pair, instances, prompt, router

pytestmark = [pytest.mark.serve, pytest.mark.alone]
LONGEST_SWITCH_S = 2.0


@pytest.fixture(scope="module")
def servers(tiny_llama, tmp_path_factory):
    """Three instances of either role, and a router that started with one for decode."""
    either = ("--max-num-seqs", "2", "--plugin", "pd:role=both,min_pull_tokens=1,lease_s=10")
    with instances(tiny_llama, either, either, either) as (first, second, decode):
        log = tmp_path_factory.mktemp("router") / "router.log"
        soft = ("--roles", "soft", "--interval-s", "1", "--cooldown-s", "1", "--drain-s", "5")
        urls = ("--prefill", first.url, second.url, "--decode", decode.url)
        with router(log, *urls, *soft) as url:
            yield first, decode, url


def shown(url: str) -> dict[str, tuple[str, str]]:
    """Return role and state of each instance."""
    with urllib.request.urlopen(f"{url}/instances", timeout=10) as answer:
        listed = json.load(answer)["instances"]
    return {one["id"]: (one["role"], one["state"]) for one in listed}


def ask(url: str, model: str, tokens: list[int]) -> str:
    body = {"model": model, "prompt": tokens, "max_tokens": 120, "temperature": 0,
            "ignore_eos": True}  # fmt: skip
    data = json.dumps(body).encode()
    request = urllib.request.Request(
        f"{url}/v1/completions", data, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["text"]


def test_a_prefill_instance_helps_where_decode_has_a_queue(servers):
    first, decode, url = servers
    prompts = [prompt(40 + i, 90) for i in range(36)]
    before = shown(url)
    assert sorted(role for role, _ in before.values()) == ["decode", "prefill", "prefill"]
    # When an instance was last seen before its change, and first seen after it.
    unchanged: dict[str, float] = {}
    switched: dict[str, float] = {}
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = [pool.submit(ask, url, first.model, tokens) for tokens in prompts]
        while not all(answer.done() for answer in answers):
            asked = time.monotonic()
            for name, (role, state) in shown(url).items():
                if role != before[name][0]:
                    switched.setdefault(name, time.monotonic())
                elif state == "up" and name not in switched:
                    unchanged[name] = asked
            time.sleep(0.02)
        texts = [answer.result() for answer in answers]
    assert switched, "no instance changed its role"
    seconds = {name: at - unchanged[name] for name, at in switched.items()}
    print("changes of role, in s at most:", {name: round(s, 2) for name, s in seconds.items()})
    assert max(seconds.values()) <= LONGEST_SWITCH_S
    expected = [ask(decode.url, first.model, tokens) for tokens in prompts]
    assert texts == expected
    Pair(first, decode).await_empty(12)

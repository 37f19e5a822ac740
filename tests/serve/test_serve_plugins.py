"""A real server with two plug-ins: what clients get, what goes wrong, and what `/metrics` says."""

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving import WORKER_PROCESS, served

pytestmark = pytest.mark.serve

# The default target is met by any machine, so that misses come from the requests' own targets.
PLUGINS = ("--plugin", "sarathi:tbt_slo_ms=60000,min_budget=16", "--plugin", "spf:gamma=15")
WORDS = "t5 t17 t5 t80 t81 t82"


@pytest.fixture(scope="module")
def server(tiny_llama):
    arguments = ("--max-num-seqs", "16", "--max-num-batched-tokens", "256", *PLUGINS)
    with served(tiny_llama, *arguments, environment=WORKER_PROCESS) as running:
        yield running


def completion(server, prompt, tokens=12, **extra):
    answer = server.openai.completions.create(
        model=server.model,
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        extra_body={"ignore_eos": True, **extra},
    )
    return answer.choices[0].text.split()


def prompt_of(i: int) -> list[int]:
    """A prompt of 1 to some 400 tokens; every third shares a long prefix with others."""
    length = (1, 7, 40, 130, 400)[i % 5]
    return [(j if i % 3 == 0 else 3 * i + j) % 500 for j in range(length)]


def counter(server, name, **labels):
    return server.metric(f"vllm_plugins:{name}", **labels)


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.1)


def is_idle(server):
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return all(server.metric(name) == 0 for name in names)


def test_completion_chat_and_streams_agree(server):
    expected = completion(server, WORDS)
    assert len(expected) == 12
    chat = {
        "model": server.model,
        "messages": [{"role": "user", "content": WORDS}],
        "max_tokens": 12,
        "temperature": 0,
        "extra_body": {"ignore_eos": True},
    }
    whole = server.openai.chat.completions.create(**chat)
    assert whole.choices[0].message.content.split() == expected
    pieces = list(server.openai.chat.completions.create(**chat, stream=True))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text.split() == expected
    assert sum(bool(piece.choices[0].delta.content) for piece in pieces) > 3


def test_concurrent_requests_get_what_they_get_alone(server):
    alone = [completion(server, prompt_of(i)) for i in range(15)]
    with ThreadPoolExecutor(30) as pool:
        together = list(pool.map(lambda i: completion(server, prompt_of(i % 15)), range(45)))
    assert together == alone * 3
    wait_until(lambda: is_idle(server))


def test_requests_bring_their_own_targets(server):
    expected = completion(server, WORDS)
    before = {n: counter(server, f"sarathi_{n}_slo_misses_total") for n in ("tbt", "ttft")}

    def missed():
        return {
            n: counter(server, f"sarathi_{n}_slo_misses_total") - count
            for n, count in before.items()
        }

    generous = {"vllm_xargs": {"tbt_slo_ms": 3_600_000, "ttft_slo_ms": 3_600_000}}
    assert completion(server, WORDS, **generous) == expected
    assert missed() == {"tbt": 0, "ttft": 0}
    assert completion(server, WORDS, vllm_xargs={"tbt_slo_ms": 0.001}) == expected
    assert missed() == {"tbt": len(expected) - 1, "ttft": 0}
    assert completion(server, WORDS, vllm_xargs={"ttft_slo_ms": "0.001"}) == expected
    assert missed() == {"tbt": len(expected) - 1, "ttft": 1}


@pytest.mark.parametrize("target", ["fast", -1, 0, "nan", "inf", 1e9, [1, 2]])
def test_malformed_targets_are_served_and_counted(server, target):
    before = counter(server, "sarathi_invalid_targets_total")
    assert len(completion(server, WORDS, vllm_xargs={"tbt_slo_ms": target})) == 12
    assert counter(server, "sarathi_invalid_targets_total") == before + 1


def test_aborted_streams_leave_nothing_behind(server):
    def start_and_leave(i):
        stream = server.openai.completions.create(
            model=server.model,
            prompt=prompt_of(i),
            max_tokens=1500,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        with stream:
            return [next(stream) for _ in range(3)]

    finished = server.metric("vllm:request_success_total", finished_reason="length")
    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(start_and_leave, range(12)))
    wait_until(lambda: is_idle(server))
    # A busy server may notice a hang-up only after the answer is complete.
    ended = server.metric("vllm:request_success_total", finished_reason="length") - finished
    assert ended < 12
    assert len(completion(server, WORDS)) == 12


def test_bad_requests_are_refused_and_the_server_goes_on(server):
    def status(**body):
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            json.dumps({"model": server.model, "prompt": WORDS, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status
        except urllib.error.HTTPError as error:
            return error.code

    assert status(max_tokens=-1) == 400
    assert status(prompt=[1] * 5000) == 400
    assert status(temperature="warm") == 400
    assert status(vllm_xargs="tbt_slo_ms=1") == 400
    assert status(model="nobody") == 404
    assert status(max_tokens=3) == 200


def test_metrics_move_and_follow_the_exposition_format(server):
    completion(server, prompt_of(4))
    samples = [s for s in server.metrics() if s.name.startswith("vllm_plugins:")]
    assert all(s.labels["engine"] == "0" and s.labels["model_name"] for s in samples)
    assert {s.labels["plugin"]: s.value for s in samples if "plugin" in s.labels} == {
        "sarathi": 1,
        "spf": 1,
    }
    counts = {s.name: s.value for s in samples if s.name.endswith("_count")}
    infinite = {s.name: s.value for s in samples if s.labels.get("le") == "+Inf"}
    assert counts.keys() >= {
        f"vllm_plugins:sarathi_{name}_count"
        for name in ("step_token_budget", "measured_step_seconds", "predicted_step_seconds")
    }
    assert all(infinite[n.replace("_count", "_bucket")] == value for n, value in counts.items())
    assert counts["vllm_plugins:sarathi_step_token_budget_count"] >= 2
    assert counter(server, "sarathi_measured_step_seconds_sum") > 0
    assert 0.05 < counter(server, "sarathi_cost_model_correction") < 20
    steps = counts["vllm_plugins:sarathi_measured_step_seconds_count"]
    completion(server, WORDS, tokens=5)
    assert counter(server, "sarathi_measured_step_seconds_count") >= steps + 5


def test_every_family_has_type_and_help(server):
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    for kind in ("HELP", "TYPE"):
        described = [li.split()[2] for li in lines if li.startswith(f"# {kind} vllm_plugins:")]
        assert len(described) == len(set(described)) > 10


def test_several_api_servers_show_one_engines_metrics(tiny_llama):
    with served(tiny_llama, "--api-server-count", "2", *PLUGINS, ready_s=360) as server:
        for i in range(8):
            completion(server, prompt_of(i))
        # Every scrape is a connection of its own, which either server may get.
        scrapes = [
            {
                (s.name, *sorted(s.labels.items())): s.value
                for s in server.metrics()
                if s.name.startswith("vllm_plugins:") and not s.name.endswith("_created")
            }
            for _ in range(12)
        ]
        assert all(scrape == scrapes[0] for scrape in scrapes)
        assert counter(server, "active", plugin="sarathi") == 1
        assert counter(server, "sarathi_measured_step_seconds_count") > 8

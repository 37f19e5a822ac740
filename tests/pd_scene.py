"""A router in front of a fleet, and requests in every phase of their life."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.pd_fleet import (
    ACCEPTED_BLOCKS,
    LEASE_S,
    STALLED_BYTES,
    TOKENS_OF_A_BLOCK,
    Member,
    await_empty,
    stalled,
)
from tests.pd_servers import (
    nothing_more,
    post,
    prompt,
    router,
    router_process,
    stopped,
    until,
)
from tests.wire_faults import DOWN

# Prompts of a scene are in nobody's prefix cache.
_SCENES = itertools.count(1)
# An instance that is stopped for some seconds is not down.
OPTIONS = ("--retries", "3", "--probe-s", "0.5", "--lease-s", str(LEASE_S),
           "--fail-threshold", "20")  # fmt: skip
# How many requests, of how many tokens, with an answer of how many. Short prompts wait for no pull.
PHASES = {
    "pulled": (8, 1600, 8), "generating": (4, 40, 1700), "computing": (6, 1632, 8),
    "held": (4, 640, 1400),
}  # fmt: skip


class Scene:
    """Requests on their way through a router, by the phase in which a kill will find them.

    Attributes:
        path: Where the requests go.
        phases: How many there are in which phase, of how many tokens, with an answer of how many.
    """

    path = "/v1/completions"
    phases = PHASES

    def __init__(
        self, prefill: list[Member], decode: list[Member], url: str, pool: ThreadPoolExecutor
    ) -> None:
        self.prefill, self.decode, self.url, self.pool = prefill, decode, url, pool
        self.answers: dict[str, list[Future[list[int]]]] = {}
        self._begun = threading.Semaphore(0)
        self._first_seed = 100 * next(_SCENES)

    def ask(self, phase: str) -> None:
        """Send the requests of a phase."""
        self.answers[phase] = [self.pool.submit(self._read, one) for one in self._bodies(phase)]

    def _bodies(self, phase: str, **more: object) -> list[dict[str, object]]:
        count, length, wanted = self.phases[phase]
        fixed = {"model": self.decode[0].server.model, "temperature": 0, "ignore_eos": True,
                 "max_tokens": wanted, "return_token_ids": True, **more}  # fmt: skip
        seeds = range(self._first_seed, self._first_seed + count)
        return [{**self._prompt(phase, length, seed), **fixed} for seed in seeds]

    def _prompt(self, phase: str, length: int, seed: int) -> dict[str, object]:
        """Return the prompt of a request, as its body names it."""
        return {"prompt": prompt(length, seed)}

    def _read(self, body: dict[str, object]) -> list[int]:
        """Return a streamed answer's tokens.

        Raises:
            OSError: It broke off.
        """
        data = json.dumps({**body, "stream": True}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + self.path, data, headers)
        found: list[int] = []
        with urllib.request.urlopen(request, timeout=120) as answer:
            for line in filter(bytes.strip, answer):
                text = line.decode().removeprefix("data: ").strip()
                if text == "[DONE]":
                    return found
                begun, choices = len(found) > 1, json.loads(text).get("choices")
                if choices is None:
                    raise OSError(text)
                found += [token for one in choices for token in one.get("token_ids") or []]
                if len(found) > 1 and not begun:
                    self._begun.release()
        raise OSError("the answer broke off")

    def await_begun(self, count: int) -> None:
        """Wait until so many more answers have their second token, which decode instances make."""
        for _ in range(count):
            assert self._begun.acquire(timeout=60)

    def expected(self, phase: str, engine: Member) -> list[list[int]]:
        """Return what one engine alone answers, which computes the prompts anew."""
        bodies = self._bodies(phase, cache_salt="alone")
        answers = self.pool.map(lambda body: post(engine.server.url, body, self.path), bodies)
        return [answer["choices"][0]["token_ids"] for answer in answers]

    def requests_at(self, member: Member) -> int:
        """Return the requests that the router has open at an instance."""
        with urllib.request.urlopen(f"{self.url}/instances", timeout=10) as answer:
            shown = json.load(answer)["instances"]
        return int(next(x["requests"] for x in shown if x["url"] == member.server.url))

    def metric(self, name: str, **labels: str) -> float:
        """Return a metric of the router."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
        return sum(s.value for s in samples if s.name == f"vllm_plugins:router_{name}"
                   and labels.items() <= s.labels.items())  # fmt: skip


@contextlib.contextmanager
def routed(
    prefill: list[Member], decode: list[Member], log: Path, *options: str,
    kind: type[Scene] = Scene,
) -> Iterator[Scene]:  # fmt: skip
    """Run a router in front of instances, for scenes of a kind."""
    urls = [one.server.url for one in prefill], [one.server.url for one in decode]
    words = ("--prefill", *urls[0], "--decode", *urls[1], *OPTIONS, *options)
    at_once = sum(count for count, _, _ in kind.phases.values())
    with ThreadPoolExecutor(at_once) as pool, router(log, *words) as url:
        yield kind(prefill, decode, url, pool)


@contextlib.contextmanager
def in_every_phase(scene: Scene, *, stop_prefill: bool = False) -> Iterator[None]:
    """Bring requests into every phase at the first prefill and the first decode instance.

    With ``stop_prefill`` the first prefill instance is stopped too, and computes none of them.
    """
    with pulled_and_generating(scene), contextlib.ExitStack() as stack:
        stack.enter_context(computing(scene))
        if not stop_prefill:
            stack.close()
        yield


@contextlib.contextmanager
def pulled_and_generating(scene: Scene) -> Iterator[None]:
    """Let pulls stall amid their blocks while others wait for theirs, are held, or generate.

    The decode instance is stopped for the length of the block.
    """
    source, reader = scene.prefill[0], scene.decode[0]
    with stalled([source]):
        before = source.proxy.carried[DOWN]
        scene.ask("pulled")
        until(lambda: reader.metric("accepted_blocks") >= ACCEPTED_BLOCKS, 60)
        until(lambda: reader.metric("queued") >= 1, 60)
        until(lambda: source.proxy.carried[DOWN] - before >= 2 * STALLED_BYTES, 60)
        held = 3 * scene.phases["pulled"][1] / TOKENS_OF_A_BLOCK
        until(lambda: source.metric("held_blocks") >= held, 60)
        scene.ask("generating")
        scene.await_begun(len(scene.answers["generating"]))
        # On a busy machine their answers could end before the block does.
        with stopped(reader.server):
            yield


@contextlib.contextmanager
def computing(scene: Scene) -> Iterator[None]:
    """Give the first prefill instance prompts, among others; it goes on when the block ends."""
    source, *others = scene.prefill
    before = scene.requests_at(source)
    with stopped(source.server):
        # Of two that compute meanwhile the one with less to do would be asked alone. They go on at
        # once, for those who are to help out are to be reached.
        with stopped(*(one.server for one in others)):
            scene.ask("computing")
            until(lambda: scene.requests_at(source) > before, 30)
        yield


@contextlib.contextmanager
def nothing_of_it_left(survivors: Sequence[Member]) -> Iterator[None]:
    """Check that the instances hold no more than before, and no block or lease at all."""
    with contextlib.ExitStack() as stack:
        for one in survivors:
            stack.enter_context(nothing_more(one.server, LEASE_S + 15))
        yield
        await_empty(survivors, LEASE_S + 5)


def kill_router(scene: Scene) -> None:
    """Kill the router amid all answers; whoever waits for one hears that there will be none."""
    answers = [answer for of in scene.answers.values() for answer in of]
    assert not any(one.done() for one in answers)
    process = router_process(scene.url)
    process.kill()
    process.wait(10)
    for one in answers:
        assert isinstance(one.exception(), OSError | http.client.HTTPException)


def serves_again(
    survivors: Sequence[Member], folder: Path, *options: str, kind: type[Scene] = Scene
) -> None:
    """Check that a new router in front of the same instances gives the right answers."""
    source, reader = survivors
    with routed([source], [reader], folder / "fresh.log", *options, kind=kind) as fresh:
        fresh.ask("pulled")
        answers = [answer.result() for answer in fresh.answers["pulled"]]
        assert answers == fresh.expected("pulled", source)

"""kill -9 of a prefill instance whose prompts have images, with requests in every phase.

The phases are those of `test_serve_pd_hostile.py`, and one more: prompts of some are computed up to
an image that is not encoded yet.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from vision import PATCHES, tiny_llava

from tests.pd_fleet import LEASE_S, Fleet, kill
from tests.pd_scene import (
    PHASES,
    Scene,
    compute,
    nothing_of_it_left,
    pulled_and_generating,
    routed,
)
from tests.pd_servers import COMMON, nothing_more, post, stopped, until
from tests.serve.test_serve_epd import body
from tests.serving import Served, served

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1200)]

CHAT = "/v1/chat/completions"
# Each part in its place: where a template takes the content whole, vLLM puts pictures before it.
TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }} {% else %}<image> {% endif %}"
    "{% endfor %}{% endfor %}"
)
PHASES_WITH_IMAGES = ("pulled", "generating", "awaiting")
EARLY = "vllm_plugins:epd_early_prefill_tokens_total"
IMAGES, ITEM_BYTES = 8, PATCHES * 128 * 4
# What an encode instance keeps for requests; it holds no more while they are under their leases.
ENCODE_LEASE_S, ITEMS = 10.0, 64
ENCODE = (f"epd:role=encode,lease_s={ENCODE_LEASE_S},fetch_timeout_s=9,"
          f"tokens_per_block={PATCHES},arena_bytes={ITEMS * ITEM_BYTES}")  # fmt: skip
# The encode instance is stopped for some seconds, and is not down.
PATIENT = ("--fail-threshold", "20")


class PictureScene(Scene):
    """Requests with text before and behind a picture, except those that are being computed."""

    path = CHAT
    phases = PHASES | {"awaiting": (4, 700, 8)}

    def _prompt(self, phase: str, length: int, seed: int) -> dict[str, object]:
        draw = random.Random(f"{phase} {seed}").randrange
        words = [f"t{draw(5, 60)}" for _ in range(length)]
        picture = (seed * 10 + list(self.phases).index(phase),)
        if phase not in PHASES_WITH_IMAGES:
            return {"messages": body("", " ".join(words))["messages"]}
        before, behind = words[PATCHES:-8], words[-8:]
        return {"messages": body("", " ".join(before), *picture, " ".join(behind))["messages"]}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Arguments of every instance."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(TEMPLATE)
    return ("--chat-template", str(template), "--limit-mm-per-prompt",
            json.dumps({"image": IMAGES}))  # fmt: skip


@pytest.fixture(scope="module")
def fleet(words: tuple[str, ...]) -> Iterator[Fleet]:
    """Instances of either role, which take embeddings from elsewhere."""
    with contextlib.ExitStack() as stack:
        yield Fleet(tiny_llava(positions=2048), stack, "epd:role=prefill", words=words)


@pytest.fixture(scope="module")
def encode(words: tuple[str, ...]) -> Iterator[Served]:
    """The encode instance."""
    with served(tiny_llava(positions=2048), *COMMON, *words, "--plugin", ENCODE) as server:
        yield server


def test_a_killed_prefill_instance_costs_nobody_an_answer(fleet, encode, tmp_path):
    victim, second, third = fleet.members()
    options = ("--encode", encode.url, *PATIENT)
    with routed([second], [third], tmp_path / "warm.log", *options, kind=PictureScene) as warm:
        warm.ask("awaiting")
        assert [x.result() for x in warm.answers["awaiting"]] == warm.expected("awaiting", second)
    log = tmp_path / "router.log"
    with (
        nothing_of_it_left([second, third]),
        nothing_more(encode, LEASE_S + 15),
        routed([victim, second], [third], log, *options, kind=PictureScene) as scene,
    ):
        with pulled_and_generating(scene), stopped(encode):
            await_pictures(scene)
            compute(scene)
            traces = kill(victim.server)
        answers = {phase: [one.result() for one in of] for phase, of in scene.answers.items()}
        assert answers == {one: scene.expected(one, second) for one in answers}
        # What it held, the decode instance computed, whose images it had to fetch for that.
        assert scene.metric("retries_total", role="prefill")
        assert third.metric("recomputed_total") >= 3
    until(lambda: not traces.left(), 15)
    time.sleep(ENCODE_LEASE_S)
    assert all_room_is_there(encode)


def await_pictures(scene: Scene) -> None:
    """Let prompts be computed up to their pictures while nobody encodes these."""
    source = scene.prefill[0]
    before = source.server.metric(EARLY)
    scene.ask("awaiting")
    until(lambda: source.server.metric(EARLY) > before, 60)


def all_room_is_there(encode: Served) -> bool:
    """Return whether as many pictures as the arena has room for are encoded without waiting."""
    name = "vllm_plugins:epd_deferred_requests_total"
    before, seeds = encode.metric(name), random.SystemRandom().sample(range(10**6), ITEMS)
    groups = [seeds[i : i + IMAGES] for i in range(0, ITEMS, IMAGES)]
    with ThreadPoolExecutor(len(groups)) as pool:
        bodies = [body(encode.model, *group, max_tokens=1) for group in groups]
        for answer in pool.map(lambda one: post(encode.url, one, CHAT), bodies):
            assert len(answer["ec_transfer_params"]) == IMAGES
    return encode.metric(name) == before

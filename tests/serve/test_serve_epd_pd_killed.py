"""kill -9 of router, prefill and decode, with requests with images in every phase.

The phases are those of `test_serve_pd_hostile.py`, and two more: the images of some are encoded and
not fetched yet, and prompts of some are computed up to an image that is not encoded yet.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from vision import PATCHES, tiny_llava

from tests.pd_fleet import LEASE_S, Fleet, Member, kill
from tests.pd_scene import (
    PHASES,
    Scene,
    computing,
    kill_router,
    nothing_of_it_left,
    pulled_and_generating,
    routed,
    serves_again,
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
PHASES_WITH_IMAGES = ("pulled", "generating", "encoded", "awaiting")
EARLY = "vllm_plugins:epd_early_prefill_tokens_total"
PUBLISHED = "vllm_plugins:epd_published_items_total"
IMAGES, ITEM_BYTES = 8, PATCHES * 128 * 4
# What an encode instance keeps for requests; it holds no more while they are under their leases.
ENCODE_LEASE_S, ITEMS = 10.0, 64
ENCODE = (f"epd:role=encode,lease_s={ENCODE_LEASE_S},fetch_timeout_s=9,"
          f"tokens_per_block={PATCHES},arena_bytes={ITEMS * ITEM_BYTES}")  # fmt: skip


class PictureScene(Scene):
    """Requests with text before and behind a picture, except those that are being computed.

    Those of "encoded" begin with it, so that nothing of them is computed before it is there.
    """

    path = CHAT
    phases = PHASES | {"encoded": (4, 140, 8), "awaiting": (4, 700, 8)}

    def _prompt(self, phase: str, length: int, seed: int) -> dict[str, object]:
        draw = random.Random(f"{phase} {seed}").randrange
        words = [f"t{draw(5, 60)}" for _ in range(length)]
        picture = (seed * 10 + list(self.phases).index(phase),)
        if phase not in PHASES_WITH_IMAGES:
            return {"messages": body("", " ".join(words))["messages"]}
        words = words[PATCHES:]
        place = 0 if phase == "encoded" else len(words) - 8
        before, behind = words[:place], words[place:]
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


def test_a_killed_router_leaves_nothing_behind(fleet, encode, tmp_path):
    source, reader, _ = fleet.members()
    survivors, options = [source, reader], ("--encode", encode.url)
    warm(survivors, tmp_path, *options)
    log = tmp_path / "router.log"
    with (
        nothing_of_it_left(survivors),
        nothing_more(encode, LEASE_S + 15),
        routed([source], [reader], log, *options, kind=PictureScene) as scene,
    ):
        with in_every_phase(scene, encode):
            kill_router(scene)
        serves_again(survivors, tmp_path, *options, kind=PictureScene)
        time.sleep(ENCODE_LEASE_S)
        assert all_room_is_there(encode)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_killed_instance_costs_nobody_an_answer(fleet, encode, role, tmp_path):
    victim, second, third = fleet.members()
    prefill, decode = {"prefill": ([victim, second], [third]),
                       "decode": ([second], [victim, third])}[role]  # fmt: skip
    options = ("--encode", encode.url)
    warm([second, third], tmp_path, *options)
    log = tmp_path / "router.log"
    with (
        nothing_of_it_left([second, third]),
        nothing_more(encode, LEASE_S + 15),
        routed(prefill, decode, log, *options, kind=PictureScene) as scene,
    ):
        with in_every_phase(scene, encode):
            traces = kill(victim.server)
        answers = {phase: [one.result() for one in of] for phase, of in scene.answers.items()}
        assert answers == {one: scene.expected(one, second) for one in answers}
        if role == "prefill":
            # What it held, the decode instance computed, whose images it had to fetch for that.
            assert scene.metric("retries_total", role="prefill")
            assert third.metric("recomputed_total") >= 3
        else:
            # Prompts with images are asked for again as a whole.
            assert scene.metric("retries_total", role="decode") > scene.metric("resumed_total") >= 1
    until(lambda: not traces.left(), 15)
    time.sleep(ENCODE_LEASE_S)
    assert all_room_is_there(encode)


def warm(members: Sequence[Member], folder: Path, *options: str) -> None:
    """Have connections between instances, which are kept, before they are counted."""
    source, reader = members
    with routed([source], [reader], folder / "warm.log", *options, kind=PictureScene) as scene:
        scene.ask("awaiting")
        answers = [answer.result() for answer in scene.answers["awaiting"]]
        assert answers == scene.expected("awaiting", source)


@contextlib.contextmanager
def in_every_phase(scene: Scene, encode: Served) -> Iterator[None]:
    """Bring requests into every phase; encode and prefill instances are stopped by then."""
    with pulled_and_generating(scene), encoded(scene, encode):
        await_pictures(scene)
        with computing(scene):
            yield


@contextlib.contextmanager
def encoded(scene: Scene, encode: Served) -> Iterator[None]:
    """Have pictures encoded that cannot be fetched, as the encode instance is stopped by then."""
    with contextlib.ExitStack() as stack:
        with stopped(*(one.server for one in scene.prefill)):
            before, wanted = encode.metric(PUBLISHED), scene.phases["encoded"][0]
            scene.ask("encoded")
            until(lambda: encode.metric(PUBLISHED) >= before + wanted, 60)
            stack.enter_context(stopped(encode))
        yield


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

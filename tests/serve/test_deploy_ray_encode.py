"""A deployment on a real Ray cluster with encode instances, of which one is killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from vision import tiny_llava

from tests.pd_servers import COMMON, post
from tests.ray_rig import NEEDS_RAY, SECONDS, Deployed, alive, busy, deploying, metric, wait_for
from tests.serve.test_serve_epd import TEMPLATE, body, text
from vllm_plugins.deploy.router_admin import seen
from vllm_plugins.routing import Role

pytestmark = [pytest.mark.serve, pytest.mark.slow, NEEDS_RAY]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """Two encode instances and one that prefills and decodes, behind a router."""
    folder = tmp_path_factory.mktemp("deploy")
    template = folder / "chat.jinja"
    template.write_text(TEMPLATE)
    images = json.dumps({"image": 8})
    serve_args = [*COMMON, "--max-model-len", "1024", "--chat-template", str(template),
                  "--limit-mm-per-prompt", images]  # fmt: skip
    roles = ["--encode", "2", "--decode", "0"]
    with deploying(tiny_llava(), folder, roles, serve_args) as made:
        wait_for(lambda: len(made.up(Role.ENCODE)) == 2)
        yield made


def test_an_encode_instance_that_is_killed_costs_nobody_an_answer(deployed: Deployed) -> None:
    (engine,) = deployed.up(Role.PREFILL)
    asked = [body(deployed.model, "t7", 200 + 2 * i, "t8", 201 + 2 * i) for i in range(16)]
    victim, other = deployed.up(Role.ENCODE)
    server, published = deployed.server_of(victim), "vllm_plugins:epd_published_items_total"
    deployed.note_processes()
    of_it = [server, *server.children(recursive=True)]
    with ThreadPoolExecutor(8) as pool:
        # What it is asked now it never answers.
        os.killpg(server.pid, signal.SIGSTOP)
        answers = pool.map(lambda one: post(deployed.url, one, CHAT, SECONDS), asked)
        wait_for(busy(deployed, victim, 1))
        os.killpg(server.pid, signal.SIGKILL)
        found = [text(answer) for answer in answers]
    assert metric(other, published) > 0
    # By name: what the prefill instance would encode itself has another, and its own cache entry.
    assert found == [text(post(engine, one, CHAT)) for one in asked]
    wait_for(lambda: victim not in [one.url for one in seen(deployed.admin.status())])
    assert not any(map(alive, of_it))
    # Ray starts another one, which gets requests.
    wait_for(lambda: len(deployed.up(Role.ENCODE)) == 2)
    (new,) = set(deployed.up(Role.ENCODE)) - {other}
    for i in range(4):
        one = body(deployed.model, "t9", 300 + 2 * i, 301 + 2 * i)
        assert text(post(deployed.url, one, CHAT, SECONDS)) == text(post(engine, one, CHAT))
    assert metric(new, published) > 0

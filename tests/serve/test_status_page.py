"""The router's status page in a real browser, in front of the real `vllm-plugins route`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="vLLM, which brings aiohttp, is not installed")
import aiohttp
from aiohttp import web

from tests import browser
from tests.router_backends import MAX_MODEL_LEN, MODEL, FakeInstance
from vllm_plugins.bench.process import logged_process, stop_group
from vllm_plugins.bench.server import free_port

pytestmark = [
    pytest.mark.serve,
    pytest.mark.skipif(browser.program() is None, reason=browser.HOW_TO_GET),
]

DEADLINE_S = 180.0
QUICK = ("--probe-s", "0.2", "--fail-threshold", "2", "--metrics-s", "0.1", "--drain-s", "1")
KEY = "an operator's key of many characters"
EVIL = "<img src=x onerror=alert(1)><script>alert(2)</script>"
WATCH_SHIFTS = """
var shifted = 0;
new PerformanceObserver(list => list.getEntries().forEach(one => shifted += one.value))
  .observe({type: "layout-shift"});
"""
METRICS = """\
vllm:num_requests_running{{engine="0"}} {running}
vllm:num_requests_waiting{{engine="0"}} {waiting}
vllm:kv_cache_usage_perc{{engine="0"}} 0.375
vllm:cache_config_info{{block_size="32",engine="0",num_gpu_blocks="1200"}} 1
vllm_plugins:pd_held_blocks{{engine="0"}} 7
"""


@dataclass
class Routed:
    """A router's process and its page in a browser.

    Attributes:
        url: Of the router.
        tab: The browser's.
        session: A client's connections.
    """

    url: str
    tab: browser.Tab
    session: aiohttp.ClientSession

    def ask(self, model: str = MODEL) -> asyncio.Task[int]:
        """Send a request; the task returns the answer's status."""

        async def send() -> int:
            body = {"model": model, "prompt": "some words", "max_tokens": 3, "temperature": 0}
            async with self.session.post(f"{self.url}/v1/completions", json=body) as answer:
                await answer.read()
                return answer.status

        return asyncio.create_task(send())

    async def order(self, path: str) -> int:
        """Post an operator's order, and return the answer's status."""
        async with self.session.post(f"{self.url}/instances/{path}") as answer:
            return answer.status

    async def shows(self, instance: str, column: str, wanted: str) -> None:
        """Wait until the table has a text, units included."""
        await self.tab.until(
            f"""[...document.querySelectorAll("#instances tr")]
            .filter(row => row.firstChild.firstChild.textContent === "{instance}")
            .map(row => [...row.querySelector("[data-head='{column}']").children]
              .map(part => part.textContent).join(" ").trim())[0]""",
            wanted,
        )

    async def counts(self, title: str, wanted: str) -> None:
        """Wait until a tile has a number."""
        await self.tab.until(
            f"""[...document.querySelectorAll("#queues li")]
            .filter(tile => tile.firstChild.textContent === "{title}")
            .map(tile => tile.querySelector("b").textContent)[0]""",
            wanted,
        )

    async def holds(self, beginning: str) -> None:
        """Wait until what is said of the first lease begins so."""
        await self.tab.until(
            f"""[...document.querySelectorAll("#queues li")]
            .filter(tile => tile.firstChild.textContent === "KV held for decode")
            .some(tile => tile.lastChild.textContent.startsWith("{beginning}"))"""
        )

    async def says(self, beginning: str) -> None:
        """Wait until the line on top begins so."""
        await self.tab.until(
            f'document.getElementById("said").textContent.startsWith("{beginning}")'
        )

    async def told(self, text: str) -> None:
        """Wait until a change is in the list of changes."""
        await self.tab.until(
            f"""[...document.querySelectorAll("#news li span")]
            .some(line => line.textContent === "{text}")"""
        )


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    """Run an asynchronous test in a loop of its own, and not for ever."""

    def run(tmp_path: Path) -> None:
        asyncio.run(asyncio.wait_for(test(tmp_path), DEADLINE_S))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


@asynccontextmanager
async def fakes(*roles: str, model: str = MODEL) -> AsyncIterator[list[FakeInstance]]:
    """Start fake instances."""
    async with AsyncExitStack() as stack:
        made = [FakeInstance(role, model) for role in roles]
        for one in made:
            await one.start()
            stack.push_async_callback(one.stop)
        yield made


@asynccontextmanager
async def routing(log: Path, port: int, *arguments: str) -> AsyncIterator[str]:
    """Run the router until the end of the block; its fake instances live in this loop."""
    command = [sys.executable, "-m", "vllm_plugins.cli.main", "route", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with logged_process([*command, *QUICK, *arguments], log) as process:
        try:
            async with aiohttp.ClientSession() as session:
                while process.poll() is None:
                    with suppress(aiohttp.ClientError):
                        async with session.get(url + "/health"):
                            break
                    await asyncio.sleep(0.1)
            assert process.poll() is None, log.read_text()
            yield url
        finally:
            await asyncio.to_thread(stop_group, process)


@asynccontextmanager
async def shown(folder: Path, url: str) -> AsyncIterator[Routed]:
    """Open the page, and check at the end what every visit must keep to."""
    async with browser.opened(url + "/", folder) as tab, aiohttp.ClientSession() as session:
        yield Routed(url, tab, session)
        assert tab.requested
        assert {one for one in tab.requested if not one.startswith(url + "/")} <= {"data:,"}
        # A browser itself reports requests that fail; anything else would be the page's fault.
        assert [said for said in tab.errors if said[0] != "network"] == []
        assert tab.loads == 1


@in_loop
async def test_values_move_without_a_reload(tmp_path):
    async with (
        fakes("prefill", "decode") as (prefill, decode),
        routing(
            tmp_path / "log", free_port(), "--prefill", prefill.url, "--decode", decode.url,
            "--max-prefill-tokens", "1",
        ) as url,
        shown(tmp_path, url) as page,
    ):  # fmt: skip
        await page.says("Live")
        await page.shows("prefill-1", "State", "up")
        await page.counts("Waiting for prefill", "0")
        await page.holds("no lease runs")
        await page.tab.value(WATCH_SHIFTS)
        prefill.gate, decode.gate = asyncio.Semaphore(0), asyncio.Semaphore(0)
        asked = [page.ask() for _ in range(4)]
        await page.counts("Waiting for prefill", "3")
        await page.shows("prefill-1", "Requests", "1")
        prefill.gate.release()
        await page.counts("KV held for decode", "1")
        await page.holds("first lease ends in ")
        await page.counts("Waiting for prefill", "2")
        for running in (12, 1234):
            prefill.metrics = METRICS.format(running=running, waiting=0)
            await page.shows("prefill-1", "Running", f"{running:,}")
        await page.shows("prefill-1", "KV held", "7 blocks")
        await page.shows("prefill-1", "KV in use", "37.5 %")
        for gate in (prefill.gate, decode.gate):
            for _ in range(100):
                gate.release()
        assert await asyncio.gather(*asked) == [200] * 4
        await page.counts("KV held for decode", "0")
        await page.holds("no lease runs")
        await page.counts("Waiting for prefill", "0")
        assert await page.tab.value("shifted") == 0
        assert page.tab.errors == []


@in_loop
async def test_who_dies_or_is_drained_is_shown_as_such(tmp_path):
    async with (
        fakes("prefill", "prefill", "decode", "decode") as (first, second, third, last),
        routing(
            tmp_path / "log", free_port(), "--prefill", first.url, second.url,
            "--decode", third.url, last.url,
        ) as url,
        shown(tmp_path, url) as page,
    ):  # fmt: skip
        second.metrics = METRICS.format(running=5, waiting=0)
        await page.shows("prefill-2", "Running", "5")
        port = int(second.url.rsplit(":", 1)[1])
        await second.stop()
        await page.shows("prefill-2", "State", "down")
        await page.told("prefill-2 is down")
        # What it said while it lived holds no longer.
        await page.shows("prefill-2", "Running", "\N{EN DASH}")
        assert await page.order("decode-1/drain") == 200
        await page.shows("decode-1", "State", "draining")
        assert await page.order("decode-1/resume") == 200
        await page.shows("decode-1", "State", "up")
        await second.start(port)
        await page.shows("prefill-2", "State", "up")
        async with page.session.delete(f"{url}/instances/decode-2") as answer:
            assert answer.status == 200
        await page.told("decode-2 was removed")
        await page.tab.until("document.querySelectorAll('#instances tr').length", 3)
        assert page.tab.errors == []


@in_loop
async def test_a_change_of_role_is_shown_and_told(tmp_path):
    async with (
        fakes("prefill", "decode", "decode") as (prefill, first, second),
        routing(
            tmp_path / "log", free_port(), "--prefill", prefill.url,
            "--decode", first.url, second.url,
            "--roles", "soft", "--interval-s", "1", "--cooldown-s", "1",
        ) as url,
        shown(tmp_path, url) as page,
    ):  # fmt: skip
        await page.shows("decode-1", "Role", "decode")
        prefill.metrics = METRICS.format(running=1, waiting=9)
        await page.told("decode-1 went from decode to prefill")
        await page.shows("decode-1", "Role", "prefill")
        # One of a role stays.
        await page.shows("decode-2", "Role", "decode")
        assert page.tab.errors == []


@asynccontextmanager
async def oddly_named() -> AsyncIterator[str]:
    """Serve what a router asks an instance for, under a path that is markup."""

    async def answer(request: web.Request) -> web.Response:
        model = {"id": EVIL, "max_model_len": MAX_MODEL_LEN}
        return web.json_response({"data": [model]})

    app = web.Application()
    app.router.add_get("/{anything:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/{EVIL.replace(' ', '/')}"
    finally:
        await runner.cleanup()


@in_loop
async def test_names_that_are_markup_are_text(tmp_path):
    async with (
        fakes("prefill", model=EVIL) as (prefill,),
        oddly_named() as odd,
        routing(
            tmp_path / "log", free_port(), "--prefill", prefill.url, "--decode", odd
        ) as url,
        shown(tmp_path, url) as page,
    ):  # fmt: skip
        await page.says("Live")
        await page.tab.until('document.getElementById("model").textContent', EVIL)
        await page.shows("decode-1", "Instance", f"decode-1 {odd}")
        assert await page.tab.value('document.querySelectorAll("img, main script").length') == 0
        assert page.tab.errors == []


@in_loop
async def test_the_page_says_when_it_is_stale_and_recovers(tmp_path):
    async with fakes("prefill", "decode") as (prefill, decode):
        port = free_port()
        urls = ("--prefill", prefill.url, "--decode", decode.url)
        async with AsyncExitStack() as outer:
            async with routing(tmp_path / "log", port, *urls) as url:
                page = await outer.enter_async_context(shown(tmp_path, url))
                await page.says("Live")
            await page.says("Stale: no answer since ")
            async with routing(tmp_path / "log", port, *urls):
                await page.says("Live")
                await page.told("the router answers again")
                await page.shows("decode-1", "State", "up")
        assert all("ERR_CONNECTION" in text or "ERR_EMPTY" in text for _, text in page.tab.errors)


@in_loop
async def test_the_operators_key_opens_the_values(tmp_path):
    key = tmp_path / "key"
    key.write_text(KEY)
    async with (
        fakes("prefill", "decode") as (prefill, decode),
        routing(
            tmp_path / "log", free_port(), "--prefill", prefill.url, "--decode", decode.url,
            "--admin-key-file", str(key),
        ) as url,
        shown(tmp_path, url) as page,
    ):  # fmt: skip
        await page.says("Locked")
        assert await page.tab.value('document.getElementById("values").hidden')
        await page.tab.value('document.getElementById("entered").focus()')
        await page.tab.write("wrong")
        await page.tab.until(
            'document.getElementById("refused").textContent', "The router refuses this key."
        )
        await page.tab.value('document.getElementById("entered").select()')
        await page.tab.write(KEY)
        await page.says("Live")
        await page.shows("decode-1", "State", "up")
        assert await page.tab.value('document.getElementById("lock").hidden')
        assert all("403" in text for _, text in page.tab.errors)
        assert not any(KEY in one for one in page.tab.requested)

"""A real browser, driven over the DevTools protocol with what the router itself needs: aiohttp."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from vllm_plugins.bench.process import logged_process

NAMES = ("chromium", "chromium-browser", "google-chrome")
HOW_TO_GET = f"none of {', '.join(NAMES)} is on PATH: apt-get install chromium"
# It may load what a test serves, and nothing on its own behalf.
FLAGS = (
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--remote-debugging-port=0",
)
START_S, CALL_S, CHANGE_S = 60.0, 30.0, 30.0
LONGEST_MESSAGE = 1 << 26


def program() -> str | None:
    """Return the browser's path, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """The browser's only tab.

    Attributes:
        errors: What went to the console as an error, exceptions included, with the source's name.
        requested: Addresses of all requests, oldest first.
        loads: How often a document was loaded.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.errors: list[tuple[str, str]] = []
        self.requested: list[str] = []
        self.loads = 0
        self._socket = socket
        self._numbers = itertools.count(1)
        self._awaited: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Carry out a command of the protocol, and return its result."""
        number = next(self._numbers)
        answer = self._awaited[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        message = await asyncio.wait_for(answer, CALL_S)
        assert "error" not in message, f"{method}: {message['error']}"
        return message["result"]

    async def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, expression: str, wanted: Any = True) -> None:
        """Wait until an expression has a value."""
        deadline = asyncio.get_running_loop().time() + CHANGE_S
        while (found := await self.value(expression)) != wanted:
            assert asyncio.get_running_loop().time() < deadline, f"{expression} is {found!r}"
            await asyncio.sleep(0.05)

    async def write(self, text: str) -> None:
        """Type a text and Enter where the focus is."""
        await self.call("Input.insertText", text=text)
        enter = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **enter)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **enter)

    async def listen(self) -> None:
        """Take in answers and events until the connection ends."""
        async for raw in self._socket:
            message = json.loads(raw.data)
            if "id" in message:
                self._awaited.pop(message["id"]).set_result(message)
            else:
                self._note(message["method"], message["params"])

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif event == "Page.frameNavigated":
            self.loads += 1
        elif event == "Runtime.exceptionThrown":
            self.errors.append(("exception", json.dumps(params["exceptionDetails"])))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(("console", json.dumps(params["args"])))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append((params["entry"]["source"], params["entry"]["text"]))


@asynccontextmanager
async def opened(url: str, folder: Path) -> AsyncIterator[Tab]:
    """Start a browser and open a page in it.

    Args:
        url: Of the page.
        folder: Empty; for the browser's profile and log.
    """
    found = program()
    assert found is not None, HOW_TO_GET
    profile = folder / "profile"
    # Its sandbox cannot be had as root, and it loads the tests' own pages alone.
    as_root = ("--no-sandbox",) if os.geteuid() == 0 else ()
    command = [found, *FLAGS, *as_root, f"--user-data-dir={profile}", "about:blank"]
    with logged_process(command, folder / "browser.log"):
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(
                await _address(session, profile), max_msg_size=LONGEST_MESSAGE
            ) as ws,
        ):
            tab = Tab(ws)
            listening = asyncio.create_task(tab.listen())
            try:
                for domain in ("Page", "Runtime", "Network", "Log"):
                    await tab.call(f"{domain}.enable")
                await tab.call("Page.navigate", url=url)
                await tab.until("document.readyState", "complete")
                yield tab
            finally:
                listening.cancel()


async def _address(session: aiohttp.ClientSession, profile: Path) -> str:
    """Return where the tab's commands go, once the browser has written its port."""
    async with asyncio.timeout(START_S):
        while True:
            with_port = profile / "DevToolsActivePort"
            if with_port.exists() and (lines := with_port.read_text().split()):
                async with session.get(f"http://127.0.0.1:{lines[0]}/json/list") as answer:
                    for target in await answer.json():
                        if target["type"] == "page":
                            return str(target["webSocketDebuggerUrl"])
            await asyncio.sleep(0.1)

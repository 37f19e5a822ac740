"""The router's connections to instances: names not found, hosts that go, headers of one hop."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver
from multidict import CIMultiDict

from tests.router_backends import MODEL, answer_tokens, text_of
from tests.router_rig import Rig, in_loop, rig
from vllm_plugins.router.upstream import GONE_S, request_headers

PROMPT = [5] * 10
BODY: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 3, "temperature": 0}


def connector_of(router: Rig) -> Any:
    """Return what makes the router's connections."""
    return router.services.upstream._session.connector


@in_loop
async def test_a_name_that_is_not_found_in_time_costs_no_more_than_an_address(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Silent(AbstractResolver):
        """Never answers, as where no name server can be reached."""

        async def resolve(self, *args: Any, **options: Any) -> Any:
            await asyncio.Event().wait()

        async def close(self) -> None:
            """Nothing is open."""

    async with rig(prefill=2, connect_timeout_s=0.2) as router:
        monkeypatch.setattr(connector_of(router), "_resolver", Silent())
        router.services.fleet["prefill-1"].url = "http://somewhere.invalid:80"
        assert await router.text(BODY) == text_of(answer_tokens(PROMPT, 3))
        assert await router.metric("retries_total", role="prefill") == 1


@in_loop
async def test_a_host_that_goes_without_a_word_is_noticed_while_an_answer_is_waited_for() -> None:
    """Here no host can be made to go; what the system is told about one can be read."""
    async with rig() as router:
        router.prefill[0].gate = asyncio.Semaphore(0)
        asking = asyncio.create_task(router.text(BODY))
        await router.prefill[0].arrived.acquire()
        [used] = connector_of(router)._acquired
        sock = used.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1

        def seconds(option: int) -> int:
            return int(sock.getsockopt(socket.IPPROTO_TCP, option))

        asked_s = seconds(socket.TCP_KEEPINTVL) * seconds(socket.TCP_KEEPCNT)
        assert seconds(socket.TCP_KEEPIDLE) + asked_s == GONE_S
        assert seconds(socket.TCP_USER_TIMEOUT) == 1000 * GONE_S
        router.prefill[0].gate.release()
        await asking


def test_headers_of_the_connection_are_known_however_they_are_listed() -> None:
    headers = CIMultiDict([("Connection", "close"), ("X-A", "1"), ("X-B", "2"), ("X-C", "3")])
    headers.add("connection", "x-a , X-B")
    assert {"X-A", "X-B", "X-C"} & set(request_headers(headers, "id")) == {"X-C"}

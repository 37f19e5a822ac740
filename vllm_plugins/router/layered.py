"""Prefill and decode at once: layers leave while later ones are computed (``--stream-layers``).

```
client ──► place at P, if it starts the prompt at once ──► place at D ──► answer
             │ P: compute, under this name                   │ D: wait for the name's layers
             └─ P fails: the name is released, D hears of it and computes the prompt itself
```
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_plugins.router.exchange import Exchange
from vllm_plugins.router.upstream import InstanceError, RejectedError

if TYPE_CHECKING:
    from aiohttp import web


class LayeredExchange(Exchange):
    """One request of a client, whose prompt may be read layer by layer."""

    _tried_layered = False

    async def _attempt(self) -> web.StreamResponse:
        """Ask both instances at once, or one after the other."""
        named = await self._name()
        if named is None:
            return await super()._attempt()
        prefill = asyncio.create_task(self._prefill_layered(named))
        try:
            # It takes its reserved place before decode looks for one.
            await asyncio.sleep(0)
            ticket = await self._place_decode()
            with self._services.desk.held(ticket):
                return await self._decode(ticket, named)
        finally:
            prefill.cancel()

    async def _name(self) -> Mapping[str, Any] | None:
        """Reserve an idle prefill instance and name the prompt; None to go the other way.

        Only one that starts the prompt at once: a decode instance waits for the first layer no
        longer than for an answer that is on its way. And only once: after a failure the way is
        taken that leaves the decode instance less to do.
        """
        if self._tried_layered or self._alone or self._media or self._client.begun:
            return None
        self._tried_layered = True
        self._reserved = await self._place_prefill(set())
        load = self._services.ledger.load(self._reserved.instance)
        if load.prefill_tokens > self._reserved.work.prompt_tokens:
            return None
        return self._services.releaser.name(self._reserved.instance.id)

    async def _prefill_layered(self, named: Mapping[str, Any]) -> None:
        ticket, self._reserved = self._reserved, None
        assert ticket is not None
        try:
            with self._services.desk.held(ticket):
                answer = await self._ask_one(ticket, self._call, named)
        except InstanceError as failure:
            self._note(failure)
        except RejectedError:
            # The decode instance refuses the same request, and the client hears it from there.
            self._services.releaser.start(named)
        else:
            if self._client.begun:
                # Taken long ago, unless the decode instance gave the pull up.
                self._services.releaser.start(named)
            else:
                await self._hold(answer)

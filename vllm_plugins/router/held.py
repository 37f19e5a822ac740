"""Lets go of KV that a prefill instance holds for a request that nobody will continue.

References of the ``pd`` connector are released by a message to each of their workers. Those of
other connectors have no such message: there the lease of the connector ends.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from vllm_plugins.router.metrics import RouterMetrics
from vllm_plugins.routing import Instance, State

logger = logging.getLogger(__name__)

PD_REFERENCE = "vllm_plugins_pd"
# The messages are small and rare. A dead peer holds a thread until its connection times out.
THREADS = 4
# Beyond this the leases have to do: after a failure of many requests at once.
MAX_WAITING = 1024

Release = Callable[[Mapping[str, Any], bytes | None], None]
"""Sends the message to every peer of a reference; blocks, and raises what went wrong."""


@dataclass(frozen=True, eq=False)
class Held:
    """A prompt that a prefill instance has computed; equal to itself alone.

    Attributes:
        transfer: ``kv_transfer_params`` of its answer; None where it holds nothing.
        prompt_tokens: Length of the prompt as it counted it.
        until: Monotonic time in seconds from which on it may hold the KV no longer.
    """

    transfer: Mapping[str, Any] | None
    prompt_tokens: int
    until: float


class Releaser:
    """Releases in the background, so that no request waits for it.

    Args:
        release: How.
        secret: Shared with the instances; None for the user's own.
        metrics: Counts releases.
    """

    def __init__(self, release: Release, secret: bytes | None, metrics: RouterMetrics) -> None:
        self._release = release
        self._secret = secret
        self._metrics = metrics
        self._peers: dict[str, Mapping[str, Any]] = {}
        self._threads = ThreadPoolExecutor(THREADS, "release")
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, transfer: Mapping[str, Any] | None) -> None:
        """Begin to release what ``kv_transfer_params`` refer to; does nothing for others' kinds."""
        if not transfer or not isinstance(transfer.get(PD_REFERENCE), dict):
            return
        if len(self._tasks) >= MAX_WAITING:
            self._metrics.released("failed")
            return
        task = asyncio.create_task(self._run(transfer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def learn(self, instance: Instance, transfer: object) -> None:
        """Take from an instance's reference where its workers are, unless it has left meanwhile."""
        reference = transfer.get(PD_REFERENCE) if isinstance(transfer, dict) else None
        if (
            isinstance(reference, dict)
            and "peers" in reference
            and instance.state is not State.REMOVED
        ):
            self._peers[instance.id] = {key: reference.get(key) for key in ("version", "peers")}

    def forget(self, instance_id: str) -> None:
        """Drop what is known of an instance that has left."""
        self._peers.pop(instance_id, None)

    def name(self, instance_id: str) -> dict[str, Any] | None:
        """Return a reference to a prompt that an instance has yet to compute.

        Its ``transfer_id`` goes with the question, so that the prompt can be released although its
        answer was lost. None where the instance's workers are not known.
        """
        peers = self._peers.get(instance_id)
        if peers is None:
            return None
        reference = {"transfer_id": uuid.uuid4().hex, **peers}
        return {"do_remote_prefill": True, PD_REFERENCE: reference}

    async def close(self, timeout_s: float) -> None:
        """Wait for what was begun, at most so long."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _run(self, transfer: Mapping[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, self._release, transfer, self._secret)
        except Exception as error:
            # Whatever it is, the lease ends the hold; the operator sees that it came to that.
            logger.warning("held KV was not released, its lease ends it: %s", error)
            self._metrics.released("failed")
        else:
            self._metrics.released("done")


def pd_release(transfer: Mapping[str, Any], secret: bytes | None) -> None:
    """Release a reference of the ``pd`` connector.

    Raises:
        PluginError: The user's own secret cannot be read.
        BadReferenceError: The reference is malformed.
        WireError: A worker could not be told.
    """
    # Imported late: a router in front of another connector needs none of it.
    from vllm_plugins.kv_connectors.pd.release import release
    from vllm_plugins.wire.secret import load_secret

    release(transfer, load_secret(None) if secret is None else secret)

"""The scheduler's part: an image is computed in one step, and cached under the keep settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_plugins.engine.policy import SchedulerPolicy

if TYPE_CHECKING:
    from vllm.v1.request import Request


class WholeImages(SchedulerPolicy):
    """Has the scheduler host keep images whole: what is chosen of one is chosen once.

    Args:
        key: Of the keep settings, for the prefix cache; empty where nothing is dropped.
    """

    whole_media = True

    def __init__(self, key: str) -> None:
        self._key = key

    def added(self, request: Request, arrived: float) -> None:
        """Have the prefix cache know a request's blocks by the keep settings too.

        All of them, whether images are in them or not: prompts with and without go on sharing what
        they begin with.
        """
        if self._key:
            request.cache_salt = f"{self._key} {request.cache_salt or ''}"
            request.block_hashes.clear()
            request.update_block_hashes()

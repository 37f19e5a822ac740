"""Approximate blocks: out of the exact prefix cache, and found again by who repeats their prompt.

vLLM's prefix cache knows a block by a chain of hashes. From the first approximate block of a prompt
on, its chain goes on from a random *root*, so nobody whose chain is exact finds it. Which root went
in the place of which hash is remembered: a request that would be blended there too takes the same
turn, and finds in vLLM's own cache what was blended before, and what was computed behind it. While
that is still being blended, it waits.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import BlockHash

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

    from vllm_plugins.kv_connectors.kvshare.request_state import RequestState


@dataclass(frozen=True, slots=True)
class Root:
    """Where a chain of hashes leaves the exact one.

    Attributes:
        digest: Hash of the first approximate block.
        position: Position of that block's first token.
        end: Position behind what was blended.
        generation: Highest generation of the KV that was reused from there on.
        owner: Name of the request that was blended.
    """

    digest: BlockHash
    position: int
    end: int
    generation: int
    owner: str


class TaintedChains:
    """The roots of the approximate chains, at most as many as there are blocks.

    Args:
        pool: vLLM's blocks, in one KV cache group.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        # By the hash in whose place they are, the oldest first.
        self._roots: OrderedDict[BlockHash, Root] = OrderedDict()
        # Owners whose blocks are not in the prefix cache yet, and will be.
        self._blending: set[str] = set()

    def leave(self, request: Request, position: int, end: int, generation: int) -> None:
        """Take a request's blocks out of the exact chain.

        Args:
            request: It is about to be blended, and has its blocks.
            position: First token whose KV is approximate. What is before it stays shared.
            end: Position behind the last one that is blended.
            generation: Highest generation of the KV that it reuses.
        """
        block = self._pool.hash_block_size
        whole = position // block
        if whole >= len(request.block_hashes):
            return
        owner = request.request_id
        root = Root(BlockHash(os.urandom(32)), whole * block, end, generation, owner)
        self._blending.add(owner)
        replaced = self._turn(request, whole, root)
        self._roots[replaced] = root
        self._roots.move_to_end(replaced)
        if len(self._roots) > self._pool.num_gpu_blocks:
            self._roots.popitem(last=False)

    def redirects(self, state: RequestState, reach: int) -> bool:
        """Put a request on the chain of an earlier one, from where that left this one's on.

        Args:
            state: Of a request that may be blended and has not been admitted. Its ``root`` is set
                where it changes its chain.
            reach: Position up to which it may be blended itself, or 0. Who shares little
                of what is being blended does not wait for all of it.

        Returns:
            Whether the prefix cache has more for it than ``state.cached``, or will have soon.
        """
        request = state.request
        whole = state.cached // self._pool.hash_block_size
        if reach <= state.cached or whole >= len(request.block_hashes):
            return False
        root = self._roots.get(request.block_hashes[whole])
        if root is None:
            return False
        if self._pool.get_cached_block(root.digest, [0]) is None:
            shared = min(reach, root.end) - state.cached
            return root.owner in self._blending and 2 * shared >= root.end - root.position
        self._turn(request, whole, root)
        first = state.root or root
        state.root = replace(
            root,
            position=first.position,
            generation=max(first.generation, root.generation),
        )
        return True

    def settle(self, owners: Iterable[str]) -> None:
        """Have nobody wait for these requests any more."""
        self._blending.difference_update(owners)

    def forget(self) -> None:
        """Forget all roots, as when the weights change."""
        self._roots.clear()

    @staticmethod
    def _turn(request: Request, whole: int, root: Root) -> BlockHash:
        """Put a root in the place of a hash, which is returned."""
        replaced = request.block_hashes[whole]
        del request.block_hashes[whole:]
        request.block_hashes.append(root.digest)
        request.update_block_hashes()
        return replaced

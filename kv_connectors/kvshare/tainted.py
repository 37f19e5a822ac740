"""Approximate blocks: out of the exact prefix cache, and found again by who repeats their prompt.

vLLM's prefix cache knows a block by a chain of hashes. From the first approximate block of a prompt
on, its chain goes on from a random *root*, so nobody whose chain is exact finds it. Which root went
in the place of which hash is remembered: a request that would be blended there too takes the same
turn, and finds in vLLM's own cache what was blended before, and what was computed behind it. While
that is still being blended, it waits. Who finds nothing where it has turned, as the blocks are gone
by then, turns back.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vllm.v1.core.kv_cache_utils import BlockHash

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
    """

    digest: BlockHash
    position: int
    end: int
    generation: int


class TaintedChains:
    """The roots of the approximate chains, at most as many as there are blocks.

    Args:
        pool: vLLM's blocks, in one KV cache group.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        # By the hash in whose place they are, the oldest first.
        self._roots: OrderedDict[BlockHash, Root] = OrderedDict()
        # By name of a request whose blocks are not in the prefix cache yet, and will be: its root,
        # and the hashes of the chain that it has left, from there to the end of what is blended.
        self._blending: dict[str, tuple[Root, Sequence[BlockHash]]] = {}

    def leave(self, state: RequestState, position: int, end: int, generation: int) -> None:
        """Take a request's blocks out of the exact chain.

        Args:
            state: Of a request that is about to be blended, and has its blocks.
            position: First token whose KV is approximate. What is before it stays shared.
            end: Position behind the last one that is blended.
            generation: Highest generation of the KV that it reuses.
        """
        block = self._pool.hash_block_size
        whole = position // block
        left = state.request.block_hashes[whole : max(whole + 1, end // block)]
        if not left or not self._pool.enable_caching:
            return
        root = Root(BlockHash(os.urandom(32)), whole * block, end, generation)
        self._turn(state, whole, root)
        self._blending[state.request.request_id] = root, left
        self._roots[left[0]] = root
        self._roots.move_to_end(left[0])
        if len(self._roots) > self._pool.num_gpu_blocks:
            self._roots.popitem(last=False)

    def redirects(self, state: RequestState, reach: int) -> bool:
        """Put a request on the chain of an earlier one, from where that left this one's on.

        Args:
            state: Of a request that may be blended and has no blocks. Its ``root`` is set where it
                changes its chain.
            reach: Position up to which it may be blended itself, or 0. Who shares little
                of what is being blended does not wait for all of it.

        Returns:
            Whether the prefix cache has more for it than ``state.cached``, or will have soon.
        """
        whole = state.cached // self._pool.hash_block_size
        turned_back, hashes = self._undo(state, whole), state.request.block_hashes
        if whole >= len(hashes):
            return False
        if turned_back and self._pool.get_cached_block(hashes[whole], [0]) is not None:
            return True
        if reach <= state.cached:
            return False
        root = self._roots.get(hashes[whole])
        if root is None or self._pool.get_cached_block(root.digest, [0]) is None:
            return self._awaits(state, reach)
        self._turn(state, whole, root)
        first = state.root or root
        state.root = replace(
            root,
            position=first.position,
            generation=max(first.generation, root.generation),
        )
        return True

    def _awaits(self, state: RequestState, reach: int) -> bool:
        """Whether half of what is being put together on a request's chain is for it too.

        What begins with KV that is loaded as it is has its root further on than the request's hit.
        """
        block, hashes = self._pool.hash_block_size, state.request.block_hashes
        for root, left in self._blending.values():
            half = (root.end - state.cached + 1) // 2
            if root.position < state.cached or min(reach, root.end) - state.cached < half:
                continue
            # A hash stands for all that is before it, too.
            place = (state.cached + half - 1) // block - root.position // block
            last = min(max(place, 0), len(left) - 1)
            at = root.position // block + last
            if hashes[at : at + 1] == [left[last]]:
                return True
        return False

    def settle(self, owners: Iterable[str]) -> None:
        """Have nobody wait for these requests any more."""
        for owner in owners:
            self._blending.pop(owner, None)

    def fail(self, state: RequestState) -> None:
        """Put a request back that is not blended after all: it computes what is behind its hit."""
        self.settle([state.request.request_id])
        self._undo(state, state.cached // self._pool.hash_block_size)

    def forget(self, states: Iterable[RequestState]) -> None:
        """Forget all roots, as when the weights change.

        Args:
            states: Of all requests. Who has turned to a root and has no blocks yet gets none of it.
        """
        self._roots.clear()
        self._blending.clear()
        for state in states:
            if not state.request.num_computed_tokens:
                self._undo(state, 0)

    @staticmethod
    def _turn(state: RequestState, whole: int, root: Root) -> None:
        """Put a root in the place of a hash."""
        _hash_from(state.request, whole, root.digest)
        state.turns = [*(turn for turn in state.turns if turn < whole), whole]

    @staticmethod
    def _undo(state: RequestState, whole: int) -> bool:
        """Put a request back on the chain that it has left at a block or behind it.

        It has none of the blocks from there on; those that it computes bear the hashes of that
        chain.

        Returns:
            Whether it had left it there.
        """
        kept = [turn for turn in state.turns if turn < whole]
        if len(kept) == len(state.turns):
            return False
        _hash_from(state.request, state.turns[len(kept)])
        state.turns = kept
        if not kept:
            state.root = None
        return True


def _hash_from(request: Request, whole: int, *root: BlockHash) -> None:
    """Hash a request's blocks anew from one on, behind a root where there is one in its place."""
    request.block_hashes[whole:] = root
    request.update_block_hashes()

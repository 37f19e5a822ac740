"""Anchors: few windows of a text, so chosen that every long common run of two texts shares one.

Winnowing (Schleimer, Wilkerson and Aiken 2003): of every ``w`` consecutive 16-token windows the
one with the least hash is an anchor. A common run of ``w + 15`` tokens holds ``w`` windows, which
are the same in both texts, and so is their least; with ``w = min_run - 15`` no common run of
``min_run`` tokens is missed, at about ``2 / (w + 1)`` anchors per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_plugins.kv_connectors.kvshare.chunking import WINDOW, Hashes

_LOW = np.uint64(2**32 - 1)
_HIGH = ~_LOW


@dataclass(frozen=True, slots=True, eq=False)
class Anchors:
    """Anchors of a text.

    Args:
        hashes: Their windows' hashes, shape (k,).
        offsets: Their windows' first tokens, ascending, shape (k,).
    """

    hashes: Hashes
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets)

    def between(self, begin: int, end: int) -> Anchors:
        """Return the anchors whose first token is in [begin, end), counted from ``begin``."""
        low, high = np.searchsorted(self.offsets, (begin, end))
        return Anchors(self.hashes[low:high].copy(), self.offsets[low:high] - begin)


def winnow(hashes: Hashes, min_run: int) -> Anchors:
    """Select the anchors of a text.

    Args:
        hashes: Hashes of the text's windows, shape (n,).
        min_run: Least length of a common run that must share an anchor, in tokens; at least 16.

    Returns:
        None for a text shorter than ``min_run``.
    """
    width = min_run - WINDOW + 1
    if width < 1:
        raise ValueError(f"min_run={min_run} is below {WINDOW}")
    if len(hashes) < width:
        return Anchors(hashes[:0], np.empty(0, dtype=np.int64))
    # The position in the low bits makes equal windows, as in periodic text, resolve to the
    # rightmost, in whatever text they stand, and tells afterwards which one was least.
    positions = np.arange(len(hashes), dtype=np.uint64)
    least = _sliding_minimum((hashes & _HIGH) | (_LOW - positions), width)
    chosen = (_LOW - (least & _LOW)).astype(np.int64)
    offsets = chosen[np.flatnonzero(np.diff(chosen, prepend=-1))]
    return Anchors(hashes[offsets], offsets)


def _sliding_minimum(values: Hashes, width: int) -> Hashes:
    """Return the minimum of every ``width`` consecutive values, shape (n - width + 1,)."""
    done = 1
    while 2 * done <= width:
        values = np.minimum(values[:-done], values[done:])
        done *= 2
    rest = width - done
    return np.minimum(values[: len(values) - rest], values[rest:]) if rest else values

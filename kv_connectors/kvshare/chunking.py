"""Content-defined chunks: cuts that depend on the text around them, not on where it stands.

A cut falls where a hash of the 16 tokens before it is small. Text that is moved, or has other text
put before it, is cut at the same places again, but for the first chunk or two.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

WINDOW = 16
"""Tokens in a hashed window."""

Hashes = NDArray[np.uint64]
"""Hash of every window of a text by its first token, shape (max(n - 15, 0),)."""

_FACTOR_1 = np.uint64(0xBF58476D1CE4E5B9)
_FACTOR_2 = np.uint64(0x94D049BB133111EB)


def _mix(values: Hashes) -> Hashes:
    """Scatter 64-bit values in place (the finaliser of SplitMix64)."""
    values ^= values >> np.uint64(30)
    values *= _FACTOR_1
    values ^= values >> np.uint64(27)
    values *= _FACTOR_2
    values ^= values >> np.uint64(31)
    return values


class WindowHash:
    """A hash of every 16-token window, keyed by the domain.

    Who does not know the domain's digest (an HMAC under the operator's secret) cannot write text
    whose windows collide or whose cuts fall where they want them. A hit is compared token by token
    in any case; the key protects the balance of the tables.

    Args:
        domain: Digest of the tenant domain.
    """

    def __init__(self, domain: bytes) -> None:
        digest = blake2b(domain, digest_size=64, person=b"kvshare-windows").digest()
        words = np.frombuffer(digest, dtype="<u8")
        self._key = words[0]
        self._factors = words[1:5] | np.uint64(1)

    def __call__(self, tokens: NDArray[np.int32]) -> Hashes:
        """Hash every window of a text of shape (n,)."""
        if len(tokens) < WINDOW:
            return np.empty(0, dtype=np.uint64)
        hashes = _mix(tokens.astype(np.uint64) ^ self._key)
        width = 1
        for factor in self._factors:
            # A window is the two of half its width; the shift breaks the product's linearity.
            joined = hashes[:-width] * factor
            joined += hashes[width:]
            joined ^= joined >> np.uint64(32)
            hashes = joined
            width *= 2
        return _mix(hashes)


@dataclass(frozen=True, slots=True)
class ChunkSizes:
    """Bounds of a chunk, in tokens.

    Args:
        least: No chunk but the last of a text is shorter; at least 16.
        most: No chunk is longer.
    """

    least: int = 64
    most: int = 512

    def __post_init__(self) -> None:
        if not WINDOW <= self.least <= self.most:
            raise ValueError(
                f"chunk sizes {self.least}..{self.most} are not in 16 <= least <= most"
            )

    def bounds(self, hashes: Hashes, length: int) -> list[int]:
        """Return where the chunks of a text begin, and its end.

        Args:
            hashes: Hashes of the text's windows.
            length: Tokens of the text.

        Returns:
            Ascending positions, the first 0 and the last ``length``; ``[0]`` for an empty text.
        """
        # Four times the mean distance fit between the bounds, so 98 of 100 chunks end at a cut
        # of the first kind.
        limit = np.uint64(2**64 // max((self.most - self.least) // 4, 2))
        passing: list[int] = (np.flatnonzero(hashes < limit) + WINDOW).tolist()
        bounds = [0]
        while bounds[-1] < length:
            bounds.append(self._next(bounds[-1], hashes, passing, length))
        return bounds

    def _next(self, begin: int, hashes: Hashes, passing: Sequence[int], length: int) -> int:
        """Return the end of the chunk that starts at ``begin``."""
        low, high = begin + self.least, begin + self.most
        if length <= low:
            return length
        i = bisect_left(passing, low)
        if i < len(passing) and passing[i] <= high:
            return passing[i]
        if length <= high:
            return length
        # Not simply at ``high``: the least hash is the same wherever the text stands.
        return low + int(np.argmin(hashes[low - WINDOW : high - WINDOW + 1]))

"""The format of a page: what is kept of one KV head of one sealed block, and where.

A page is one record of bytes. Every token has two high bits of its 4-bit codes; only the salient
ones have the two low bits too, side by side in the order of their positions::

    K high [N][D/4]  V high [N][D/4]  K low [n][D/4]  V low [n][D/4]
    K min [D]  K step [D]  V scale [D]  V min [N]  V step [N]   (float16)
    which tokens are salient [N bits]

A byte of a plane holds four codes: channels j, j + D/4, j + D/2 and j + 3D/4 of byte j, the first
in the lowest bits. All pages have the same number n of salient tokens, because vLLM's pages have
one size; this is a deviation from the paper, whose quota is one for the whole sequence [G].
"""

from __future__ import annotations

from dataclasses import dataclass

BLOCK_SIZES = (32, 64, 128, 256)
# Of head sizes: a quarter of the channels has to fill whole groups of four bytes.
HEAD_MULTIPLE = 16


@dataclass(frozen=True)
class PageFormat:
    """Where the parts of a page lie, in bytes from its start.

    Attributes:
        block_size: Tokens of a block (N).
        head_size: Channels (D).
        salient: Salient tokens of each block (n).
    """

    block_size: int
    head_size: int
    salient: int

    @classmethod
    def of(cls, block_size: int, head_size: int, bits: str, salient_ratio: float) -> PageFormat:
        """Return the format for the plug-in's options.

        Args:
            block_size: Tokens of a block.
            head_size: Channels.
            bits: Of salient and of other tokens: ``4/2``, or ``4/4`` and ``2/2`` for one class.
            salient_ratio: Share of salient tokens, with ``4/2``.
        """
        shares = {"4/2": salient_ratio, "4/4": 1.0, "2/2": 0.0}
        return cls(block_size, head_size, round(shares[bits] * block_size))

    @property
    def chooses(self) -> bool:
        """Whether there is a choice of salient tokens to be made."""
        return 0 < self.salient < self.block_size

    @property
    def row(self) -> int:
        """Bytes of one token in one plane."""
        return self.head_size // 4

    @property
    def k_high(self) -> int:
        """High bits of keys, uint8, shape (N, D / 4)."""
        return 0

    @property
    def v_high(self) -> int:
        """High bits of values, uint8, shape (N, D / 4)."""
        return self.k_high + self.block_size * self.row

    @property
    def k_low(self) -> int:
        """Low bits of the salient tokens' keys, uint8, shape (n, D / 4)."""
        return self.v_high + self.block_size * self.row

    @property
    def v_low(self) -> int:
        """Low bits of the salient tokens' values, uint8, shape (n, D / 4)."""
        return self.k_low + self.salient * self.row

    @property
    def k_min(self) -> int:
        """Least key of each channel, float16, shape (D,)."""
        return self.v_low + self.salient * self.row

    @property
    def k_step(self) -> int:
        """Distance of two codes of a key's channel, float16, shape (D,)."""
        return self.k_min + 2 * self.head_size

    @property
    def v_scale(self) -> int:
        """What values were divided by, float16, shape (D,)."""
        return self.k_step + 2 * self.head_size

    @property
    def v_min(self) -> int:
        """Least scaled value of each token, float16, shape (N,)."""
        return self.v_scale + 2 * self.head_size

    @property
    def v_step(self) -> int:
        """Distance of two codes of a token's values, float16, shape (N,)."""
        return self.v_min + 2 * self.block_size

    @property
    def bitmap(self) -> int:
        """Whether each token is salient, N bits, the first in the lowest bit of the first byte."""
        return self.v_step + 2 * self.block_size

    @property
    def size(self) -> int:
        """Bytes in use."""
        return self.bitmap + self.block_size // 8

    @property
    def token_bytes(self) -> int:
        """Bytes that the cache spends on a token of one KV head, keys and values together.

        vLLM counts pages in whole bytes for each token, so up to N - 1 bytes of a page stay unused.
        """
        return -(-self.size // self.block_size)

    @property
    def bytes(self) -> int:
        """Bytes of a page in the cache."""
        return self.token_bytes * self.block_size

    @property
    def staged_bytes(self) -> int:
        """Bytes of a whole block's low planes, which stand beside its page until it is sealed."""
        return 2 * self.block_size * self.row

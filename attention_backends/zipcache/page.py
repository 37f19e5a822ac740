"""The format of a page: what is kept of one KV head of one sealed block, and where.

A page is one record of bytes. Every token has two high bits of its 4-bit codes; only the salient
ones have the two low bits too, side by side in the order of their positions::

    K high [N][D/4]  V high [N][D/4]  K low [k][D/4]  V low [v][D/4]
    K min [D]  K step [D]  V scale [D]  V min [N]  V step [N]   (float16)
    which tokens are salient [N bits, or twice as many]

A byte of a plane holds four codes: channels j, j + D/4, j + D/2 and j + 3D/4 of byte j, the first
in the lowest bits. All pages have the same numbers of salient tokens, because vLLM's pages have
one size; this is a deviation from the paper, whose quota is one for the whole sequence [G].

Keys and values may have quotas of their own (k and v), which the paper does not have [G]. There is
one ranking of a block's tokens: the smaller quota's tokens are among the larger one's. Tokens are
marked by a bit each all the same, in a set of bits for each quota that leaves a choice: a row of a
low plane is then found by counting one set's bits, whichever quota is the larger. Equal quotas
share theirs, and a quota of all tokens or of none needs none, so two sets of N bits, an eighth of a
byte more for each token, are there only where both quotas choose and differ. Marking the smaller
quota within the larger one would save less than that and cost a second count; keeping ranks would
take seven bits for each token instead of one.
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
        k_salient: Tokens of each block whose keys have low bits (k).
        v_salient: Tokens of each block whose values have low bits (v).
    """

    block_size: int
    head_size: int
    k_salient: int
    v_salient: int

    @classmethod
    def of(
        cls,
        block_size: int,
        head_size: int,
        bits: str,
        salient_ratio: float,
        key_salient_ratio: float | None = None,
    ) -> PageFormat:
        """Return the format for the plug-in's options.

        Args:
            block_size: Tokens of a block.
            head_size: Channels.
            bits: Of salient and of other tokens: ``4/2``, or ``4/4`` and ``2/2`` for one class.
            salient_ratio: Share of salient tokens, with ``4/2``.
            key_salient_ratio: The same of keys, where it is not that of values.
        """
        of_keys = salient_ratio if key_salient_ratio is None else key_salient_ratio
        shares = {"4/2": (of_keys, salient_ratio), "4/4": (1.0, 1.0), "2/2": (0.0, 0.0)}
        return cls(block_size, head_size, *(round(share * block_size) for share in shares[bits]))

    @property
    def quotas(self) -> tuple[int, int]:
        """Salient tokens of each block: of keys, of values."""
        return self.k_salient, self.v_salient

    @property
    def chooses(self) -> bool:
        """Whether there is a choice of salient tokens to be made."""
        return any(0 < quota < self.block_size for quota in self.quotas)

    @property
    def marked(self) -> tuple[int, ...]:
        """Whose salient tokens have bits: 0 for keys, 1 for values; equal quotas share keys'.

        Where nothing is chosen there are the values' all the same.
        """
        if not 0 < self.k_salient < self.block_size:
            return (1,)
        differ = self.v_salient != self.k_salient
        return (0, 1) if differ and 0 < self.v_salient < self.block_size else (0,)

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
        """Low bits of the salient tokens' keys, uint8, shape (k, D / 4)."""
        return self.v_high + self.block_size * self.row

    @property
    def v_low(self) -> int:
        """Low bits of the salient tokens' values, uint8, shape (v, D / 4)."""
        return self.k_low + self.k_salient * self.row

    @property
    def k_min(self) -> int:
        """Least key of each channel, float16, shape (D,)."""
        return self.v_low + self.v_salient * self.row

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
    def k_bitmap(self) -> int:
        """Whether each token's key is salient, N bits, the first in the first byte's lowest bit.

        It is `v_bitmap` where there is one set of bits alone (`marked`).
        """
        return self.v_step + 2 * self.block_size

    @property
    def v_bitmap(self) -> int:
        """As `k_bitmap`, of values."""
        return self.k_bitmap + (len(self.marked) - 1) * self.block_size // 8

    @property
    def size(self) -> int:
        """Bytes in use."""
        return self.v_bitmap + self.block_size // 8

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

"""What the kernels are told: a batch and the state of blocks, all of it on the device.

Which request a row of a batch is, is not known on the host without waiting, and not needed: a block
that is written belongs to one request, so what a step does to a request stands in a table by the
block that it writes last. Where that block is says the slot of the row's last token; a row that is
there for padding has no tokens, or slots below zero.
"""

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl

# Of a record in the table of parts: residual row, first block that is scored, whether its sums
# start from zero, first probe and number of probes; filled up to one sector of memory.
FIELDS = tl.constexpr(8)
# The residual row of a block that no request writes.
NOBODY = -2


@dataclass(frozen=True)
class DeviceBatch:
    """One batch and the tables that say what becomes of blocks; every tensor on the device.

    Attributes:
        query_start: First token of each row, int32, shape (n + 1,).
        seq_lens: Length of each row's sequence with this step's tokens, int32, shape (n,).
        block_table: int32, shape (n, blocks), the last axis contiguous.
        slots: Block times block size plus offset of each token, below zero for padding, int64.
        state: Where each block's tokens are, while and after this batch is written, int32, shape
            (cache blocks,).
        parts: Records by block, int32, shape (cache blocks, `FIELDS`).
        probes: Probes of all requests, counted from their request's first token, int32.
        rows: All rows, those with one token first to be served; int32, 0 to n - 1 at least.
        prompts: Rows with more tokens than one, int32, or None where there are none.
        tiles: Row and first token of each tile of such rows' queries, int32, shape (tiles, 2); the
            ones that read most first.
        longest: Upper bound of a row's tokens.
        blocks: Upper bound of a sequence's blocks.
        single: Whether there are rows with one token.
    """

    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slots: torch.Tensor
    state: torch.Tensor
    parts: torch.Tensor
    probes: torch.Tensor
    rows: torch.Tensor
    prompts: torch.Tensor | None
    tiles: torch.Tensor | None
    longest: int
    blocks: int
    single: bool


@dataclass(frozen=True)
class Workspace:
    """What layers share, one after the other.

    Attributes:
        partial: Outputs of splits, float32, shape (rows, kv heads, splits, group, head size).
        split_lse: Their log-sum-exp to base two, float32, shape (rows, kv heads, splits, group).
        lse: Of whole rows, float32, shape (tokens, heads).
    """

    partial: torch.Tensor
    split_lse: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def take(
        cls, rows: int, tokens: int, heads: int, kv_heads: int, head_size: int, splits: int,
        device: torch.device | str,
    ) -> "Workspace":  # fmt: skip
        """Take it.

        Args:
            rows: Most rows of a batch.
            tokens: Most tokens of a batch.
            heads: Query heads.
            kv_heads: Heads of keys and values.
            head_size: Elements of a head.
            splits: Of a sequence in decode.
            device: Where.
        """
        shape = (rows, kv_heads, splits, heads // kv_heads)
        return cls(
            torch.zeros((*shape, head_size), device=device),
            torch.zeros(shape, device=device),
            torch.zeros((tokens, heads), device=device),
        )

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


@triton.jit
def row_of_batch(
    query_start: tl.tensor, seq_lens: tl.tensor, m: tl.tensor
) -> tuple[tl.tensor, ...]:
    """Return a row's first token, its tokens, and the position of the first one."""
    start = tl.load(query_start + m)
    length = tl.load(query_start + m + 1) - start
    return start, length, tl.load(seq_lens + m) - length


@triton.jit
def part_of_row(
    parts: tl.tensor, slots: tl.tensor, last_token: tl.tensor, block_size: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """Return a row's record, and whether there is one, by the slot of its last token."""
    slot = tl.load(slots + last_token)
    record = parts + tl.maximum(slot, 0) // block_size * FIELDS
    return record, slot >= 0

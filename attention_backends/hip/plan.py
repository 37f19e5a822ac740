"""What one layer prunes: InfiniteHiP's constants, resolved for a layer."""

from __future__ import annotations

from dataclasses import dataclass

# Queries that share a selection (b_q of the paper). Blocks start at multiples of it in absolute
# position, so that cutting a prompt into chunks of whole blocks changes nothing.
QUERY_BLOCK = 64
# A block of up to so many is a decode, with the drafts that it verifies: all of them are scored.
FEW_QUERIES = 8


@dataclass(frozen=True)
class Stage:
    """One pruning stage (arXiv 2502.08910, section 3.1).

    Attributes:
        chunk: Keys of a chunk, of which one score is computed (l_c), a power of two.
        keep: Keys that survive the stage (k), a multiple of ``chunk``.
        query_stride: Only every so many-th query of a long block takes part in scoring.
    """

    chunk: int
    keep: int
    query_stride: int = 1

    @property
    def keep_chunks(self) -> int:
        """Chunks that survive the stage."""
        return self.keep // self.chunk


@dataclass(frozen=True)
class LayerPlan:
    """What a sparse layer attends to and how it finds it.

    Attributes:
        sink: First keys of a sequence, always attended to (n_sink).
        window: Last keys up to the query block's first query, always attended to (n_stream).
        overlap: While decoding, keys of the window that are candidates as well. Kept selections
            grow old while the window moves on; the overlap covers what leaves it meanwhile.
        stages: From coarse to fine; the last one's survivors are attended to.
        centre: Whether a range of keys is represented by its centre, as in the published code, or
            by its first key, as in the paper.
    """

    sink: int
    window: int
    overlap: int
    stages: tuple[Stage, ...]
    centre: bool = True

    @property
    def top_k(self) -> int:
        """Keys that are selected besides sink and window."""
        return self.stages[-1].keep

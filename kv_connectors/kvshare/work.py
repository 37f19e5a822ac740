"""What blending costs beside the rows it computes, in tokens through all layers.

A pass of the partial forward holds ``max_num_seqs`` runs of rows, so scattered rows take more
passes where that is small. Rows between two runs may then cost less than the passes that they save.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# What loading a token's KV in all layers costs. A guess: with 8B parameters it is 128 KiB, 5 us
# over a bus of 25 GB/s, and prefill takes 40 us at 400 TFLOP/s.
LOAD_COST = 1 / 8
# What a pass costs beside its rows. Measured on a CPU: 21 with 30 layers of width 576, 39 with 4
# small ones. Where it is bound by launching kernels it is more.
PASS_COST = 32
# Share of a layer that its keys and values take: its first norm and the fused projection. Of the
# weights of 8B models it is 0.12, of SmolLM2-135M 0.16.
PROJECTION = 1 / 8


@dataclass(frozen=True)
class PassSize:
    """What one pass of the partial forward holds.

    Attributes:
        runs: Most runs of consecutive rows, ``max_num_seqs``.
        rows: Most rows.
    """

    runs: int
    rows: int

    def cost(self, rows: float, runs: float = 1, hole: float = 0) -> float:
        """Return about what rows cost with their passes, in tokens through the same layers.

        Args:
            rows: Rows to compute.
            runs: Runs that they stand in.
            hole: Mean number of other rows between two runs, which are computed where that is
                cheaper than another pass.
        """
        passes = max(1.0, rows / self.rows)
        return rows + PASS_COST * passes + max(0.0, runs - self.runs) * self._seam(hole)

    def _seam(self, hole: float) -> float:
        return min(hole, PASS_COST / self.runs)


def bridged(wanted: np.ndarray, max_runs: int) -> np.ndarray:
    """Return a mask with those holes filled whose rows cost less than the passes they save.

    Holes of a single row always are: a row more, but one virtual request less.

    Args:
        wanted: Rows of a span to compute; bool, shape (n,).
        max_runs: Runs of rows that a pass holds.
    """
    edges = np.flatnonzero(np.diff(np.concatenate(([False], wanted, [False]))))
    starts, ends = edges[2::2], edges[1:-1:2]
    holes = starts - ends
    smallest = np.argsort(holes, kind="stable")
    rows = np.concatenate(([0], np.cumsum(holes[smallest])))
    passes = -(-(len(rows) - np.arange(len(rows))) // max_runs)
    single = int(np.count_nonzero(holes == 1))
    count = single + int(np.argmin((rows + PASS_COST * passes)[single:]))
    depth = np.zeros(len(wanted) + 1, np.int64)
    depth[ends[smallest[:count]]] = 1
    depth[starts[smallest[:count]]] -= 1
    return wanted | (np.cumsum(depth)[:-1] > 0)

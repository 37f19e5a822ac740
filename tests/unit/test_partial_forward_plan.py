"""How rows become virtual requests and passes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

# The module needs vLLM's attention metadata, though these functions do not.
partial_forward = pytest.importorskip(
    "vllm_plugins.engine.partial_forward", reason="vLLM is not installed"
)

positions = st.lists(st.integers(0, 400), min_size=1, max_size=80, unique=True).map(
    lambda values: np.array(sorted(values), dtype=np.int64)
)


@given(st.lists(positions, min_size=1, max_size=4))
def test_every_row_has_the_causal_limit_of_its_own_position(parts):
    batch = partial_forward.virtual_batch(parts)
    limits, sources = [], []
    for run in range(batch.runs):
        length = batch.starts[run + 1] - batch.starts[run]
        # Bottom-right causal: row i of a run of n sees the first end - n + i + 1 positions.
        limits += [batch.ends[run] - length + i + 1 for i in range(length)]
        sources += [batch.tables[run]] * length
    assert limits == [position + 1 for part in parts for position in part]
    assert sources == [i for i, part in enumerate(parts) for _ in part]


@given(st.lists(positions, min_size=1, max_size=4), st.integers(1, 8), st.integers(1, 50))
def test_passes_hold_every_row_once_in_order_within_their_limits(parts, max_runs, max_rows):
    seen = [[] for _ in parts]
    for pieces in partial_forward.plan_passes(parts, max_runs, max_rows):
        taken = [parts[piece.source][piece.begin : piece.end] for piece in pieces]
        assert all(len(rows) for rows in taken)
        # A request's later rows read what its earlier ones wrote, so they cannot share a pass
        # unless they are one piece.
        assert len({piece.source for piece in pieces}) == len(pieces)
        assert partial_forward.virtual_batch(taken).runs <= max_runs
        assert sum(map(len, taken)) <= max_rows
        for piece, rows in zip(pieces, taken, strict=True):
            seen[piece.source].extend(rows)
    assert [list(part) for part in parts] == seen


def test_a_pass_is_filled_by_several_requests():
    parts = [np.arange(10), np.arange(5, 25), np.array([3, 9])]
    passes = list(partial_forward.plan_passes(parts, max_runs=8, max_rows=32))
    assert len(passes) == 1
    assert [piece.source for piece in passes[0]] == [0, 1, 2]


def test_slots_follow_the_block_table_through_split_blocks():
    blocks = np.array([7, 2], dtype=np.int32)
    table = partial_forward.kernel_blocks(blocks, 64, 32)
    assert table.tolist() == [14, 15, 4, 5]
    where = np.array([0, 31, 32, 64, 127])
    whole = partial_forward.slot_mapping(blocks, where, 64)
    assert whole.tolist() == [448, 479, 480, 128, 191]
    assert partial_forward.slot_mapping(table, where, 32).tolist() == whole.tolist()

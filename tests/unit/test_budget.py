"""Budgets: the largest aligned step within a limit, never below the decodes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_plugins.engine.cost_model import chunk_work
from vllm_plugins.schedulers.sarathi.budget import Budgets, PendingPrefill, step_work

EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)
BUDGETS = st.builds(
    lambda floor, tiles, tile: Budgets(floor, tiles * tile, tile),
    st.integers(1, 64),
    st.integers(8, 64),
    st.sampled_from([1, 16, 32]),
)


@EXAMPLES
@given(BUDGETS, st.integers(0, 100), st.floats(0.0, 2.0), st.floats(0.0, 0.01))
def test_largest_is_what_trying_all_finds(budgets, decodes, limit, slope):
    def seconds(rows):
        return 0.01 + slope * rows

    found = budgets.largest(seconds, limit, decodes)
    least = budgets.least(decodes)
    choices = range(least, budgets.ceiling + 1, budgets.tile)
    assert found == max((rows for rows in choices if seconds(rows) <= limit), default=least)


@EXAMPLES
@given(BUDGETS, st.integers(0, 2000))
def test_least_budget_is_aligned_and_leaves_room_beside_the_decodes(budgets, decodes):
    least = budgets.least(decodes)
    assert least % budgets.tile == 0
    assert least <= budgets.ceiling
    assert least > decodes or least == budgets.ceiling
    assert least >= min(budgets.floor, budgets.ceiling)


@EXAMPLES
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 300)), max_size=4), st.integers(0, 250)
)
def test_work_is_the_sum_over_single_tokens(chunks, tokens):
    keys = []
    for remaining, context in chunks:
        keys += range(context, context + remaining)
    keys = (keys + list(range(tokens)))[:tokens]
    # A token attends to its context and, on average over a chunk, to half of itself.
    assert PendingPrefill(chunks).work(tokens) == pytest.approx(sum(keys) + tokens / 2)
    assert chunk_work(0, 100) == 0


def test_step_beside_decodes():
    work = step_work(48, 16, 16, 1600, PendingPrefill([(100, 50)]))
    assert (work.rows, work.requests, work.decode_context) == (48, 17, 1600)
    assert work.prefill_work == 32 * (50 + 16)
    assert step_work(16, 16, 16, 1600, PendingPrefill([(100, 50)])).prefill_work == 0

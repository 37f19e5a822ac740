"""Whose selection is whose, and when it is found again."""

import random

import pytest
import torch

from vllm_plugins.attention_backends.hip.mask_cache import UNKNOWN, MaskCache

REFRESH = (16, 8, 4)
CPU = torch.device("cpu")


def step(cache, before, slots, positions, sparse=True):
    width = max(len(x) for x in slots) if slots else 1
    padded = [x + [UNKNOWN] * (width - len(x)) for x in slots]
    rows, level = cache.step(
        torch.tensor(before), torch.tensor(padded).view(len(before), -1),
        torch.tensor(positions, dtype=torch.int32),
        torch.full((len(before),), sparse) if isinstance(sparse, bool) else torch.tensor(sparse),
    )  # fmt: skip
    return rows.tolist(), level.tolist()


def test_stages_run_at_their_own_pace():
    cache, levels = MaskCache(4, 1, REFRESH, CPU), []
    for position in range(100, 133):
        levels += step(cache, [position - 1], [[position]], [position])[1]
    wanted = []
    for position in range(100, 133):
        due = [stage for stage, n in enumerate(REFRESH) if position % n == 0]
        wanted.append(due[0] if due else 3)
    # A newcomer runs all.
    assert levels == [0, *wanted[1:]]


def test_a_newcomer_takes_nobodys_row_and_rows_follow_their_requests():
    cache = MaskCache(3, 1, REFRESH, CPU)
    (a, b), _ = step(cache, [10, 20], [[11], [21]], [41, 41])
    assert a != b
    # The other order, and one more between them.
    rows, levels = step(cache, [21, 50, 11], [[22], [51], [12]], [42, 42, 42])
    assert (rows[0], rows[2]) == (b, a) and len(set(rows)) == 3
    assert levels == [3, 0, 3]


def test_who_misses_a_step_starts_over():
    cache = MaskCache(2, 1, REFRESH, CPU)
    step(cache, [10], [[11]], [41])
    step(cache, [70], [[71]], [41])
    assert step(cache, [11], [[12]], [42])[1] == [0]


def test_no_slot_is_no_identity():
    cache = MaskCache(2, 1, REFRESH, CPU)
    step(cache, [UNKNOWN], [[UNKNOWN]], [41])
    assert step(cache, [UNKNOWN], [[11]], [42])[1] == [0]


def test_dense_rows_keep_nothing_for_later():
    cache = MaskCache(2, 1, REFRESH, CPU)
    step(cache, [10], [[11]], [41], sparse=False)
    assert step(cache, [11], [[12]], [42], sparse=True)[1] == [0]
    assert step(cache, [12], [[13]], [43], sparse=True)[1] == [3]


def test_rejected_drafts_move_a_request_back():
    cache = MaskCache(2, 4, REFRESH, CPU)
    step(cache, [10], [[11, 12, 13, 14]], [41])
    # Only one draft was right: the next step begins behind slot 12.
    assert step(cache, [12], [[13, 14, 15, 16]], [43])[1] == [3]
    # Position 44 was passed, where the last stage was due.
    assert step(cache, [16], [[17]], [47])[1] == [2]


def test_the_whole_window_moves_on_between_refreshes():
    """Every position is at every step in the sink, the window or the range that was searched."""
    window, overlap = 64, 16
    cache, searched = MaskCache(1, 1, REFRESH, CPU), None
    for position in range(300, 400):
        _, (level,) = step(cache, [position - 1], [[position]], [position])
        if level == 0:
            searched = position + 1 - window + overlap
        assert searched >= position + 1 - window


@pytest.mark.parametrize("seed", range(5))
def test_batches_that_come_and_go(seed):
    """Against a dictionary of requests, in any order, with newcomers, leavers and absentees."""
    draw = random.Random(seed)
    cache, next_slot = MaskCache(6, 1, REFRESH, CPU), 0
    live, last, ran = {}, {}, {}
    for _ in range(200):
        for name in [n for n in live if draw.random() < 0.1]:
            del live[name]
        while len(live) < 6 and draw.random() < 0.5:
            next_slot += 1000
            live[next_slot] = [draw.randrange(50, 90), next_slot]
        batch = [n for n in live if draw.random() < 0.9]
        draw.shuffle(batch)
        if not batch:
            continue
        before = [live[n][1] for n in batch]
        for n in batch:
            live[n][0] += 1
            live[n][1] += 1
        rows, levels = step(
            cache, before, [[live[n][1]] for n in batch], [live[n][0] for n in batch]
        )
        assert len(set(rows)) == len(rows)
        for n, row, level in zip(batch, rows, levels, strict=True):
            position = live[n][0]
            if n in last:
                assert row == last[n]
            old = ran.get(n) if n in last else None
            due = [
                i for i, every in enumerate(REFRESH)
                if old is None or position // every != old[i] // every
            ]  # fmt: skip
            assert level == (due[0] if due else 3)
            ran[n] = [position if i >= level else old[i] for i in range(3)]
        last = dict(zip(batch, rows, strict=True))

"""Whose selection is whose, and when it is found again."""

import random

import pytest
import torch

from vllm_plugins.attention_backends.hip.mask_cache import UNKNOWN, MaskCache

REFRESH = (16, 8, 4)
CPU = torch.device("cpu")


def step(cache, before, slots, positions, sparse=True, others=()):
    """Decodes, and slots that other rows of the batch write."""
    width = max(len(x) for x in slots) if slots else 1
    padded = [x + [UNKNOWN] * (width - len(x)) for x in slots]
    written = [*(x for own in slots for x in own), *others]
    rows, level = cache.step(
        torch.tensor(before, dtype=torch.int64),
        torch.tensor(padded, dtype=torch.int64).view(len(before), width),
        torch.tensor(positions, dtype=torch.int32),
        torch.full((len(before),), sparse) if isinstance(sparse, bool) else torch.tensor(sparse),
        torch.tensor(written, dtype=torch.int64),
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


def test_with_a_refresh_at_every_token_nothing_is_used_again():
    cache = MaskCache(4, 1, (1, 1, 1), CPU)
    for position in range(100, 110):
        before, slots = [position - 1, 500 + position], [[position], [501 + position]]
        assert step(cache, before, slots, [position, 2 * position])[1] == [0, 0]


def test_a_newcomer_takes_nobodys_row_and_rows_follow_their_requests():
    cache = MaskCache(3, 1, REFRESH, CPU)
    (a, b), _ = step(cache, [10, 20], [[11], [21]], [41, 41])
    assert a != b
    # The other order, and one more between them.
    rows, levels = step(cache, [21, 50, 11], [[22], [51], [12]], [42, 42, 42])
    assert (rows[0], rows[2]) == (b, a) and len(set(rows)) == 3
    assert levels == [3, 0, 3]


def test_pipeline_stages_that_take_turns_keep_what_each_batch_has_found():
    """With two stages every other batch is another half of the requests."""
    cache, slots = MaskCache(2, 1, REFRESH, CPU), {0: 10, 1: 500}
    levels = {0: [], 1: []}
    for turn in range(24):
        name, position = turn % 2, 41 + turn // 2
        before = slots[name]
        slots[name] += 1
        levels[name] += step(cache, [before], [[slots[name]]], [position])[1]
    # Positions 41 to 52.
    assert levels[0] == levels[1] == [0, 3, 3, 2, 3, 3, 3, 0, 3, 3, 3, 2]


def test_a_slot_that_somebody_else_writes_to_identifies_nobody():
    cache = MaskCache(2, 1, REFRESH, CPU)
    step(cache, [10], [[11]], [41])
    # The request has ended; a prompt is written where it was, and then decodes at its position.
    step(cache, [], [], [], others=[9, 10, 11])
    assert step(cache, [11], [[12]], [42])[1] == [0]


def test_a_request_that_writes_its_drafts_slots_again_keeps_its_own():
    cache = MaskCache(2, 3, REFRESH, CPU)
    step(cache, [10], [[11, 12, 13]], [41])
    assert step(cache, [11], [[12, 13, 14]], [42])[1] == [3]


def test_newcomers_take_the_rows_that_were_not_used_for_longest():
    cache = MaskCache(3, 1, REFRESH, CPU)
    (a,), _ = step(cache, [10], [[11]], [41])
    (b,), _ = step(cache, [20], [[21]], [41])
    (c,), _ = step(cache, [30], [[31]], [41])
    assert {a, b, c} == {0, 1, 2}
    rows, levels = step(cache, [70, 11], [[71], [12]], [41, 42])
    # The first request is here and keeps its row; of the others the second one's is older.
    assert rows == [b, a] and levels == [0, 3]
    assert step(cache, [31], [[32]], [42]) == ([c], [3])
    assert step(cache, [21], [[22]], [42])[1] == [0]


def test_a_full_block_of_two_requests_gives_its_row_to_one():
    cache = MaskCache(4, 1, REFRESH, CPU)
    step(cache, [10], [[11]], [41])
    rows, levels = step(cache, [11, 11], [[300], [400]], [42, 42])
    assert len(set(rows)) == 2 and levels == [3, 0]


def test_who_keeps_nothing_takes_no_row():
    """Rows that pad a graph's batch, and dense ones, may be more than there are rows."""
    cache = MaskCache(2, 1, REFRESH, CPU)
    (a, b), _ = step(cache, [10, 20], [[11], [21]], [41, 41])
    before, slots = [UNKNOWN, 11, UNKNOWN, 21, 50], [[UNKNOWN], [12], [UNKNOWN], [22], [51]]
    rows, levels = step(cache, before, slots, [0, 42, 0, 42, 9], [False, True, False, True, False])
    assert (rows[1], rows[3]) == (a, b) and (levels[1], levels[3]) == (3, 3)
    assert max(rows) < 2


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
    # Position and slot of live requests; row, positions of the last runs and step of all known.
    live, known = {}, {}
    for now in range(200):
        written = []
        for name in [n for n in live if draw.random() < 0.1]:
            _, slot = live.pop(name)
            if name in known and draw.random() < 0.5:
                written.append(slot)
                del known[name]
        while len(live) < 6 and draw.random() < 0.5:
            next_slot += 1000
            live[next_slot] = [draw.randrange(50, 90), next_slot]
        batch = [n for n in live if draw.random() < 0.9]
        draw.shuffle(batch)
        before = [live[n][1] for n in batch]
        for n in batch:
            live[n][0] += 1
            live[n][1] += 1
        rows, levels = step(
            cache, before, [[live[n][1]] for n in batch], [live[n][0] for n in batch],
            others=written,
        )  # fmt: skip
        assert len(set(rows)) == len(rows)
        newcomers = [n for n in batch if n not in known]
        absent = sorted((n for n in known if n not in batch), key=lambda n: known[n][::-2])
        for n in absent[: max(len(known) + len(newcomers) - 6, 0)]:
            del known[n]
        for n, row, level in zip(batch, rows, levels, strict=True):
            position = live[n][0]
            old_row, old, _ = known.get(n, (row, None, 0))
            due = [
                i for i, every in enumerate(REFRESH)
                if old is None or position // every != old[i] // every
            ]  # fmt: skip
            assert row == old_row and level == (due[0] if due else 3)
            known[n] = row, [position if i >= level else old[i] for i in range(3)], now
        held = [row for row, _, _ in known.values()]
        assert len(set(held)) == len(held) <= 6

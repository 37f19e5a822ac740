"""Which blocks a span leaves empty, which rows go on, and the table that is left."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_plugins.engine.block_holes.plan import Hole, plan_hole, plan_step, without_rows
from vllm_plugins.engine.block_holes.view import CompactTables
from vllm_plugins.engine.policy import Step

SIZES = st.sampled_from([16, 32, 64])
# A busy machine is no failure.
UNTIMED = settings(deadline=None)


def test_llava_keeps_128_of_the_115_asked_for():
    hole = plan_hole(35, 35 + 576, 115, 16)
    assert (hole.first_block, hole.blocks, hole.kept) == (10, 28, 128)
    assert (hole.selected, hole.tail) == (125, 3)


@UNTIMED
@given(st.integers(0, 300), st.integers(1, 700), st.integers(0, 800), SIZES)
def test_a_hole_is_the_largest_that_leaves_what_is_wanted(start, length, wanted, size):
    hole = plan_hole(start, start + length, wanted, size)
    assert hole.selected + hole.tail == hole.kept == length - hole.blocks * size
    assert hole.kept >= min(wanted, length)
    if hole.blocks:
        assert start <= hole.begin < hole.behind <= start + length
        assert 0 <= hole.tail < size
        assert hole.kept < max(wanted, hole.tail) + size
    else:
        # No whole block between the wanted tokens and the tail.
        tail = (start + length) % size
        assert -(-(start + max(0, wanted - tail)) // size) >= (start + length) // size


def test_a_spans_last_token_may_have_to_stay():
    hole = plan_hole(16, 160, 36, 32, keep_last=True)
    assert (hole.blocks, hole.selected, hole.tail) == (3, 16, 32)
    assert plan_hole(16, 160, 36, 32).tail == 0
    # A tail holds the last one already, and there may be no hole.
    for start, end, wanted in ((17, 161, 36), (16, 160, 144), (130, 160, 4)):
        found = plan_hole(start, end, wanted, 32, keep_last=True)
        assert found.kept == plan_hole(start, end, wanted, 32).kept


def walk(holes: list[list[Hole]], computed: list[int], ends: list[int]):
    """Plan a step and, as an oracle, position by position, what it must keep and choose from."""
    starts = np.concatenate(([0], np.cumsum(np.subtract(ends, computed)))).astype(np.int32)
    kept, hidden, choices = [], set(), []
    row = 0
    for request, (first, end) in enumerate(zip(computed, ends, strict=True)):
        active = [h for h in holes[request] if h.blocks and (h.start < first or h.end <= end)]
        for position in range(first, end):
            inside = [h for h in active if h.begin <= position < h.behind]
            if inside:
                hidden.add((request, position // inside[0].block_size))
            else:
                kept.append(row)
            row += 1
        for h in active:
            head, behind = max(h.start, first), min(h.behind, end)
            if head < h.begin < behind:
                at = int(starts[request]) + head - first
                choices.append((request, at, behind - head, h.begin - head))
    return plan_step(holes, starts, np.array(ends)), kept, hidden, choices


@st.composite
def steps(draw):
    size = draw(SIZES)
    holes, computed, ends = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        position, own = draw(st.integers(0, 40)), []
        for _ in range(draw(st.integers(0, 3))):
            length = draw(st.integers(1, 200))
            own.append(plan_hole(position, position + length, draw(st.integers(0, 200)), size))
            position += length + draw(st.integers(0, 20))
        end = draw(st.integers(1, position + 40))
        first = draw(st.integers(0, end - 1))
        holes.append(own)
        computed.append(first // size * size)
        ends.append(end)
    return holes, computed, ends


@UNTIMED
@given(steps())
def test_a_step_keeps_what_an_oracle_keeps(step):
    plan, kept, hidden, choices = walk(*step)
    if plan is None:
        assert not hidden
        return
    assert plan.rows.tolist() == kept
    assert set(map(tuple, plan.hidden.T.tolist())) == hidden
    assert [(c.request, c.first_row, c.candidates, c.selected) for c in plan.choices] == choices
    for choice in plan.choices:
        chosen = plan.rows[choice.at : choice.at + choice.selected]
        np.testing.assert_array_equal(chosen, choice.first_row + np.arange(choice.selected))
    assert plan.starts[-1] == len(kept)
    assert plan.longest == np.diff(plan.starts).max()


def test_an_image_that_goes_on_in_the_next_step_keeps_its_rows():
    hole = plan_hole(5, 300, 20, 32)
    assert plan_step([[hole]], np.array([0, 200]), np.array([200])) is None


@pytest.mark.parametrize("cached", [0, 32, 64, 96, 128, 160])
def test_after_a_hit_no_row_of_the_hole_is_left(cached):
    hole = plan_hole(5, 150, 40, 32)
    plan = plan_step([[hole]], np.array([0, 180 - cached]), np.array([180]))
    if cached >= hole.behind:
        assert plan is None
        return
    positions = plan.rows + cached
    assert not np.any((positions >= hole.begin) & (positions < hole.behind))
    assert bool(plan.choices) == (cached < hole.begin)


@UNTIMED
@given(steps(), st.data())
def test_further_rows_are_left_out_behind_the_media(step, data):
    holes, computed, ends = step
    starts = np.concatenate(([0], np.cumsum(np.subtract(ends, computed)))).astype(np.int32)
    plan = plan_step(holes, starts, np.array(ends))
    behind = []
    for request, own in enumerate(holes):
        last = max((hole.end for hole in own), default=0)
        shift = int(starts[request]) - computed[request]
        behind += range(max(last, computed[request]) + shift, ends[request] + shift)
    dropped = np.array(sorted(data.draw(st.sets(st.sampled_from(behind)))) if behind else [], int)
    less = without_rows(plan, starts, dropped)
    before = np.arange(starts[-1]) if plan is None else plan.rows
    assert less.rows.tolist() == [row for row in before if row not in set(dropped)]
    for request in range(len(ends)):
        mine = less.rows[less.starts[request] : less.starts[request + 1]]
        assert np.all((mine >= starts[request]) & (mine < starts[request + 1]))
    assert less.starts[-1] == len(less.rows)
    for choice in less.choices:
        assert less.rows[choice.at] == choice.first_row
    assert less.hidden.shape[0] == 2


@UNTIMED
@given(st.integers(0, 200), st.integers(1, 700), st.integers(0, 700), st.sampled_from([1, 2, 4]))
def test_a_hole_in_smaller_blocks_is_the_same(start, length, wanted, split):
    hole = plan_hole(start, start + length, wanted, 64)
    small = hole.in_blocks_of(64 // split)
    assert (small.selected, small.tail, small.kept) == (hole.selected, hole.tail, hole.kept)
    assert not hole.blocks or (small.begin, small.behind) == (hole.begin, hole.behind)


@UNTIMED
@given(st.data())
def test_the_table_without_holes(data):
    size = data.draw(SIZES)
    requests, width = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 12))
    blocks = requests * width + 1
    ids = torch.randperm(blocks - 1)[: requests * width].reshape(requests, width).int() + 1
    lengths = torch.tensor(
        data.draw(st.lists(st.integers(0, width * size), min_size=requests, max_size=requests)),
        dtype=torch.int32,
    )
    flags = torch.tensor(data.draw(st.lists(st.booleans(), min_size=blocks, max_size=blocks)))
    common = SimpleNamespace(block_table_tensor=ids, seq_lens=lengths)
    buffers = CompactTables.empty(requests + 1, width, torch.device("cpu"))
    tables, seen = buffers.fill(flags, common, size)
    assert tables.data_ptr() == buffers.tables.data_ptr()
    for row, length in enumerate(lengths.tolist()):
        used = ids[row, : -(-length // size)].tolist()
        left = [block for block in used if not flags[block]]
        assert tables[row].tolist() == left + [0] * (width - len(left))
        tokens = [min(size, length - size * column) for column in range(len(used))]
        kept = [n for n, block in zip(tokens, used, strict=True) if not flags[block]]
        assert int(seen[row]) == sum(kept)


def media(first: int, last: int) -> SimpleNamespace:
    """An image whose tokens are [first, last]."""
    place = SimpleNamespace(extract_embeds_range=lambda: [(first, last)])
    return SimpleNamespace(mm_position=place)


class Core:
    """The part of an engine's core that frees holes: a pool, its manager and the policy."""

    def __init__(self, keep_last: bool = False) -> None:
        from vllm.v1.core.block_pool import BlockPool

        from vllm_plugins.engine.block_holes.freeing import HoleManager, HolePolicy, HoleSpec
        from vllm_plugins.engine.policy import SchedulerFacts
        from vllm_plugins.metrics import Metrics
        from vllm_plugins.visual_tokens.dynamic_llava.metrics import FREED

        spec = HoleSpec(block_size=16, num_kv_heads=1, head_size=16, dtype=torch.float32)
        self.pool = BlockPool(64, False, 16)
        self.manager = HoleManager(spec, self.pool, False, 0, 16)
        coordinator = SimpleNamespace(single_type_managers=(self.manager,))
        managers = SimpleNamespace(coordinator=coordinator)
        self.policy = HolePolicy(
            lambda span: plan_hole(*span, 20, 16, keep_last), FREED, "forgetful"
        )
        facts = SchedulerFacts(100, 1, 1, lambda: 0.0, kv_cache_manager=managers)
        self.policy.bind(facts, Metrics([FREED], {}))

    def add(self, name: str, first: int, last: int) -> None:
        request = SimpleNamespace(
            request_id=name, mm_features=[media(first, last)], resumable=False
        )
        self.policy.added(request, 0.0)
        self.manager.allocate_new_blocks(name, last + 1, last + 1)

    def schedule(self, **tokens: int) -> Step:
        """Allot blocks for a step after which requests have so many tokens."""
        for name, number in tokens.items():
            wanted = self.manager.get_num_blocks_to_allocate(name, number, (), 0, 0, number)
            assert wanted == len(self.manager.allocate_new_blocks(name, number, number))
        step = Step(None, SimpleNamespace(num_scheduled_tokens=tokens), 0.0)
        self.policy.scheduled(step)
        return step

    def complete(self, step: Step, **forgotten: int) -> None:
        """Have the worker tell how many tokens are forgotten after a step."""
        step.reports = {"forgetful": forgotten}
        self.policy.completed(step)

    def blocks(self, name: str) -> int:
        return len(self.manager.req_to_blocks[name])

    def compute(self, name: str, tokens: int) -> int:
        """Return how many blocks are given back when so many tokens are computed."""
        before = self.pool.get_num_free_blocks()
        self.manager.remove_skipped_blocks(name, tokens)
        return self.pool.get_num_free_blocks() - before


def test_two_engines_of_a_process_free_their_own_holes():
    """Requests of both may have the same name, and one engine may end before the other."""
    first = Core()
    first.add("0", 0, 159)
    second = Core()
    second.add("0", 0, 95)
    assert first.compute("0", 159) == 0
    assert first.compute("0", 160) == plan_hole(0, 160, 20, 16).blocks == 8
    assert second.compute("0", 96) == 4
    second.policy.forget(["0"])
    first.policy.forget(["0", "never seen"])
    assert not first.manager.holes and not second.manager.holes


def session(*spans: tuple[int, int]) -> SimpleNamespace:
    """A request to which more may be added, with images on [first, last]."""
    ended: list[bool] = []
    return SimpleNamespace(
        request_id="0",
        resumable=True,
        mm_features=[media(*span) for span in spans],
        ended=ended,
        is_finished=lambda: bool(ended),
    )


def test_a_session_gains_images_where_vllm_has_put_them():
    core = Core()
    talk = session((0, 159))
    core.policy.added(talk, 0.0)
    # Its next turn waits, and has positions of its own.
    core.policy.added(session((0, 95)), 0.0)
    core.policy.plan(None)
    assert [hole.end for hole in core.manager.holes["0"]] == [160]
    talk.mm_features.append(media(200, 359))
    core.policy.plan(None)
    assert [hole.end for hole in core.manager.holes["0"]] == [160, 360]
    # Sessions may take a token back, so what is told of them is no lower bound.
    core.complete(core.schedule(**{"0": 400}), **{"0": 50})
    assert core.policy._forgotten.of("0") == 0


def test_a_session_that_takes_back_a_token_behind_its_image_has_its_hole_nevertheless():
    core = Core(keep_last=True)
    core.policy.added(session((0, 159)), 0.0)
    core.manager.allocate_new_blocks("0", 160, 160)
    # All of the prompt is computed, and one token more, which is under way and taken back.
    assert core.compute("0", 160 - 1) == plan_hole(0, 160, 20, 16, keep_last=True).blocks > 0


def test_a_session_that_comes_again_before_its_end_is_told_of_is_not_forgotten():
    core = Core()
    core.policy.added(ended := session((0, 159)), 0.0)
    ended.ended.append(True)
    core.policy.added(again := session((0, 95)), 0.0)
    core.policy.forget(["0"])
    assert [hole.end for hole in core.manager.holes["0"]] == [96]
    again.ended.append(True)
    core.policy.forget(["0"])
    assert not core.manager.holes and not core.policy._sessions


def test_forgotten_tokens_need_no_blocks():
    core = Core()
    core.schedule(a=33, b=16)
    assert (core.blocks("a"), core.blocks("b")) == (3, 1)
    # Two steps are scheduled before the first of them is told of.
    first, second = core.schedule(a=48, b=17), core.schedule(a=49, b=18)
    assert (core.blocks("a"), core.blocks("b")) == (4, 2)
    core.complete(first, a=10, b=0)
    core.complete(second, a=11, b=1)
    core.schedule(a=75, b=33)
    assert (core.blocks("a"), core.blocks("b")) == (4, 2)
    core.schedule(a=76, b=34)
    assert (core.blocks("a"), core.blocks("b")) == (5, 3)


def test_what_is_told_late_of_a_request_that_gave_its_blocks_back_is_nothing_new():
    core = Core()
    free = core.pool.get_num_free_blocks()
    late, later = core.schedule(a=40), core.schedule(a=41, b=5)
    core.complete(late, a=8)
    core.manager.free("a")
    # Computed anew, it has forgotten nothing, while a step from before is still told of.
    anew = core.schedule(a=41)
    core.complete(later, a=9, b=0)
    core.schedule(a=49)
    assert core.blocks("a") == 4
    core.complete(anew, a=9)
    core.schedule(a=73)
    assert core.blocks("a") == 4
    for name in ("a", "b"):
        core.manager.free(name)
    assert core.pool.get_num_free_blocks() == free
    assert not len(core.policy._forgotten)

"""The slices between two steps: who may go on, together on all ranks, and who is given up."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.unit.kvshare_kv import FakePages, some_save
from vllm_plugins.kv_connectors.kvshare import worker_side
from vllm_plugins.kv_connectors.kvshare.blend import Blend, Kitchen
from vllm_plugins.kv_connectors.kvshare.payloads import Payloads, State
from vllm_plugins.kv_connectors.kvshare.refresh import Stale
from vllm_plugins.kv_connectors.kvshare.transfer import Orders, Refresh, Reuse, Source
from vllm_plugins.kv_connectors.kvshare.work import LOAD_COST, PASS_COST


class StubBlend:
    """A request in the making of which only the order of its slices matters."""

    def __init__(self, name, states, slices=2):
        self.reuse = Reuse(name, NONE, 0, (), NONE, True)
        self.states, self.left, self.spent, self.closed = list(states), slices, [], False
        self.recomputed = 0

    def state(self):
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def advance(self, budget):
        self.spent.append(budget)
        self.left -= 1
        return self.left == 0, min(budget, 60.0)

    def close(self):
        self.closed = True


NONE = np.zeros(0, dtype=np.int32)


@pytest.fixture
def side(monkeypatch):
    alone = SimpleNamespace(world_size=1)
    monkeypatch.setattr(worker_side, "get_tp_group", lambda: alone)
    options = SimpleNamespace(fix_tokens_per_step=100, decode_interval=0, decode_k=512)
    made = worker_side.WorkerSide(options)
    payloads = Payloads(FakePages())
    pages = SimpleNamespace(block_size=16)
    made._kitchen = SimpleNamespace(payloads=payloads, pages=pages, forward=None)
    return made


def add(side, *blends):
    for blend in blends:
        side._blends[blend.reuse.request_id] = blend


def test_who_waits_for_the_disk_costs_the_others_nothing(side):
    slow = StubBlend("slow", [State.WAITING, State.WAITING, State.READY])
    quick = StubBlend("quick", [State.READY])
    add(side, slow, quick)
    side.between_steps(Orders())
    side.between_steps(Orders())
    assert (slow.spent, quick.spent) == ([], [100.0, 100.0])
    assert side.take_ready(set()) == {"quick"}
    assert quick.closed
    side.between_steps(Orders())
    assert slow.spent == [100.0]


def test_who_came_first_goes_first(side):
    first, second = StubBlend("a", [State.READY]), StubBlend("b", [State.READY])
    add(side, first, second)
    side.between_steps(Orders())
    assert (first.spent, second.spent) == ([100.0], [40.0])


def test_looks_are_taken_together_and_off_the_slice(side, monkeypatch):
    looked = []

    def refresh(looks, most, pages, forward):
        looked.append(([order.request_id for order, _ in looks], most))
        return [30, 8]

    monkeypatch.setattr(worker_side, "refresh", refresh)
    for name, allowance in (("a", 5), ("b", 9), ("spent", 0)):
        side._stale[name] = Stale(np.arange(50), np.ones(50, np.float32), allowance, NONE)
    blend = StubBlend("c", [State.READY])
    add(side, blend)
    names = ("a", "spent", "b", "unknown")
    side.between_steps(Orders(refreshes=[Refresh(name, 60, 1, NONE) for name in names]))
    assert looked == [(["a", "b"], 100)]
    assert blend.spent == [60.0]
    assert side.take_results().refreshed == {"a": 30, "b": 8, "spent": 0, "unknown": 0}
    assert set(side._stale) == {"a", "b"}


def test_a_slice_bounds_what_is_loaded_in_a_step():
    pages, written = FakePages(), []
    pages.block_size = 16
    pages.write = lambda layer, keys, values, slots: written.append(layer)
    payloads = Payloads(pages)
    payloads.save([some_save(7, tokens=40)], torch.arange(40))
    blocks, sources = np.arange(3, dtype=np.int32), (Source(0, 40, 7, 0, 0, True),)
    reuse = Reuse("r", np.zeros(40, np.int32), 0, sources, blocks, exact=True)
    blend = Blend(reuse, Kitchen(pages, None, payloads, lambda keys, source, target: keys, None))
    layer = LOAD_COST * 40 / pages.num_layers
    assert blend.advance(1.5 * layer) == (False, pytest.approx(2 * layer))
    assert written == [0, 1]
    assert blend.advance(1.5 * layer) == (True, pytest.approx(layer))
    assert written == [0, 1, 2]


def test_a_pass_costs_something_beside_its_rows():
    """Eight runs a pass: scattered rows need many of them, which is what they cost."""
    from vllm_plugins.engine.partial_forward import Rows, plan_passes

    def split(rows):
        for [piece] in plan_passes([rows.positions], 8, 100):
            yield rows.take(slice(piece.begin, piece.end))

    forward = SimpleNamespace(split=split, run=lambda parts, layers: None)
    pages, payloads = FakePages(), Payloads(FakePages())
    sources = (Source(0, 40, 7, 0, 0, True),)
    reuse = Reuse("r", np.zeros(80, np.int32), 0, sources, NONE, exact=False)
    blend = Blend(reuse, Kitchen(pages, forward, payloads, None, None))
    rows = Rows(np.arange(0, 80, 2), NONE, np.zeros(40, np.int32))
    costs = list(blend._run(rows, range(1, pages.num_layers)))
    assert costs == pytest.approx([(8 + PASS_COST) * 2 / 3] * 5)


def test_a_failure_ends_the_slice_and_the_request(side):
    bad = StubBlend("bad", [State.FAILED])
    good = StubBlend("good", [State.READY])
    add(side, good, bad)
    side.between_steps(Orders())
    assert good.spent == bad.spent == []
    assert bad.closed
    assert side.take_ready(set()) == {"bad"}
    assert side.take_results().failed == {"bad"}
    side.between_steps(Orders())
    assert good.spent == [100.0]


def test_a_cancelled_request_lets_go(side):
    waiting = StubBlend("w", [State.WAITING])
    add(side, waiting)
    side.between_steps(Orders(cancelled=["w", "unknown"]))
    assert waiting.closed
    assert side.take_ready(set()) == {"w"}


def test_ranks_wait_for_the_slowest_and_fail_together(side, monkeypatch):
    """What this rank has ready is of no use while another has not."""
    others = {
        "one": [State.WAITING, State.READY, State.READY],
        "two": [State.READY, State.READY, State.FAILED],
    }
    step = iter(range(3))

    def least(values, operation, group):
        number = next(step)
        there = [others[name][number] for name in side._blends]
        values.copy_(torch.minimum(values, torch.tensor(there, dtype=values.dtype)))

    group = SimpleNamespace(world_size=2, cpu_group=None)
    monkeypatch.setattr(worker_side, "get_tp_group", lambda: group)
    monkeypatch.setattr(torch.distributed, "all_reduce", least)
    one, two = (StubBlend(name, [State.READY], slices=9) for name in ("one", "two"))
    add(side, one, two)
    side.between_steps(Orders())
    assert (one.spent, two.spent) == ([], [100.0])
    side.between_steps(Orders())
    assert (one.spent, two.spent) == ([100.0], [100.0, 40.0])
    side.between_steps(Orders())
    assert side.take_results().failed == {"two"}
    assert side.take_results() is None

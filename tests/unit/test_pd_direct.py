"""Pulls out of mapped caches over the real wire: wanted blocks arrive, and no other changes."""

import gc
import threading
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.pd_direct import DirectReader, DirectWriter, mapped_bytes
from tests.pd_problem import (
    ALL_HEADS,
    BLOCK_BYTES,
    BLOCKS,
    DIGEST,
    GROUPS,
    HEADS,
    MODEL,
    NEXT,
    OLD,
    PIECE_BYTES,
    PROMPT,
    TOKENS,
    WIDTH,
    Prompt,
    frees,
    part,
    whole_model,
)
from tests.unit.wire_ends import wait_until
from vllm_plugins.kv_connectors.pd import prefill_worker, protocol
from vllm_plugins.kv_connectors.pd.geometry import Heads
from vllm_plugins.kv_connectors.pd.orders import Chunk, Hold, Orders

pytestmark = pytest.mark.usefixtures("pd_nothing_left")


@pytest.fixture(autouse=True)
def _nothing_mapped(pd_nothing_left, ends, caplog, monkeypatch):
    monkeypatch.setattr(prefill_worker, "DIRECT_BYTES", PIECE_BYTES)
    yield
    # What was logged keeps errors, these their frames, and those mapped memory.
    caplog.get_records("call").clear()
    while ends:
        ends.pop().close()
    # Workers and servers know each other.
    gc.collect()
    wait_until(lambda: not mapped_bytes())


def writers_of(ends, whole, tp=1, pp=1, **changes):
    names = list(whole)
    made = []
    for stage in range(pp):
        layers = names[stage * len(names) // pp : (stage + 1) * len(names) // pp]
        for rank in range(tp):
            heads = Heads.of_rank(HEADS, rank, tp)
            made.append(DirectWriter(part(whole, heads, layers), heads, **changes))
    ends += made
    return made


def readers_of(ends, whole, tp=1, **changes):
    made = []
    for rank in range(tp):
        heads = Heads.of_rank(HEADS, rank, tp)
        made.append(DirectReader(part(whole, heads), heads, rank=rank, required=True, **changes))
    for reader in made:
        reader.worker.introduce([one.pages.shard for one in made])
    ends += made
    return made


def pulls(writers, readers, *prompts):
    """Pull prompts from all writers to all readers, and check what came and what was freed."""
    for writer in writers:
        for prompt in prompts:
            writer.hold(prompt)
    for reader in readers:
        reader.pull(*prompts, peers=[writer.peer(unix=True) for writer in writers])
    for reader in readers:
        assert reader.wait(len(prompts)) == set()
        reader.check(MODEL, *prompts)
    for writer in writers:
        frees(writer, *(prompt.name for prompt in prompts))


def test_a_prompt_arrives_whole_and_is_counted(ends):
    (writer,), (reader,) = writers_of(ends, MODEL), readers_of(ends, OLD)
    pulls([writer], [reader], PROMPT)
    received, failures, seconds = reader.worker.take_counts()
    size = HEADS * BLOCK_BYTES * (6 + 4 + 6)
    assert (dict(received), dict(failures), len(seconds)) == ({"cuda_ipc": size}, {}, 1)
    assert writer.worker.take_counts() == (size, 0)


def test_caches_are_mapped_once_however_many_pull(ends):
    (writer,), (reader,) = writers_of(ends, MODEL), readers_of(ends, OLD)
    prompts = [
        replace(Prompt.of(f"t{i}", (8, 8), skip=0),
                source=(list(range(8 * i, 8 * i + 8)), list(range(8 * i, 8 * i + 8))[::-1]),
                targets=(list(range(56 - 8 * i, 64 - 8 * i)), list(range(8 * i, 8 * i + 8))))
        for i in range(1, BLOCKS // 8)
    ]  # fmt: skip
    pulls([writer], [reader], *prompts)
    assert reader.direct.opened == len(GROUPS)


@pytest.mark.parametrize("most", [None, 2], ids=["by bytes", "by block ids"])
def test_a_long_prompt_comes_in_pieces_of_all_the_groups_layers(ends, monkeypatch, most):
    sent = []
    if most is not None:
        monkeypatch.setattr(prefill_worker, "DIRECT_BYTES", 1 << 20)
        monkeypatch.setattr(prefill_worker, "MAX_PIECE_BLOCKS", most)
    (writer,), (reader,) = writers_of(ends, MODEL), readers_of(ends, OLD)
    copy = reader.pages.copy

    def noted(source, layers, blocks, targets, heads):
        sent.append((list(layers), len(blocks)))
        copy(source, layers, blocks, targets, heads)

    monkeypatch.setattr(reader.pages, "copy", noted)
    # Block 0 is no prompt's.
    source = list(range(60, 0, -1)), [62, *range(1, 61)]
    pulls([writer], [reader], replace(Prompt.of("long", (60, 61), skip=3), source=source))
    assert sorted(sent) == sorted(
        [(["layer.0", "layer.2"], 2)] * 28 + [(["layer.0", "layer.2"], 1)]
        + [(["layer.1"], 2)] * 29
    )  # fmt: skip


@pytest.mark.parametrize(
    ("write_tp", "write_pp", "read_tp"), [(2, 1, 1), (1, 1, 2), (1, 2, 1), (4, 2, 2), (2, 3, 4)]
)
def test_unequal_parallelism_is_intersection_of_intervals(ends, write_tp, write_pp, read_tp):
    pulls(writers_of(ends, MODEL, write_tp, write_pp), readers_of(ends, OLD, read_tp), PROMPT, NEXT)


def test_writers_of_which_nobody_reads_free_their_blocks_too(ends):
    one = {name: cache[:, :1] for name, cache in MODEL.items()}
    writers = [DirectWriter(part(one, Heads(0, 1)), Heads(0, 1)) for _ in range(2)]
    reader = DirectReader(part(OLD, Heads(0, 1)), Heads(0, 1))
    ends += [*writers, reader]
    pulls(writers, [reader], PROMPT)


def in_one_storage(whole):
    """Layers behind one another in each block, tokens outside of heads."""
    names = list(whole)
    pool = torch.zeros(BLOCKS, len(names), TOKENS, HEADS, WIDTH, dtype=torch.int16)
    views = {name: pool[:, i].permute(0, 2, 1, 3) for i, name in enumerate(names)}
    for name, view in views.items():
        view.copy_(whole[name])
    return views


def test_the_two_sides_need_not_share_strides_or_storages(ends):
    writer = DirectWriter(in_one_storage(MODEL))
    reader = DirectReader(part(OLD, ALL_HEADS), required=True)
    ends += [writer, reader]
    assert len(writer.handles.storages) == 1
    pulls([writer], [reader], PROMPT)
    assert reader.direct.opened == 1
    other = DirectReader(in_one_storage(OLD), required=True)
    ends.append(other)
    pulls([writer], [other], NEXT)


class Computing:
    """A prefill engine that computes a prompt layer by layer when it is told to."""

    def __init__(self, ends, prompt, **changes):
        self.writer = DirectWriter(part(whole_model(3), ALL_HEADS), **changes)
        ends.append(self.writer)
        self.prompt, self.done = prompt, [0, 0]

    def step(self, ready, layers=tuple(GROUPS)):
        chunk = Chunk(self.prompt.name, DIGEST, self.prompt.source, ready)
        self.writer.worker.begin_step(Orders(chunks=[chunk]))
        for name in layers:
            group = GROUPS[name]
            blocks = self.prompt.source[group][self.done[group] : ready[group]]
            self.writer.caches[name][blocks] = MODEL[name][blocks]
            self.writer.worker.layer_computed(name)
        self.done = list(ready)

    def end(self):
        hold = Hold(self.prompt.name, "held-t", DIGEST, self.prompt.source)
        self.writer.worker.begin_step(Orders(holds=[hold]))


def test_a_streamed_prompt_comes_while_it_is_computed(ends):
    prompt = Prompt.of("t", (16, 12), skip=0)
    engine, readers = Computing(ends, prompt), readers_of(ends, OLD, tp=2)
    for reader in readers:
        reader.pull(prompt, peers=[engine.writer.peer(unix=True)], streams=True)
    for ready in ((2, 1), (3, 3), (9, 6)):
        engine.step(ready)
    early = HEADS * BLOCK_BYTES * (9 + 6 + 9)
    wait_until(lambda: engine.writer.worker._early == early)
    assert all(not reader.look() for reader in readers)
    engine.step((16, 12))
    engine.end()
    for reader in readers:
        assert reader.wait(1) == set()
        reader.check(MODEL, prompt)
    frees(engine.writer, "t")


class Held:
    """Holds a reader's copies until they are let go."""

    def __init__(self, reader, monkeypatch):
        self.copying, self.go = threading.Event(), threading.Event()
        self._copy = reader.pages.copy
        monkeypatch.setattr(reader.pages, "copy", self)

    def __call__(self, *arguments):
        self.copying.set()
        assert self.go.wait(10.0)
        self._copy(*arguments)


def test_blocks_that_are_overwritten_under_a_copy_are_never_reported_as_pulled(ends, monkeypatch):
    engine, (reader,) = Computing(ends, PROMPT, timeout_s=5.0), readers_of(ends, OLD)
    held = Held(reader, monkeypatch)
    reader.pull(PROMPT, peers=[engine.writer.peer(unix=True)], streams=True)
    engine.step((7, 5))
    assert held.copying.wait(5.0)
    # vLLM takes the blocks back: its own thread waits for no reader.
    engine.writer.worker.begin_step(Orders(cancelled=["t"]))
    for cache in engine.writer.caches.values():
        cache.fill_(7)
    held.go.set()
    assert reader.wait(1) == {"t"}
    assert reader.reasons() == {"gone": 1}
    assert len(engine.writer.outbox) == 0


def test_blocks_stay_under_a_slow_copy_until_its_reader_is_given_up(ends, monkeypatch):
    (writer,) = writers_of(ends, MODEL, lease_s=1.0, timeout_s=5.0)
    (reader,) = readers_of(ends, OLD)
    held = Held(reader, monkeypatch)
    # The reader's own time is for messages that it waits for, and it is in no such wait.
    writer.hold(PROMPT)
    reader.pull(PROMPT, peers=[writer.peer(unix=True)])
    assert held.copying.wait(5.0)
    threading.Event().wait(1.2)
    assert writer.outbox.take_freed() == set()
    held.go.set()
    # It has had a lease's time, and not all pieces are named yet.
    assert reader.wait(1) == {"t"}
    assert reader.reasons() == {"gone": 1}
    frees(writer, "t")


def test_a_copy_that_outlasts_the_writers_patience_is_dropped(ends, monkeypatch):
    (writer,), (reader,) = writers_of(ends, MODEL, lease_s=1.0), readers_of(ends, OLD)
    held = Held(reader, monkeypatch)
    writer.hold(PROMPT)
    reader.pull(PROMPT, peers=[writer.peer(unix=True)])
    assert held.copying.wait(5.0)
    # The blocks are another prompt's by the time of the copy.
    frees(writer, "t")
    for cache in writer.caches.values():
        cache.fill_(7)
    held.go.set()
    assert reader.wait(1) == {"t"}
    assert reader.reasons() == {"closed": 1}


def test_a_pull_of_an_ended_request_stops_after_the_copy(ends, monkeypatch):
    (writer,), (reader,) = writers_of(ends, MODEL), readers_of(ends, OLD)
    held = Held(reader, monkeypatch)
    writer.hold(PROMPT)
    reader.pull(PROMPT, peers=[writer.peer(unix=True)])
    assert held.copying.wait(5.0)
    assert reader.worker.take_finished({"t"}) == (set(), set())
    held.go.set()
    assert reader.wait(1) == {"t"}
    assert reader.reasons() == {"cancelled": 1}
    frees(writer, "t")


def test_the_largest_piece_fits_into_a_header():
    blocks = [protocol.MAX_BLOCKS - 1] * protocol.MAX_PIECE_BLOCKS
    header = {"layers": list(range(4096)), "first": 1 << 24, "count": len(blocks), "blocks": blocks}
    from vllm_plugins.wire.frame import Limits, encode_header

    assert len(encode_header(header)) < Limits().header_bytes

"""Pulls between real workers over the real wire: wanted blocks arrive, and no other changes."""

import threading
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.pd_problem import (
    ALL_HEADS,
    BLOCK_BYTES,
    BLOCKS,
    DIGEST,
    GROUPS,
    HEADS,
    MODEL,
    OLD,
    PROMPT,
    TIMEOUT_S,
    Prompt,
    Reader,
    Writer,
    frees,
    nothing_left,
    part,
    whole_model,
)
from tests.unit.wire_ends import wait_until
from vllm_plugins.kv_connectors.pd import decode_worker, prefill_worker
from vllm_plugins.kv_connectors.pd.geometry import Heads
from vllm_plugins.kv_connectors.pd.orders import Chunk, Hold, Orders

WAYS = {"tcp": (False, False), "unix": (True, False), "shared_memory": (True, True)}


@pytest.fixture(autouse=True)
def _nothing_left():
    with nothing_left():
        yield


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces of two blocks of all heads."""
    for module in (decode_worker, prefill_worker):
        monkeypatch.setattr(module, "PIECE_BYTES", 2 * HEADS * BLOCK_BYTES + 5)


@pytest.fixture(params=WAYS)
def way(request):
    return request.param


def writers_of(ends, whole, tp=1, pp=1, **changes):
    """Make the workers of a prefill instance, in order of pipeline rank, then tensor rank."""
    names = list(whole)
    made = []
    for stage in range(pp):
        layers = names[stage * len(names) // pp : (stage + 1) * len(names) // pp]
        for rank in range(tp):
            heads = Heads.of_rank(HEADS, rank, tp)
            made.append(Writer(part(whole, heads, layers), heads, **changes))
    ends += made
    return made


def readers_of(ends, whole, tp=1, **changes):
    made = []
    for rank in range(tp):
        heads = Heads.of_rank(HEADS, rank, tp)
        made.append(Reader(part(whole, heads), heads, rank=rank, **changes))
    for reader in made:
        reader.worker.introduce([one.pages.shard for one in made])
    ends += made
    return made


def freed(writers, names):
    """Wait until each writer has freed these prompts' blocks."""
    for writer in writers:
        frees(writer, *names)


def test_a_prompt_arrives_whole_by_each_way(ends, way):
    unix, share = WAYS[way]
    (writer,), (reader,) = writers_of(ends, MODEL), readers_of(ends, OLD, share_memory=share)
    writer.hold(PROMPT)
    reader.pull(PROMPT, peers=[writer.peer(unix=unix)])
    assert reader.wait(1) == set()
    reader.check(MODEL, PROMPT)
    freed([writer], ["t"])
    received, failures, seconds = reader.worker.take_counts()
    size = HEADS * BLOCK_BYTES * (6 + 4 + 6)
    assert (dict(received), dict(failures), len(seconds)) == ({way: size}, {}, 1)
    assert writer.worker.take_counts() == (size, 0)
    assert writer.worker.take_counts() == (0, 0)


def test_a_long_prompt_comes_in_many_pieces(ends, way, small_pieces):
    unix, share = WAYS[way]
    prompt = Prompt.of("long", (60, 61), skip=3)
    (writer,), (reader,) = writers_of(ends, MODEL), readers_of(ends, OLD, share_memory=share)
    writer.hold(prompt)
    reader.pull(prompt, peers=[writer.peer(unix=unix)])
    assert reader.wait(1) == set()
    reader.check(MODEL, prompt)


def test_a_block_that_is_larger_than_a_piece_comes_alone(ends, way, monkeypatch):
    for module in (decode_worker, prefill_worker):
        monkeypatch.setattr(module, "PIECE_BYTES", 10)
    unix, share = WAYS[way]
    (writer,), (reader,) = writers_of(ends, MODEL), readers_of(ends, OLD, share_memory=share)
    writer.hold(PROMPT)
    reader.pull(PROMPT, peers=[writer.peer(unix=unix)])
    assert reader.wait(1) == set()
    reader.check(MODEL, PROMPT)


def test_several_prompts_come_at_once(ends, way, small_pieces):
    unix, share = WAYS[way]
    # 8 positions of both groups, each prompt in blocks of its own.
    prompts = [
        replace(Prompt.of(f"t{i}", (8, 8), skip=0),
                source=(list(range(8 * i, 8 * i + 8)), list(range(8 * i, 8 * i + 8))[::-1]),
                targets=(list(range(56 - 8 * i, 64 - 8 * i)), list(range(8 * i, 8 * i + 8))))
        for i in range(1, BLOCKS // 8)
    ]  # fmt: skip
    (writer,), (reader,) = writers_of(ends, MODEL), readers_of(ends, OLD, share_memory=share)
    for prompt in prompts:
        writer.hold(prompt)
    reader.pull(*prompts, peers=[writer.peer(unix=unix)])
    assert reader.wait(len(prompts)) == set()
    reader.check(MODEL, *prompts)
    freed([writer], [prompt.name for prompt in prompts])
    assert writer.served <= decode_worker.PARALLEL_PULLS


def test_two_tensor_ranks_write_for_one_reader(ends, way, small_pieces):
    unix, share = WAYS[way]
    writers, (reader,) = writers_of(ends, MODEL, tp=2), readers_of(ends, OLD, share_memory=share)
    for writer in writers:
        writer.hold(PROMPT)
    reader.pull(PROMPT, peers=[writer.peer(unix=unix) for writer in writers])
    assert reader.wait(1) == set()
    reader.check(MODEL, PROMPT)
    freed(writers, ["t"])


def test_one_writer_waits_for_both_tensor_ranks_that_read(ends, way, small_pieces):
    unix, share = WAYS[way]
    (writer,), readers = writers_of(ends, MODEL), readers_of(ends, OLD, tp=2, share_memory=share)
    writer.hold(PROMPT)
    peers = [writer.peer(unix=unix)]
    readers[0].pull(PROMPT, peers=peers)
    assert readers[0].wait(1) == set()
    # The writer hears of it a little later; a second pull of the first rank changes nothing.
    readers[0].pull(replace(PROMPT, name="t"), peers=peers)
    wait_until(lambda: writer.outbox._entries["t"].done == {0})
    assert writer.outbox.take_freed() == set()
    readers[1].pull(PROMPT, peers=peers)
    assert readers[1].wait(1) == set()
    freed([writer], ["t"])
    for reader in readers:
        reader.check(MODEL, PROMPT)
    wait_until(lambda: readers[0].look() == 2)


def test_two_pipeline_stages_write_for_one_reader(ends, way, small_pieces):
    unix, share = WAYS[way]
    writers, (reader,) = writers_of(ends, MODEL, pp=2), readers_of(ends, OLD, share_memory=share)
    assert [len(writer.pages.shard.layers) for writer in writers] == [1, 2]
    for writer in writers:
        writer.hold(PROMPT)
    reader.pull(PROMPT, peers=[writer.peer(unix=unix) for writer in writers])
    assert reader.wait(1) == set()
    reader.check(MODEL, PROMPT)
    freed(writers, ["t"])


def test_four_tensor_ranks_and_two_stages_write_for_two_readers(ends):
    writers = writers_of(ends, MODEL, tp=4, pp=2)
    readers = readers_of(ends, OLD, tp=2)
    for writer in writers:
        writer.hold(PROMPT)
    for reader in readers:
        reader.pull(PROMPT, peers=[writer.peer(unix=True) for writer in writers])
    for reader in readers:
        assert reader.wait(1) == set()
        reader.check(MODEL, PROMPT)
    freed(writers, ["t"])


def test_a_writer_whose_heads_nobody_reads_from_it_frees_them_too(ends):
    # As with two heads on four ranks, where each head is there twice.
    one = {name: cache[:, :1] for name, cache in MODEL.items()}
    writers = [Writer(part(one, Heads(0, 1)), Heads(0, 1)) for _ in range(2)]
    reader = Reader(part(OLD, Heads(0, 1)), Heads(0, 1))
    ends += [*writers, reader]
    for writer in writers:
        writer.hold(PROMPT)
    reader.pull(PROMPT, peers=[writer.peer() for writer in writers])
    assert reader.wait(1) == set()
    reader.check(MODEL, PROMPT)
    freed(writers, ["t"])
    assert writers[1].worker.take_counts() == (0, 0)


def test_a_group_of_which_nothing_is_wanted_stays_as_it_is(ends):
    prompt = Prompt.of("t", (5, 5), skip=2)
    prompt = replace(prompt, spans=(prompt.spans[0], replace(prompt.spans[1], first=5)),
                     targets=(prompt.targets[0], []))  # fmt: skip
    (writer,), (reader,) = writers_of(ends, MODEL), readers_of(ends, OLD)
    writer.hold(prompt)
    reader.pull(prompt, peers=[writer.peer()])
    assert reader.wait(1) == set()
    reader.check(MODEL, prompt)
    freed([writer], ["t"])


def chunk(prompt, ready, *, last=False):
    return Chunk(prompt.name, DIGEST, prompt.source, ready, last)


class Computing:
    """A prefill engine that computes a prompt in chunks, layer by layer, when it is told to.

    Its cache holds another prompt's numbers where nothing was computed yet.
    """

    def __init__(self, ends, prompt):
        self.caches = part(whole_model(3), ALL_HEADS)
        self.writer = Writer(self.caches)
        ends.append(self.writer)
        self.prompt, self.done = prompt, [0, 0]

    def step(self, ready, layers=tuple(GROUPS), *, last=False):
        """Compute up to so many positions, by group, in some layers."""
        self.writer.worker.begin_step(Orders(chunks=[chunk(self.prompt, ready, last=last)]))
        for name in layers:
            group = GROUPS[name]
            blocks = self.prompt.source[group][self.done[group] : ready[group]]
            self.caches[name][blocks] = MODEL[name][blocks]
            self.writer.worker.layer_computed(name)
        self.writer.worker.end_step()
        self.done = list(ready)

    def end(self):
        hold = Hold(self.prompt.name, "held-t", DIGEST, self.prompt.source)
        self.writer.worker.begin_step(Orders(holds=[hold]))

    def sent_early(self):
        return self.writer.worker._early


def test_a_streamed_prompt_comes_while_it_is_computed(ends, way, small_pieces):
    unix, share = WAYS[way]
    prompt = Prompt.of("t", (7, 5), skip=0)
    engine, (reader,) = Computing(ends, prompt), readers_of(ends, OLD, share_memory=share)
    reader.pull(prompt, peers=[engine.writer.peer(unix=unix)], streams=True)
    engine.step((3, 2))
    first = HEADS * BLOCK_BYTES * (3 + 2 + 3)
    wait_until(lambda: engine.sent_early() == first)
    assert reader.look() == 0
    engine.step((7, 5))
    wait_until(lambda: reader.look() == 1)
    reader.check(MODEL, prompt)
    assert reader.failed == set()
    # It has all before the engine says that the prompt's blocks are to be kept.
    assert engine.writer.outbox.take_freed() == set()
    wait_until(lambda: engine.writer.outbox._entries["t"].complete)
    engine.end()
    freed([engine.writer], ["t"])
    size = HEADS * BLOCK_BYTES * (7 + 5 + 7)
    assert engine.writer.worker.take_counts() == (size, size)


def test_the_rest_of_a_streamed_prompt_comes_after_its_end(ends, way, small_pieces):
    unix, share = WAYS[way]
    prompt = Prompt.of("t", (7, 5), skip=2)
    engine, (reader,) = Computing(ends, prompt), readers_of(ends, OLD, share_memory=share)
    reader.pull(prompt, peers=[engine.writer.peer(unix=unix)], streams=True)
    engine.step((7, 5), layers=["layer.0"])
    early = HEADS * BLOCK_BYTES * 5
    wait_until(lambda: engine.sent_early() == early)
    for name in ("layer.1", "layer.2"):
        engine.caches[name][:] = MODEL[name]
    engine.end()
    assert reader.wait(1) == set()
    reader.check(MODEL, prompt)
    freed([engine.writer], ["t"])
    assert engine.writer.worker.take_counts() == (early + HEADS * BLOCK_BYTES * (3 + 5), early)


def test_what_leaves_after_the_last_step_is_late_before_the_order_to_hold(ends, way):
    unix, share = WAYS[way]
    prompt = Prompt.of("t", (7, 5), skip=0)
    engine, (reader,) = Computing(ends, prompt), readers_of(ends, OLD, share_memory=share)
    engine.step((7, 5), last=True)
    reader.pull(prompt, peers=[engine.writer.peer(unix=unix)], streams=True)
    assert reader.wait(1) == set()
    reader.check(MODEL, prompt)
    assert engine.writer.worker.take_counts() == (HEADS * BLOCK_BYTES * (7 + 5 + 7), 0)
    engine.end()
    freed([engine.writer], ["t"])


def test_plans_of_prefill_instances_that_were_restarted_are_forgotten(ends, monkeypatch):
    monkeypatch.setattr(decode_worker, "MAX_PLANS", 2)
    (reader,) = readers_of(ends, OLD)
    for i in range(4):
        (writer,) = writers_of(ends, MODEL, generation=f"{i:016x}")
        prompt = Prompt.of(f"t{i}")
        writer.hold(prompt)
        reader.pull(prompt, peers=[writer.peer()])
        assert reader.wait(1 + i) == set()
    reader.check(MODEL, prompt)
    assert len(reader.worker._plans) == 2


def test_many_streamed_prompts_come_from_a_thread_that_computes(ends, way, small_pieces):
    unix, share = WAYS[way]
    prompt = Prompt.of("t", (16, 12), skip=0)
    engine, readers = Computing(ends, prompt), readers_of(ends, OLD, tp=2, share_memory=share)

    def compute():
        for ready in ((2, 1), (3, 3), (9, 6), (16, 12)):
            engine.step(ready)
        engine.end()

    thread = threading.Thread(target=compute)
    for reader in readers:
        reader.pull(prompt, peers=[engine.writer.peer(unix=unix)], streams=True)
    thread.start()
    for reader in readers:
        assert reader.wait(1) == set()
        reader.check(MODEL, prompt)
    thread.join()
    freed([engine.writer], ["t"])


def test_a_streamed_prompt_that_is_given_up_fails_and_frees_its_reader(ends, way):
    unix, share = WAYS[way]
    engine, (reader,) = Computing(ends, PROMPT), readers_of(ends, OLD, share_memory=share)
    reader.pull(PROMPT, peers=[engine.writer.peer(unix=unix)], streams=True)
    engine.step((4, 2))
    wait_until(lambda: engine.sent_early() > 0)
    engine.writer.worker.begin_step(Orders(cancelled=["t"]))
    assert reader.wait(1) == {"t"}
    assert reader.reasons() == {"gone": 1}
    assert len(engine.writer.outbox) == 0


def test_a_reader_gives_up_a_streamed_prompt_that_stands_still(ends):
    engine, (reader,) = Computing(ends, PROMPT), readers_of(ends, OLD)
    reader.pull(PROMPT, peers=[engine.writer.peer()], streams=True)
    engine.step((4, 2))
    assert reader.wait(1, 5 * TIMEOUT_S) == {"t"}
    assert reader.reasons() == {"timeout": 1}
    engine.writer.worker.begin_step(Orders(cancelled=["t"]))


def test_a_pull_of_an_ended_request_stops_and_its_lease_ends(ends):
    engine, (reader,) = Computing(ends, PROMPT), readers_of(ends, OLD)
    reader.pull(PROMPT, peers=[engine.writer.peer()], streams=True)
    engine.step((4, 2))
    wait_until(lambda: engine.sent_early() > 0)
    assert reader.worker.take_finished({"t", "unknown"}) == (set(), set())
    engine.step((5, 3))
    assert reader.wait(1) == {"t"}
    assert reader.reasons() == {"cancelled": 1}
    wait_until(lambda: "t" in engine.writer.outbox._gone)
    engine.end()
    freed([engine.writer], ["t"])


def test_a_layer_that_the_connector_does_not_hold_is_nothing(ends):
    (writer,) = writers_of(ends, MODEL)
    writer.worker.begin_step(Orders(chunks=[chunk(PROMPT, (1, 1))]))
    writer.worker.layer_computed("of a vision tower")
    assert writer.outbox._entries["t"].ready == {}

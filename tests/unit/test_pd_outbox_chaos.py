"""Leases under random operations, and under readers in threads."""

import contextlib
import itertools
import random
import threading
from collections import Counter

import pytest

from tests.unit.wire_ends import wait_until
from vllm_plugins.kv_connectors.pd.outbox import GoneError, Outbox
from vllm_plugins.kv_connectors.pd.protocol import Span

GROUPS = {"a": 0, "b": 1}
LAYERS = list(GROUPS)
DIGEST, OTHER = "d" * 32, "e" * 32
BLOCKS = ([11, 12, 13], [21, 22])
TOTAL = (3, 2)
SPANS = (Span(0, 3), Span(0, 2))
LEASE_S = 30.0


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Chaos:
    """Random operations, with what must hold checked after each."""

    def __init__(self, seed):
        self.rng, self.clock = random.Random(seed), Clock()
        self.outbox = Outbox(GROUPS, LEASE_S, self.clock, announce_s=0.0)
        self.names = [f"t{i}" for i in range(12)]
        self.numbers = itertools.count()
        self.held, self.freed = set(), Counter()
        self.open = []

    def one(self):
        name = self.rng.choice(self.names)
        digest = self.rng.choice([DIGEST, DIGEST, OTHER])
        actions = [self.hold, self.announce, self.computed, self.cancel, self.release, self.renew,
                   self.enter, self.leave, self.wait]  # fmt: skip
        self.rng.choices(actions, weights=[4, 3, 3, 1, 1, 1, 4, 4, 1])[0](name, digest)
        self.take()

    def hold(self, name, digest):
        request = f"r{next(self.numbers)}"
        self.held.add(request)
        self.outbox.hold(name, request, digest, BLOCKS)

    def announce(self, name, digest):
        self.outbox.announce(name, digest, BLOCKS)

    def computed(self, name, digest):
        self.outbox.computed({name: (self.rng.randint(0, 3), 2)}, self.rng.choice(LAYERS))

    def cancel(self, name, digest):
        self.outbox.cancel([name])

    def release(self, name, digest):
        self.outbox.release([name])
        # Names come again here, as they do not in life.
        self.outbox._gone.clear()

    def renew(self, name, digest):
        self.outbox.renew([name])

    def enter(self, name, digest):
        stack = contextlib.ExitStack()
        with contextlib.suppress(GoneError):
            reading = stack.enter_context(self.outbox.reading(name, digest))
            self.open.append((stack, reading))

    def leave(self, name, digest):
        if self.open:
            stack, reading = self.open.pop(self.rng.randrange(len(self.open)))
            if self.rng.random() < 0.5:
                reading.finish(self.rng.randint(0, 1), 2)
            stack.close()

    def wait(self, name, digest):
        self.clock.now += self.rng.choice([0.1, LEASE_S])

    def take(self):
        self.freed.update(self.outbox.take_freed())
        read = {reading._entry.request_id for _, reading in self.open}
        assert not self.freed.keys() & read, "blocks were freed under a reader"
        assert set(self.freed.values()) <= {1}, "a request was freed twice"
        assert self.freed.keys() <= self.held

    def end(self):
        for stack, _ in self.open:
            stack.close()
        self.open.clear()
        self.outbox.cancel(self.names)
        self.clock.now += LEASE_S
        self.take()


@pytest.mark.parametrize("seed", range(6))
def test_each_held_request_is_freed_exactly_once_over_random_operations(seed):
    chaos = Chaos(seed)
    for _ in range(3000):
        chaos.one()
    chaos.end()
    assert chaos.freed.keys() == chaos.held
    assert len(chaos.outbox) == 0
    assert len(chaos.held) > 300


class Engine:
    """A prefill engine's worker thread: computes prompts into a pool of blocks that it reuses.

    Each block says whose position it holds, so that a reader sees when it was overwritten.
    """

    def __init__(self, outbox, prompts):
        self.outbox, self.rng = outbox, random.Random(1)
        self.pause = threading.Event()
        self.free = list(range(1, 41))
        self.memory = [None] * 41
        self.kept, self.freed = {}, Counter()
        self.prompts = prompts
        self.failed = None

    def run(self):
        try:
            for number in range(self.prompts):
                self.prompt(f"t{number}")
                self.collect()
            wait_until(lambda: self.collect() == self.prompts, 20)
        except BaseException as error:
            self.failed = error
            raise

    def prompt(self, name):
        wait_until(lambda: self.collect() is not None and len(self.free) >= 5, 20)
        blocks = tuple([self.free.pop() for _ in range(n)] for n in TOTAL)
        if self.rng.random() < 0.5 and not self.compute(name, blocks):
            self.outbox.cancel([name])
            # vLLM gives the blocks to others at once.
            self.reuse(blocks)
            self.freed[name] += 1
            return
        self.write(name, blocks)
        self.kept[f"r-{name}"] = (name, blocks)
        self.outbox.hold(name, f"r-{name}", DIGEST, blocks)

    def compute(self, name, blocks):
        """Compute layer by layer; return whether the prompt came to its end."""
        self.write(name, blocks)
        self.outbox.announce(name, DIGEST, blocks)
        for layer in LAYERS:
            self.outbox.computed({name: TOTAL}, layer)
            # So does a layer.
            self.pause.wait(0.001)
        return self.rng.random() < 0.7

    def write(self, name, blocks):
        for group, ids in enumerate(blocks):
            for position, block in enumerate(ids):
                self.memory[block] = (name, group, position)

    def collect(self):
        for request in self.outbox.take_freed():
            name, blocks = self.kept.pop(request)
            self.reuse(blocks)
            self.freed[name] += 1
        return self.freed.total()

    def reuse(self, blocks):
        for block in itertools.chain(*blocks):
            self.memory[block] = None
            self.free.append(block)


class Reading:
    """A reader's thread: reads one prompt after another, and notes what it saw."""

    def __init__(self, outbox, memory, prompts, rank):
        self.outbox, self.memory, self.prompts, self.rank = outbox, memory, prompts, rank
        self.rng, self.pause = random.Random(rank), threading.Event()
        self.wrong, self.right = [], 0

    def run(self):
        for number in range(self.prompts):
            name = f"t{number}"
            if self.rng.random() < 0.05:
                self.outbox.release([name])
                continue
            with contextlib.suppress(GoneError), self.outbox.reading(name, DIGEST) as reading:
                self.read(name, reading)

    def read(self, name, reading):
        while fresh := reading.next(LAYERS, SPANS):
            for layer, span in fresh:
                with reading.copying(layer, span) as blocks:
                    if self.rng.random() < 0.2:
                        # A copy takes its time, in which others may do what they want.
                        self.pause.wait(0.001)
                    seen = [self.memory[block] for block in blocks]
                expected = [(name, GROUPS[layer], p) for p in range(span.first, span.last)]
                self.wrong += [] if seen == expected else [(name, seen)]
        self.right += 1
        reading.finish(self.rank, 2)


def test_readers_in_threads_never_see_a_block_that_was_given_to_others():
    prompts = 400
    outbox = Outbox(GROUPS, 0.3, announce_s=0.3)
    engine = Engine(outbox, prompts)
    readers = [Reading(outbox, engine.memory, prompts, rank) for rank in range(2)]
    threads = [threading.Thread(target=one.run) for one in (engine, *readers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert engine.failed is None
    assert [reader.wrong for reader in readers] == [[], []]
    assert sum(reader.right for reader in readers) > prompts / 4
    assert engine.freed == dict.fromkeys((f"t{i}" for i in range(prompts)), 1)
    assert sorted(engine.free) == list(range(1, 41))
    assert len(outbox) == 0

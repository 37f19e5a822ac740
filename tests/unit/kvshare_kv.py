"""KV, labels and a paged cache without an engine, for the tests of KVShare's tiers."""

import os
from concurrent.futures import wait
from contextlib import contextmanager
from threading import Event

import numpy as np
import torch

from vllm_plugins.kv_connectors.kvshare import segment_file
from vllm_plugins.kv_connectors.kvshare.anchors import Anchors
from vllm_plugins.kv_connectors.kvshare.device_tier import PAGE_TOKENS, ArenaSize, DeviceTier
from vllm_plugins.kv_connectors.kvshare.disk import DiskTier
from vllm_plugins.kv_connectors.kvshare.payloads import Payloads, Piece
from vllm_plugins.kv_connectors.kvshare.segment_file import KVShape
from vllm_plugins.kv_connectors.kvshare.segments import content_digest
from vllm_plugins.kv_connectors.kvshare.transfer import Label, Save

SHAPE = KVShape(layers=3, kv_heads=2, head_size=4, dtype=torch.bfloat16)
NOBODY = np.zeros(0, dtype=np.int32)


class FakePages:
    """A paged cache full of random KV, whose slots are its rows."""

    device = torch.device("cpu")

    def __init__(self, shape=SHAPE, slots=4096):
        self.num_layers, self.num_heads = shape.layers, shape.kv_heads
        self.head_size, self.dtype = shape.head_size, shape.dtype
        generator = torch.Generator().manual_seed(0)
        self.kv = torch.randn(shape.of(slots), generator=generator).to(shape.dtype)

    def read(self, layer, slots):
        return self.kv[layer, 0, slots].clone(), self.kv[layer, 1, slots].clone()

    def of(self, slots):
        """The KV of some slots as a segment of its own."""
        return self.kv[:, :, slots].clone()


def random_kv(tokens, shape=SHAPE, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape.of(tokens), generator=generator).to(shape.dtype)


def some_label(tokens=40, seed=0, position=7, previous=None, source=3):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 1000, tokens).astype(np.int32)
    count = tokens // 8
    anchors = Anchors(
        rng.integers(0, 2**63, count).astype(np.uint64), np.arange(count, dtype=np.int64) * 8
    )
    return Label(
        domain=rng.bytes(32),
        tokens=ids,
        content=content_digest(ids),
        context=rng.bytes(32),
        position=position,
        generation=1,
        source=source,
        previous=previous,
        anchors=anchors,
    )


def some_save(key, tokens=40):
    return Save(key, 0, tokens, NOBODY, some_label(tokens, seed=key))


def same_label(one, other):
    facts = ("domain", "content", "context", "position", "generation", "source", "previous")
    return (
        all(getattr(one, name) == getattr(other, name) for name in facts)
        and one.tokens.dtype == other.tokens.dtype == np.int32
        and np.array_equal(one.tokens, other.tokens)
        and np.array_equal(one.anchors.hashes, other.anchors.hashes)
        and np.array_equal(one.anchors.offsets, other.anchors.offsets)
        and one.anchors.hashes.dtype == other.anchors.hashes.dtype
        and one.anchors.offsets.dtype == other.anchors.offsets.dtype
    )


def written(tier):
    """Wait until the writer has done all that it was given so far."""
    fence = Event()
    tier._jobs.put(fence.set)
    assert fence.wait(20)
    tier.poll()


def all_read(payloads):
    """Wait for the reads under way, and let the payloads take note."""
    wait([read for read, _ in payloads._reads.values()], timeout=20)
    payloads.poll()


def bits(kv):
    return kv.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def put_file(path, key=5, label=None, kv=None):
    """Write a segment and return what was written."""
    label = label or some_label(16)
    kv = random_kv(len(label.tokens)) if kv is None else kv
    assert segment_file.write(path, key, label, kv) == path.stat().st_size
    return label, kv


PLANTS = ["link", "folder", "pipe", "empty", "pickle"]


def plant(kind, path, elsewhere):
    if kind == "link":
        put_file(elsewhere)
        path.symlink_to(elsewhere)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "empty":
        path.touch()
    elif kind == "pickle":
        torch.save(random_kv(16), path)


TOKENS = 40
SEGMENT = TOKENS * SHAPE.bytes_per_token


@contextmanager
def stores():
    """Make stores that are closed in the end."""
    made = []

    def make(*args, **options):
        made.append(Store(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Store:
    """Payloads over a paged cache, and what must be in them: the slots of each segment."""

    def __init__(self, folder=None, segments=None, device_pages=0):
        self.now = 0.0
        self.pages = FakePages()
        self.disk = None if folder is None else DiskTier(folder, SHAPE, FakePages.device)
        nbytes = device_pages * PAGE_TOKENS * SHAPE.bytes_per_token
        self.device = (
            DeviceTier(ArenaSize(SHAPE, nbytes), FakePages.device) if device_pages else None
        )
        # Room for that many segments and for the headers of their files.
        limit = None if segments is None else int((segments + 0.9) * SEGMENT)
        self.payloads = Payloads(self.pages, limit, self.disk, self.device, lambda: self.now)
        self.slots = {}

    def save(self, *keys, tokens=TOKENS):
        saves = [some_save(key, tokens) for key in keys]
        for key in keys:
            self.slots[key] = torch.arange(tokens) + 13 * (key % 100)
        self.payloads.save(saves, torch.cat([self.slots[key] for key in keys]))

    def written(self):
        written(self.disk)

    def fill(self, count):
        """Save segments 0 to ``count``, each once the one before is on disk."""
        for key in range(count):
            self.save(key)
            self.written()

    def lease(self, *keys):
        return self.payloads.lease([Piece(key, 3, 20) for key in keys])

    def check_load(self, *keys):
        pieces = [Piece(key, 5 + key % 3, 21) for key in keys]
        for layer in range(SHAPE.layers):
            for half in range(2):
                rows = [self.slots[p.key][p.offset : p.offset + p.length] for p in pieces]
                expected = self.pages.kv[layer, half, torch.cat(rows)]
                assert bits(self.payloads.load(layer, half, pieces)) == bits(expected)

    def close(self):
        if self.disk is not None:
            self.disk.close()

"""CUDA IPC between two processes, where there is a device."""

import gc
import multiprocessing
import os

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.pd_problem import DIGEST, GENERATION, TIMEOUT_S
from tests.unit.wire_ends import SECRET, wait_until
from vllm_plugins.kv_connectors.pd import direct_peers
from vllm_plugins.kv_connectors.pd.decode_worker import DecodeWorker
from vllm_plugins.kv_connectors.pd.direct import StorageHandle, UnavailableError, export_caches
from vllm_plugins.kv_connectors.pd.direct_cuda import CudaCaches
from vllm_plugins.kv_connectors.pd.direct_peers import DirectPeers
from vllm_plugins.kv_connectors.pd.geometry import Heads
from vllm_plugins.kv_connectors.pd.orders import Chunk, Load, Orders
from vllm_plugins.kv_connectors.pd.pages import Pages
from vllm_plugins.kv_connectors.pd.peers import PeerConnections
from vllm_plugins.kv_connectors.pd.prefill_worker import PrefillWorker
from vllm_plugins.kv_connectors.pd.protocol import Span
from vllm_plugins.kv_connectors.pd.reference import Peer, Reference
from vllm_plugins.wire.server import Server

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
BLOCKS, HEADS, TOKENS, WIDTH = 96, Heads(0, 4), 16, 64
DEVICE = torch.device("cuda", 0)
SOURCE, TARGETS = list(range(1, 60, 2)), list(range(90, 60, -1))
# Of each message; a kernel is compiled within one.
PATIENCE_S = 100 * TIMEOUT_S
# Cycles for which a kernel does nothing: about a tenth of a second.
SLEEP = 200_000_000


def pages_of(seed):
    """Return caches of all forms on the device, the first two in one storage."""
    draw = torch.Generator().manual_seed(seed)

    def raw(*shape):
        return torch.randint(0, 250, shape, generator=draw).to(torch.uint8).to(DEVICE)

    pool = raw(BLOCKS, 2, TOKENS, len(HEADS), 2 * WIDTH).view(torch.bfloat16)
    caches = {
        "a": pool[:, 0].permute(0, 2, 1, 3),
        "b": pool[:, 1].permute(0, 2, 1, 3),
        "parts": raw(4 * BLOCKS, len(HEADS), TOKENS // 4, WIDTH),
        "fp8": raw(BLOCKS, len(HEADS), TOKENS, WIDTH).view(torch.float8_e4m3fn),
        "latent": raw(BLOCKS, TOKENS, 4 * WIDTH).view(torch.float32),
    }
    return Pages(caches, BLOCKS, TOKENS, HEADS, "same")


def rows(cache, blocks):
    parts = cache.shape[0] // BLOCKS
    ids = torch.tensor(blocks)[:, None] * parts + torch.arange(parts)
    return ids.flatten().to(DEVICE)


def serve(pipe):
    """Hold prompts, or compute one slowly, as the parent says; in the end tell the bytes in use."""
    pages = pages_of(1)
    groups = dict.fromkeys(pages.caches, 0)
    handles = export_caches(pages, CudaCaches(DEVICE))
    worker = PrefillWorker(pages, groups, GENERATION, 30.0, handles)
    with Server(worker.serve, SECRET, timeout_s=PATIENCE_S, name="pd") as server:
        pipe.send(server.address)
        while (word := pipe.recv()) != "free":
            if word == "compute":
                compute(pages, worker)
            worker.outbox.hold(word, word, DIGEST, (SOURCE,))
            pipe.send(word)
    pages._caches.clear()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    pipe.send(torch.cuda.memory_allocated())


def compute(pages, worker):
    """Compute a prompt, layer by layer; each is launched and told of, and done only later."""
    chunk = Chunk("compute", DIGEST, (SOURCE,), (len(SOURCE),))
    worker.begin_step(Orders(chunks=[chunk]))
    for name, cache in pages.caches.items():
        torch.cuda._sleep(SLEEP)
        cache[rows(cache, SOURCE)] = 3
        worker.layer_computed(name)


class Writer:
    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,))
        self.process.start()
        theirs.close()
        self.peer = Peer(self.pipe.recv(), GENERATION)

    def say(self, word):
        self.pipe.send(word)
        return self.pipe.recv()

    def close(self):
        self.process.kill()
        self.process.join()
        self.pipe.close()


@pytest.fixture
def writer():
    made = Writer()
    yield made
    made.close()


@pytest.fixture
def reader(monkeypatch):
    monkeypatch.setattr(direct_peers, "WATCH_S", 0.02)
    pages = pages_of(2)
    connections = PeerConnections(SECRET, PATIENCE_S, PATIENCE_S)
    peers = DirectPeers(CudaCaches(DEVICE), pages, connections, required=True)
    worker = DecodeWorker(
        pages, dict.fromkeys(pages.caches, 0), 0, connections, share_memory=True, direct=peers
    )
    yield pages, worker, peers
    worker.close()


def pull(worker, writer, name, *, streams=False):
    known = (None, None) if streams else (100, DIGEST)
    reference = Reference(name, *known, (writer.peer,))
    worker.start(Load(name, reference, DIGEST, (Span(0, len(SOURCE)),), (TARGETS,)))


def wait(worker):
    done, failed = set(), set()

    def over():
        now = worker.take_finished(set())
        done.update(now[0])
        failed.update(now[1])
        return bool(done)

    wait_until(over, PATIENCE_S)
    assert not failed
    received, _, _ = worker.take_counts()
    assert set(received) == {"cuda_ipc"}


def test_blocks_of_all_forms_come_out_of_another_process(writer, reader):
    pages, worker, peers = reader
    model, before = pages_of(1), {name: cache.clone() for name, cache in pages.caches.items()}
    writer.say("t")
    pull(worker, writer, "t")
    wait(worker)
    for name, cache in pages.caches.items():
        before[name][rows(cache, TARGETS)] = model.caches[name][rows(cache, SOURCE)]
        assert torch.equal(cache.view(torch.uint8), before[name].view(torch.uint8)), name
    # An export keeps nothing: the cache is freed as any other.
    assert writer.say("free") < 1 << 16
    wait_until(lambda: not peers._mappings)


def test_streamed_layers_are_complete_before_they_are_copied(writer, reader):
    pages, worker, _ = reader
    pull(worker, writer, "compute", streams=True)
    writer.say("compute")
    wait(worker)
    for name, cache in pages.caches.items():
        assert (cache[rows(cache, TARGETS)] == 3).all(), name


def test_a_killed_writers_memory_is_given_back(writer, reader):
    _, worker, peers = reader
    writer.say("t")
    pull(worker, writer, "t")
    wait(worker)
    mapped = peers._mappings[writer.peer].caches.caches["latent"]
    writer.close()
    wait_until(lambda: not peers._mappings)
    # Readable as long as it is mapped: no copy that is under way fails in a kernel.
    assert torch.equal(mapped.view(torch.uint8), pages_of(1).caches["latent"].view(torch.uint8))
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    del mapped
    wait_until(lambda: torch.cuda.mem_get_info()[0] > free)


HANDLES = {
    "of another version": StorageHandle(b"\xff" + bytes(65), 64, 0),
    "too short": StorageHandle(b"\x01c", 64, 0),
    "of no allocation": StorageHandle(b"\x01c" + os.urandom(64), 64, 0),
}


@pytest.mark.parametrize("name", HANDLES)
def test_a_handle_that_is_none_is_refused_and_the_device_goes_on(name):
    direct = CudaCaches(DEVICE)
    with pytest.raises(UnavailableError, match="cannot be opened"):
        direct.open(HANDLES[name], direct.device)
    assert torch.ones(8, device=DEVICE).sum() == 8


def test_own_handles_and_those_of_unknown_devices_are_refused():
    direct = CudaCaches(DEVICE)
    handles = export_caches(pages_of(1), direct)
    with pytest.raises(UnavailableError, match="cannot be opened"):
        direct.open(handles.storages[0], direct.device)
    with pytest.raises(UnavailableError, match="not visible"):
        direct.open(handles.storages[0], "another")


def offer(pipe):
    cache = torch.zeros(1 << 22, dtype=torch.uint8, device=DEVICE)
    pipe.send(CudaCaches(DEVICE).export(cache.untyped_storage()))
    pipe.recv()


def test_a_storage_that_is_larger_than_its_memory_is_refused():
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=offer, args=(theirs,))
    process.start()
    handle, direct = pipe.recv(), CudaCaches(DEVICE)
    assert direct.open(handle, direct.device).nbytes() == 1 << 22
    lie = StorageHandle(handle.key, 1 << 40, handle.offset)
    with pytest.raises(UnavailableError, match="smaller than it says"):
        direct.open(lie, direct.device)
    pipe.send("done")
    process.join()

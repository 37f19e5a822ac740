"""The memory behind EPD's arena: who can map it, what stands where, what is left behind."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.epd.media import Shape
from vllm_plugins.kv_connectors.epd.shared_memory import Location, SharedMemory

BLOCK = 64


@pytest.fixture
def memory():
    memory = SharedMemory.create(2, 8, BLOCK)
    yield memory
    memory.close()


def test_both_ends_see_the_same_bytes(memory):
    other = SharedMemory.open(memory.location)
    shape = Shape(6, 4, "float32")
    for number, (_, _, piece) in enumerate(memory.runs((1, 2), shape)):
        piece[:] = bytes([number + 1]) * len(piece)
    assert b"".join(other.rows((1, 2), shape, 0, 6)) == b"\1" * 96
    other.close()


def test_pieces_are_as_few_as_the_blocks_allow(memory):
    shape = Shape(14, 4, "float32")
    pieces = memory.runs((2, 3, 6, 4), shape)
    assert [(first, count, len(piece)) for first, count, piece in pieces] == [
        (0, 8, 128),
        (8, 4, 64),
        (12, 2, 32),
    ]
    for first, _, piece in pieces:
        piece[:] = bytes([first]) * len(piece)
    assert [len(piece) for piece in memory.rows((2, 3, 6, 4), shape, 7, 6)] == [16, 64, 16]
    assert b"".join(memory.rows((2, 3, 6, 4), shape, 11, 2)) == b"\x08" * 16 + b"\x0c" * 16


def test_rows_that_do_not_fill_a_block_are_not_joined(memory):
    shape = Shape(4, 6, "float32")
    assert [(first, count) for first, count, _ in memory.runs((0, 1), shape)] == [(0, 2), (2, 2)]


def test_the_digest_is_that_of_the_rows_alone(memory):
    shape = Shape(5, 4, "float32")
    for _, _, piece in memory.runs((0, 5), shape):
        piece[:] = os.urandom(len(piece))
    content = b"".join(memory.rows((0, 5), shape, 0, 5))
    assert memory.digest((0, 5), shape) == hashlib.sha256(content).hexdigest()[:32]


def test_a_step_is_done_when_all_workers_say_so(memory):
    assert memory.steps_done() == 0
    memory.report(0, 7)
    assert memory.steps_done() == 0
    memory.report(1, 5)
    assert memory.steps_done() == 5


def test_stamps_tell_one_reservation_from_the_next(memory):
    memory.stamp(3, 9, "ab" * 16)
    assert memory.stamped(3) == (9, "ab" * 16)
    assert memory.stamped(2) == (0, "00" * 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "/proc/self/fd/99999"}, "a worker cannot map the scheduler's arena"),
        ({"name": "00" * 16}, "what a worker mapped is not the scheduler's arena"),
        ({"num_blocks": 9000}, "what a worker mapped is not the scheduler's arena"),
    ],
)
def test_another_file_is_not_taken_for_it(memory, change, message):
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(PluginError, match=message):
        SharedMemory.open(replace(memory.location, **change))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_it_cannot_be_shrunk_under_its_readers(memory):
    with pytest.raises(OSError, match="Operation not permitted"):
        os.truncate(memory.location.path, 0)


MAKER = """
import sys, time
from vllm_plugins.kv_connectors.epd.shared_memory import SharedMemory
memory = SharedMemory.create(1, 8, 64)
memory.stamp(0, 1, "ab" * 16)
print(memory.location.path, memory.location.name, flush=True)
sys.stdin.read()
"""


def test_another_process_maps_it_and_a_kill_leaves_nothing_behind():
    with subprocess.Popen(
        [sys.executable, "-c", MAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        path, name = process.stdout.readline().split()
        location = Location(path, name, 1, 8, 64)
        memory = SharedMemory.open(location)
        assert memory.stamped(0) == (1, "ab" * 16)
        process.kill()
        process.wait()
    assert not Path(path).exists()
    # What is mapped remains readable until it is let go.
    assert memory.stamped(0) == (1, "ab" * 16)
    memory.close()


def test_it_has_no_name_in_a_file_system(memory):
    assert str(Path(memory.location.path).readlink()).startswith("/memfd:")

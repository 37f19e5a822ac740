"""A decode instance whose process cannot start threads for a while: nothing breaks or hangs."""

import threading
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.pd_problem import DIGEST, PROMPT, frees, goes_on, honest_writer, new_reader
from tests.unit.wire_ends import wait_until
from vllm_plugins.kv_connectors.pd.decode_scheduler import LeaseKeeper
from vllm_plugins.kv_connectors.pd.reference import Reference

pytestmark = pytest.mark.usefixtures("pd_nothing_left")


@pytest.fixture
def shortage(monkeypatch):
    """Give what lets no thread be started in its block."""

    @contextmanager
    def short():
        def start(thread):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            yield

    return short


def reference(writer):
    return Reference(PROMPT.name, 10, DIGEST, (writer.peer(),))


def test_leases_are_kept_once_there_are_threads_again(ends, shortage):
    writer, reader = honest_writer(ends, lease_s=0.5), new_reader(ends)
    writer.hold(PROMPT)
    keeper = LeaseKeeper(reader.connections, 0.1)
    with shortage():
        keeper.watch("first", reference(writer))
    keeper.watch("second", reference(writer))
    with shortage():
        # Beats that reach nobody end neither the beating nor the next ones.
        time.sleep(0.25)
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        assert not writer.outbox.take_freed()
        time.sleep(0.05)
    keeper.release("first")
    frees(writer, PROMPT.name)
    keeper.close()


def test_what_is_to_be_released_is_with_the_next_word(ends, shortage):
    writer, reader = honest_writer(ends), new_reader(ends)
    writer.hold(PROMPT)
    with shortage():
        reader.connections.release_later(reference(writer))
    assert not writer.outbox.take_freed()
    reader.connections.release_later(reference(writer))
    frees(writer, PROMPT.name)


def test_prompts_are_pulled_by_the_threads_that_there_are(ends, shortage):
    writer, reader = honest_writer(ends), new_reader(ends)
    wait_until(lambda: any(one.name.startswith("pd-pull") for one in threading.enumerate()))
    writer.hold(PROMPT)
    with reader.connections.to(writer.peer()):
        # The writer has a thread for this connection already.
        pass
    with shortage():
        reader.pull(PROMPT, peers=[writer.peer()])
        assert reader.wait(1) == set()
    frees(writer, PROMPT.name)
    goes_on(reader, writer)

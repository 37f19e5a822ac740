import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from vllm_plugins.bench import load, server
from vllm_plugins.bench.errors import ProcessFailedError, tail
from vllm_plugins.bench.process import interrupt_on_termination, logged_process, stop_group

PYTHON = sys.executable
# A leader that starts a child which ignores SIGTERM, and tells the child's process id.
STUBBORN = """
import signal, subprocess, sys, time
child = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "print(1, flush=True); time.sleep(60)"
)
started = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
started.stdout.readline()
print(started.pid, flush=True)
time.sleep(60)
"""


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A killed orphan stays in the table until somebody reaps it.
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_group_is_stopped_with_children_that_ignore_the_polite_signal():
    leader = subprocess.Popen(
        [PYTHON, "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True
    )
    child = int(leader.stdout.readline())
    stop_group(leader, grace_s=0.3)
    assert leader.returncode == -signal.SIGTERM
    wait_for(lambda: not is_running(child))
    leader.stdout.close()


def test_children_of_a_leader_that_died_are_stopped_too():
    leader = subprocess.Popen(
        [PYTHON, "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True
    )
    child = int(leader.stdout.readline())
    leader.kill()
    leader.wait()
    assert is_running(child)
    stop_group(leader, grace_s=0.3)
    wait_for(lambda: not is_running(child))
    leader.stdout.close()


def test_an_error_in_the_block_stops_the_process_and_leaves_its_log(tmp_path):
    log = tmp_path / "p.log"
    words = [PYTHON, "-c", "import time; print('ready', flush=True); time.sleep(60)"]
    with pytest.raises(KeyboardInterrupt), logged_process(words, log) as process:
        wait_for(lambda: "ready" in log.read_text())
        raise KeyboardInterrupt
    assert process.returncode is not None
    assert log.read_text().startswith(PYTHON)


def test_termination_is_an_interrupt_inside_the_block_alone():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interrupt_on_termination():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def fake_vllm(monkeypatch):
    def use(program):
        monkeypatch.setattr(server, "VLLM", (PYTHON, "-c", program))

    return use


def test_a_server_that_dies_at_once_is_reported_with_the_tail_of_its_log(tmp_path, fake_vllm):
    fake_vllm("import sys; print('no such model'); sys.exit(3)")
    log = tmp_path / "s.log"
    with pytest.raises(ProcessFailedError) as error, server.serve("m", [], "stock", log, 30):
        pass
    assert "server of 'stock' did not start (exit code 3)" in str(error.value)
    assert "  | no such model" in str(error.value)


def test_a_server_that_never_gets_healthy_is_stopped(tmp_path, fake_vllm):
    fake_vllm("import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    log = tmp_path / "s.log"
    start = "was not healthy after 1 s .--start-timeout"
    with pytest.raises(ProcessFailedError, match=start), server.serve("m", [], "x", log, 1):
        pass
    pid = int(log.read_text().split()[-1])
    wait_for(lambda: not is_running(pid))


class Refusing(BaseHTTPRequestHandler):
    """A server that is healthy, tells its longest request, and fails every other one."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": [{"max_model_len": 2048}]}')

    def do_POST(self):
        self.send_error(500, "out of order")

    def log_message(self, *_):
        pass


@pytest.fixture
def refusing(tmp_path):
    (tmp_path / "s.log").write_text("Traceback")
    with ThreadingHTTPServer((server.HOST, 0), Refusing) as http:
        threading.Thread(target=http.serve_forever).start()
        sleeper = subprocess.Popen([PYTHON, "-c", "import time; time.sleep(60)"])
        url = f"http://{server.HOST}:{http.server_port}"
        yield server.Server(url, "m", "stock", tmp_path / "s.log", sleeper, 1.0)
        http.shutdown()
        sleeper.kill()
        sleeper.wait()


def test_a_server_is_asked_for_its_longest_request(refusing):
    assert refusing.max_model_len() == 2048


def test_a_server_that_refuses_the_warm_up_is_reported_with_its_log(refusing):
    answer = "'stock' did not answer /v1/completions: HTTP Error 500: out of order"
    with pytest.raises(ProcessFailedError, match=answer) as error:
        refusing.warm_up([4, 8])
    assert "  | Traceback" in str(error.value)


def test_a_server_found_dead_is_called_dead(refusing):
    refusing.process.kill()
    refusing.process.wait()
    with pytest.raises(ProcessFailedError, match="'stock' died with exit code -9"):
        refusing.warm_up([4])


ECHO = """
import json, sys
for line in sys.stdin:
    code = json.loads(line)[0]
    if code == "die":
        sys.exit(1)
    if code != "hang":
        print(code, flush=True)
"""


@pytest.fixture
def client(tmp_path):
    log = tmp_path / "client.log"
    with logged_process([PYTHON, "-c", ECHO], log, talks=True) as process:
        yield load.Client(process, log)


class Alive:
    """A server that is never found dead."""

    def check(self):
        pass


class Dead:
    """A server that is found dead."""

    def check(self):
        raise ProcessFailedError("the server died", Path("no-such-log"))


def test_the_client_runs_one_command_after_another(client):
    for _ in range(3):
        client.run(["0"], Alive(), 10)


@pytest.mark.parametrize(
    ("reply", "message"),
    [("2", "failed with exit code 2"), ("die", "died"), ("hang", "took over 1 s")],
)
def test_a_client_that_fails_dies_or_hangs_is_reported(client, reply, message):
    with pytest.raises(ProcessFailedError, match=message):
        client.run([reply], Alive(), 1)


def test_a_dead_server_is_named_rather_than_its_client(client):
    with pytest.raises(ProcessFailedError, match="the server died"):
        client.run(["hang"], Dead(), 10)
    with pytest.raises(ProcessFailedError, match="the server died"):
        client.run(["1"], Dead(), 10)


def test_tail_of_a_log_is_short_and_indented(tmp_path):
    log = tmp_path / "l"
    log.write_text("\n".join(map(str, range(100))))
    assert tail(log, 2) == "  | 98\n  | 99"
    assert tail(tmp_path / "none") == "  | (empty)"

"""`vllm-plugins kvshare`: what it sends, what it prints, and how it fails."""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import uvicorn
from fastapi import FastAPI
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from tests.unit.kvshare_operator import KEY, MAX_MODEL_LEN, TextStore
from vllm_plugins.cli import kvshare, main
from vllm_plugins.kv_connectors.kvshare import operator_api
from vllm_plugins.kv_connectors.kvshare.operator_api import Office, OperatorApi

STORE = {
    "capacity_tokens": 20_000,
    "used_tokens": 1_536,
    "segments": 7,
    "domains": [
        {"domain": "0123456789abcdef", "tokens": 1_024, "segments": 4, "hits": 31},
        {"domain": "fedcba9876543210", "tokens": 400, "segments": 2, "hits": 0},
    ],
    "canonical": [{"name": "manual", "tokens": 112, "segments": 1, "hits": 5}],
}
EVICTED = {"evicted_segments": 2, "evicted_tokens": 30}
REFUSED = 2


class Recorder(ThreadingHTTPServer):
    """An HTTP server that gives one answer and keeps what it was sent."""

    daemon_threads = True
    status, answer, headers = 200, b"{}", {}

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    def _any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(
            SimpleNamespace(method=self.command, path=self.path, headers=self.headers, body=body)
        )
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(self.server.answer)))
        self.end_headers()
        self.wfile.write(self.server.answer)

    do_GET = do_POST = do_DELETE = _any  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    recorder = Recorder()
    thread = threading.Thread(target=recorder.serve_forever)
    thread.start()
    yield recorder
    recorder.shutdown()
    thread.join(30)
    recorder.server_close()


@pytest.fixture(autouse=True)
def no_api_key(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.fixture
def key_file(tmp_path):
    path = tmp_path / "operator"
    path.write_text(KEY + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def run(capsys, key_file, server):
    """Return a function that runs the command against the recorder."""

    def command(action, *words, url=server.url):
        common = ["--url", url, "--operator-key-file", str(key_file)]
        code = main.main(["kvshare", action, *common, *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


def one_line(result):
    """The message of a refusal."""
    code, out, err = result
    assert (code, out) == (REFUSED, "")
    assert err.count("\n") == 1 and err.startswith("vllm-plugins: ") and KEY not in err
    return err.removeprefix("vllm-plugins: ").rstrip("\n")


# --- what it sends and prints ---


def test_inspect_prints_a_table_of_domains_and_one_of_registered_texts(run, server):
    server.answer = json.dumps(STORE).encode()
    code, out, _ = run("inspect")
    assert code == 0 and "1536 of 20000 tokens in 7 segments" in out
    rows = [line.replace("│", " ").split() for line in out.splitlines()]
    assert ["0123456789abcdef", "1024", "4", "31"] in rows
    assert ["manual", "112", "1", "5"] in rows
    (sent,) = server.seen
    assert (sent.method, sent.path, sent.body) == ("GET", "/v1/kvshare/store", b"")
    assert sent.headers[kvshare.KEY_HEADER] == KEY and sent.headers["Authorization"] is None


def test_an_empty_store_is_said_without_tables(run, server):
    server.answer = json.dumps({**STORE, "domains": [], "canonical": []}).encode()
    code, out, _ = run("inspect")
    assert code == 0 and out.strip() == "1536 of 20000 tokens in 7 segments"


def test_names_are_printed_as_they_are(run, server):
    name = "[red]x[/red]"
    canonical = [{"name": name, "tokens": 1, "segments": 1, "hits": 0}]
    server.answer = json.dumps({**STORE, "canonical": canonical}).encode()
    assert name in run("inspect")[1]


@pytest.mark.parametrize("words", [["inspect"], ["evict", "--all"], ["evict", "manual"]])
def test_json_is_the_servers_answer(run, server, words):
    server.answer = json.dumps({**STORE, "more": [1]}).encode()
    code, out, _ = run(*words, "--json")
    assert code == 0 and json.loads(out) == {**STORE, "more": [1]}


def test_register_sends_the_files_as_they_are(run, server, tmp_path):
    text, context = tmp_path / "text", tmp_path / "context"
    text.write_bytes("Grüße\r\nzwei\n".encode())
    context.write_bytes(b"You are helpful.")
    server.answer = b'{"tokens": 112, "segments": 1}'
    assert run("register", "manual", text) == (
        0, "registered manual: 112 tokens in 1 segments\n", ""
    )  # fmt: skip
    assert run("register", "manual", text, "--context-file", context)[0] == 0
    plain, behind = (json.loads(sent.body) for sent in server.seen)
    assert plain == {"name": "manual", "text": "Grüße\r\nzwei\n"}
    assert behind == {**plain, "context": "You are helpful."}
    assert {(s.method, s.path) for s in server.seen} == {("POST", "/v1/kvshare/segments")}
    assert server.seen[0].headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("words", "path"),
    [
        (["manual"], "/segments/manual"),
        (["a/b ?#%"], "/segments/a%2Fb%20%3F%23%25"),
        (["--domain", "0123456789abcdef"], "/domains/0123456789abcdef"),
        (["--domain", "../store"], "/domains/..%2Fstore"),
        (["--all"], "/store"),
    ],
)
def test_evict_names_what_is_to_go(run, server, words, path):
    server.answer = json.dumps(EVICTED).encode()
    assert run("evict", *words) == (0, "evicted 30 tokens in 2 segments\n", "")
    (sent,) = server.seen
    assert (sent.method, sent.path) == ("DELETE", f"/v1/kvshare{path}")


def test_the_api_key_comes_from_the_argument_or_the_environment(run, server, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "from-environment")
    run("inspect")
    run("inspect", "--api-key", "from-argument")
    keys = [sent.headers["Authorization"] for sent in server.seen]
    assert keys == ["Bearer from-environment", "Bearer from-argument"]


def test_an_address_with_a_path_and_a_slash_is_taken(run, server):
    server.answer = json.dumps(STORE).encode()
    assert run("inspect", url=f"{server.url}/proxy/")[0] == 0
    assert server.seen[0].path == "/proxy/v1/kvshare/store"


@pytest.mark.parametrize(
    "words",
    [
        ["evict"],
        ["evict", "a", "--all"],
        ["evict", "a", "--domain", "b"],
        ["evict", "--all", "--domain", "b"],
        ["register", "a"],
        ["inspect", "a"],
        ["look"],
    ],
)
def test_wrong_words_end_with_usage(run, server, words, capsys):
    with pytest.raises(SystemExit) as end:
        run(*words)
    assert end.value.code == 2 and "usage: vllm-plugins " in capsys.readouterr().err
    assert server.seen == []


# --- how it fails ---


def vllm_error(message, code):
    return json.dumps({"error": {"message": message, "type": "x", "param": None, "code": code}})


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (401, '{"error": "Unauthorized"}', "Unauthorized (HTTP status 401); check --operator-key"),
        (401, vllm_error("no key", 401), "no key (HTTP status 401); check --operator-key-file and"),
        (
            404,
            vllm_error("Not Found", 404),
            "Not Found (HTTP status 404); start the server with "
            "VLLM_PLUGINS=vllm_plugins,kvshare_operator",
        ),
        (404, '{"detail": "Not Found"}', "Not Found (HTTP status 404); start the server with "),
        (404, vllm_error("no text is named 'a'", 404), "no text is named 'a' (HTTP status 404); "),
        (409, vllm_error("no\nroom", 409), "no room (HTTP status 409); `vllm-plugins kvshare"),
        (500, "<html>", "Internal Server Error (HTTP status 500)"),
        (502, "[]", "Bad Gateway (HTTP status 502)"),
        (503, "", "Service Unavailable (HTTP status 503)"),
        (500, '{"error": null}', "Internal Server Error (HTTP status 500)"),
        (500, '{"error": {}}', "Internal Server Error (HTTP status 500)"),
    ],
)
def test_a_refusal_of_the_server_is_one_line(run, server, status, body, said):
    server.status, server.answer = status, body.encode()
    message = one_line(run("inspect"))
    assert message.startswith(f"{server.url}/v1/kvshare/store: {said}")


@pytest.mark.parametrize("answer", [b"", b"<html>", b"[1]", b"\xff", b"null"])
def test_another_kind_of_answer_is_refused(run, server, answer):
    server.answer = answer
    assert "does not answer with a JSON object" in one_line(run("inspect"))


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("words", [["inspect"], ["evict", "--all"]])
def test_keys_do_not_follow_a_redirect(run, server, status, words):
    server.status = status
    server.headers = {"Location": f"{server.url}/elsewhere"}
    assert f"(HTTP status {status})" in one_line(run(*words))
    assert [sent.path for sent in server.seen] == ["/v1/kvshare/store"]


def test_keys_do_not_go_to_a_proxy(run, server, monkeypatch):
    server.answer = json.dumps(STORE).encode()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert run("inspect")[0] == 0


def test_a_server_that_does_not_listen_is_said_so(run):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        message = one_line(run("inspect", url=url))
    assert message == (
        f"--url {url}/v1/kvshare: no answer: [Errno 111] Connection refused; "
        "check the address and the server"
    )


def test_a_server_that_speaks_no_http_is_said_so(run):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def babble():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"220 mail.example ESMTP\r\n")

        thread = threading.Thread(target=babble)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert "no answer" in one_line(run("inspect", url=url))
        thread.join(30)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "127.0.0.1:8000", "ftp://host", "", "http", "http://", "http://["]
)
def test_what_is_no_http_address_is_refused(run, url):
    expected = f"--url {url}: is no HTTP address; write http://HOST:PORT"
    assert one_line(run("inspect", url=url)) == expected


@pytest.mark.parametrize("url", ["http://127.0.0.1:x", "http://127.0.0.1:99999"])
def test_a_malformed_address_is_refused(run, url):
    assert one_line(run("inspect", url=url)).startswith(f"--url {url}")


def test_a_malformed_api_key_is_refused_without_showing_it(run, server):
    message = one_line(run("inspect", "--api-key", "secret\nkey"))
    assert "--api-key is malformed" in message and "secret" not in message
    assert server.seen == []


def test_a_key_file_that_others_may_read_is_refused(run, key_file, server):
    key_file.chmod(0o644)
    assert one_line(run("inspect")).startswith(f"--operator-key-file={key_file}: others may read")
    assert server.seen == []


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_text_that_cannot_be_read_is_refused(run, server, tmp_path, content):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    reason = "cannot be read: No such file or directory" if content is None else "is not UTF-8 text"
    assert one_line(run("register", "a", path)) == f"FILE {path}: {reason}; name a text file"
    good = tmp_path / "good"
    good.write_text("x")
    message = one_line(run("register", "a", good, "--context-file", path))
    assert message.startswith("--context-file ") and server.seen == []


# --- command and endpoints together ---


@contextmanager
def serving(engine):
    """Run a server with the endpoints and yield its address."""
    app = FastAPI()
    app.state.args = SimpleNamespace(log_error_stack=False)
    app.state.kvshare_operator = Office(engine, KEY.encode())
    init_exception_handler(app)
    OperatorApi().attach_router(app)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        # Requests wait in its queue until the server takes them.
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


def test_command_and_endpoints_understand_one_another(run, tmp_path):
    assert operator_api.router.prefix == kvshare.ROUTES
    assert operator_api.KEY_HEADER == kvshare.KEY_HEADER
    assert operator_api.TIMEOUT_S < kvshare.TIMEOUT_S
    text = tmp_path / "text"
    text.write_text("t5 t6 t7")
    with serving(TextStore()) as url:
        _, out, _ = run("register", "greeting", text, url=url)
        assert out == "registered greeting: 3 tokens in 1 segments\n"
        assert "greeting" in run("inspect", url=url)[1]
        assert run("evict", "greeting", url=url)[1] == "evicted 3 tokens in 1 segments\n"
        assert "no text is named 'greeting'" in one_line(run("evict", "greeting", url=url))
        text.write_text("t5 " * MAX_MODEL_LEN)
        assert "at most 39 fit" in one_line(run("register", "long", text, url=url))

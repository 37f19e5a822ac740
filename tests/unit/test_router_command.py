"""`vllm-plugins route`: its options, what it refuses, and that the command serves and stops."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.router_backends import MODEL, FakeInstance, answer_tokens, prompt_of, text_of
from tests.router_rig import in_loop
from vllm_plugins.cli import main
from vllm_plugins.cli.route import read_settings
from vllm_plugins.errors import PluginError
from vllm_plugins.router.first_token import HOLDS_ONE, REASONS
from vllm_plugins.router.metrics import OUTCOMES
from vllm_plugins.router.settings import RouterSettings, read_admin_key

P, D = "http://127.0.0.1:1", "http://127.0.0.1:2"
BOTH = ["--prefill", P, "--decode", D]
DOCS = Path(__file__).resolve().parents[2] / "docs" / "router.md"


def settings(*words: str) -> RouterSettings:
    """Return the settings of a command line."""
    return read_settings(main.build_parser("route").parse_args(["route", *words]))


REFUSED: list[tuple[list[str], str]] = [
    (["--decode", D], "--prefill: names no instance; give at least one URL"),
    (["--prefill", P], "--decode: names no instance, and without --encode"),
    ([*BOTH, "--encode", P], f"--encode {P}: is named by --prefill already; name each"),
    (["--prefill", P, P, "--decode", D], f"--prefill {P}: is named by --prefill already"),
    (["--prefill", "localhost:1", "--decode", D], "is no address of an instance; write http"),
    (["--prefill", "http://u:p@h:1", "--decode", D], "is no address of an instance"),
    (["--prefill", "http://h:99999", "--decode", D], "is no address of an instance"),
    ([*BOTH, "--host", "0.0.0.0"], "--host 0.0.0.0: others can reach the router"),
    ([*BOTH, "--stall-timeout-s", "700"], "--stall-timeout-s 700: is above"),
    ([*BOTH, "--min-per-stage", "2"], "--min-per-stage 2: a stage has fewer"),
    ([*BOTH, "--roles", "soft", "--cooldown-s", "2"], "--cooldown-s 2: is below --interval-s 5"),
]


@pytest.mark.parametrize(("words", "said"), REFUSED)
def test_what_cannot_work_is_refused_in_one_line(words: list[str], said: str) -> None:
    with pytest.raises(PluginError) as refused:
        settings(*words).check()
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--retries", "-1"], "-1 is below 0"),
        (["--retries", "x"], "invalid int value: 'x'"),
        (["--probe-s", "0"], "0 is not above 0"),
        (["--probe-s", "inf"], "inf is above inf"),
        (["--interval-s", "0.5"], "0.5 is below 1"),
        (["--min-gain", "1.5"], "1.5 is above 1"),
        (["--port", "70000"], "70000 is above 65535"),
        (["--dispatch", "random"], "invalid choice: 'random'"),
        (["--roles", "hard"], "invalid choice: 'hard'"),
        (["--unheard-of"], "unrecognized arguments: --unheard-of"),
    ],
)
def test_values_out_of_bounds_are_refused(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main.main(["route", *BOTH, *words])
    assert said in capsys.readouterr().err


def test_a_command_line_becomes_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "k")
    chosen = settings(*BOTH, "--encode", "http://h:3/", "--no-overlap", "--max-queue", "7")
    assert chosen.encode == ("http://h:3",)
    assert (chosen.overlap, chosen.max_queue, chosen.api_key) == (False, 7, "k")
    chosen.check()
    # Encoders in front of instances that prefill and decode.
    settings("--prefill", P, "--encode", D).check()
    assert settings(*BOTH) == RouterSettings(prefill=(P,), decode=(D,), api_key="k")


@pytest.mark.parametrize("text", ["short", "x" * 5000, "ключ" * 10])
def test_a_bad_operators_key_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    with pytest.raises(PluginError, match="--admin-key-file"):
        read_admin_key(path)
    with pytest.raises(PluginError, match="cannot be read"):
        read_admin_key(tmp_path / "none")


def test_the_documentation_names_every_option_reason_and_outcome() -> None:
    text = DOCS.read_text()
    parser = main.build_parser("route")
    options = re.findall(r"--[a-z-]+", _help(parser))
    missing = [name for name in options if f"`{name}" not in text and name != "--help"]
    missing += [name for name in (*REASONS, *HOLDS_ONE, *OUTCOMES) if f"`{name}`" not in text]
    assert not missing


def _help(parser: Any) -> str:
    actions = parser._subparsers._group_actions[0].choices["route"]._actions
    return " ".join(action.option_strings[0] for action in actions)


@in_loop
async def test_the_command_serves_and_stops() -> None:
    prefill, decode = FakeInstance("prefill"), FakeInstance("decode")
    await prefill.start()
    await decode.start()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--prefill", prefill.url, "--decode", decode.url, "--port", str(port)]
    command = [sys.executable, "-m", "vllm_plugins.cli.main", "route", *words]
    router = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    assert router.stderr is not None
    line = ""
    while "serving on" not in line:
        line = (await router.stderr.readline()).decode()
        assert line, "the router ended before it served"
    body = {"model": MODEL, "prompt": "a b c", "max_tokens": 5, "stream": True}
    decode.gate = asyncio.Semaphore(1)
    url = f"http://127.0.0.1:{port}/v1/completions"
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        await answer.content.readuntil(b"\n\n")
        # Who is being served is served to the end; who comes now is turned away.
        router.send_signal(signal.SIGTERM)
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                await asyncio.sleep(0.01)
            except OSError:
                break
        for _ in range(10):
            decode.gate.release()
        rest = (await answer.content.read()).decode()
    tokens = answer_tokens(prompt_of("/v1/completions", body), 5)
    assert text_of(tokens[-1:]) in rest
    assert rest.endswith("data: [DONE]\n\n")
    assert await router.wait() == 0
    await prefill.stop()
    await decode.stop()


def test_a_taken_port_is_refused_in_one_line() -> None:
    async def serve() -> tuple[int, str]:
        fakes = [FakeInstance("prefill"), FakeInstance("decode")]
        for fake in fakes:
            await fake.start()
        words = ["--prefill", fakes[0].url, "--decode", fakes[1].url, "--port",
                 fakes[0].url.rsplit(":", 1)[1]]  # fmt: skip
        command = [sys.executable, "-m", "vllm_plugins.cli.main", "route", *words]
        router = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
        _, said = await router.communicate()
        for fake in fakes:
            await fake.stop()
        return router.returncode or 0, said.decode()

    status, said = asyncio.run(serve())
    assert status == 2
    assert said.count("\n") == 1
    assert "choose another port" in said

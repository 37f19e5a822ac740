"""ZipCache in a real server: mixed lengths, streams, hang-ups, refusals."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.models import tiny_llama
from tests.serving import ProcessFailedError, served

pytestmark = pytest.mark.serve

TOKENS = 80


@pytest.fixture(scope="module")
def server():
    # Prompts fit into one chunk; prefix caching would let a request read what another has sealed.
    arguments = ("--plugin", "zipcache", "--block-size", "64", "--no-enable-prefix-caching")
    with served(tiny_llama(layers=4), "--max-num-batched-tokens", "16384", *arguments) as running:
        yield running


def prompt_of(i):
    length = (1, 60, 130, 300, 900)[i % 5]
    return [(11 * i + j * j) % 500 for j in range(length)]


def completion(server, prompt, **extra):
    return server.openai.completions.create(
        model=server.model, prompt=prompt, max_tokens=TOKENS, temperature=0,
        extra_body={"ignore_eos": True}, **extra,
    )  # fmt: skip


def test_concurrent_answers_are_those_of_each_request_alone(server):
    alone = [completion(server, prompt_of(i)).choices[0].text for i in range(10)]

    def again(i):
        if i % 3 == 0:
            stream = completion(server, prompt_of(i % 10), stream=True)
            return "".join(piece.choices[0].text for piece in stream)
        if i % 7 == 0:
            with completion(server, prompt_of(i % 10), stream=True) as stream:
                next(stream)
            return None
        return completion(server, prompt_of(i % 10)).choices[0].text

    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(again, range(30)))
    for i, text in enumerate(together):
        assert text is None or text == alone[i % 10]


def test_metrics_are_served(server):
    assert server.metric("vllm_plugins:active", plugin="zipcache") == 1
    assert server.metric("vllm_plugins:zipcache_sealed_blocks_total", reason="prompt") > 10
    assert server.metric("vllm_plugins:zipcache_sealed_blocks_total", reason="decode") > 10
    # 4 layers, 2 heads of 32 channels: a sixth of 512 bytes and more for ranges.
    assert 0 < server.metric("vllm_plugins:zipcache_token_bytes") < 4 * 2 * 256 / 3


def train(*words):
    command = [sys.executable, "-m", "vllm_plugins.cli.main", "train", "zipcache"]
    return subprocess.run([*command, *words], capture_output=True, text=True, check=False)


def test_keys_are_kept_in_bases_that_the_command_finds(tmp_path):
    """As a user does it: find them in a text, and serve with them."""
    model, text, out = tiny_llama(layers=4), tmp_path / "text", tmp_path / "keys.safetensors"
    text.write_text("This licence is no contract. " * 40)
    words = (str(model), "--text", str(text), "--out", str(out), "--serve-args=--dtype float32")
    done = train(*words, "--window", "129")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"{out}: 4 layers, from ")
    # A hit of the prefix cache would read what the first request has sealed.
    plugin = ("--plugin", f"zipcache:key_transform={out}", "--no-enable-prefix-caching")
    with served(model, *plugin) as server:
        first, again = (completion(server, prompt_of(3)).choices[0].text for _ in range(2))
        assert first == again
        assert server.metric("vllm_plugins:zipcache_sealed_blocks_total", reason="prompt") == 2 * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--text: it has 1 tokens, and a sequence has 1023; give more text or lower --window"),
        (("--text", "nowhere"), "--text nowhere: [Errno 2] No such file or directory: 'nowhere'"),
        (("--out", "nowhere/x"), "--out nowhere/x: its folder does not exist; choose another file"),
        (("--out", "/"), "--out /: it is a folder; choose another file"),
        (("--serve-args='",), "--serve-args: No closing quotation; close the quotation"),
        (("--window", "99999"), "User-specified max_model_len (99999) is greater than the derived"),
    ],
)
def test_what_bases_cannot_be_found_from_is_refused_in_a_line(words, message, tmp_path):
    text = tmp_path / "text"
    text.write_text("x")
    given = (str(tiny_llama(layers=4)), "--text", str(text), "--out", str(tmp_path / "out"))
    done = train(*given, "--serve-args=--dtype float32", *words)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("zipcache", "--block-size", "16"), "--plugin zipcache with --block-size 16"),
        (("zipcache:bits=3/2",), "--plugin zipcache: bits=3/2"),
        (
            ("zipcache:key_transform=nowhere",),
            "--plugin zipcache: key_transform=nowhere: it cannot",
        ),
        (("zipcache", "hip"), "is an attention backend, and so is"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_line(arguments, message):
    with (
        pytest.raises(ProcessFailedError) as error,
        served(tiny_llama(layers=4), "--plugin", *arguments),
    ):
        pass
    assert message in str(error.value)
    assert "Traceback" not in str(error.value)

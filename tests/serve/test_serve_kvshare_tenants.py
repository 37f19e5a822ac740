"""A real server with tenants and an operator: who shares with whom over HTTP, and who may what."""

import json
import secrets
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from openai import OpenAI

from tests.models import tiny_llama
from tests.serve.test_serve_kvshare import DOCS, PROMPTS
from tests.serving import SERVE_DEFAULTS, served

pytestmark = pytest.mark.serve

ALICE, BOB = "alice-" + secrets.token_hex(8), "bob-" + secrets.token_hex(8)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name in ("tenants", "operator"):
        (folder / name).write_text(secrets.token_hex(32))
        (folder / name).chmod(0o600)
    return folder


@pytest.fixture(scope="module")
def plugin(keys):
    return (
        f"kvshare:sharing_scope=public_canonical,tenant_secret_file={keys}/tenants,"
        f"operator_key_file={keys}/operator,selector=none,decode_interval=0"
    )


@pytest.fixture(scope="module")
def server(plugin):
    arguments = ("--block-size", "32", "--max-num-seqs", "8", "--max-num-batched-tokens", "256")
    allowed = {"VLLM_PLUGINS": "vllm_plugins,kvshare_operator"}
    words = (*arguments, "--enable-prompt-tokens-details", "--trust-request-chat-template")
    # Two API servers, which are processes of their own: each has a front door and the endpoints.
    words += ("--api-key", ALICE, BOB, "--api-server-count", "2")
    with served(tiny_llama(layers=4), *words, "--plugin", plugin, environment=allowed) as running:
        yield running


def cached(server, key, prompt, *, stream=False, **extra) -> int:
    """Return how many tokens of a prompt the server did not compute for this client."""
    with OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=120) as client:
        wanted = {"model": server.model, "prompt": prompt, "max_tokens": 3, "temperature": 0}
        if not stream:
            usage = client.completions.create(**wanted, extra_body=extra).usage
        else:
            options = {"include_usage": True}
            pieces = client.completions.create(
                **wanted, stream=True, stream_options=options, extra_body=extra
            )
            usage = [piece.usage for piece in pieces if piece.usage][-1]
    return usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0


def run(server, keys, *words, key=ALICE, operator="operator"):
    command = [sys.executable, "-m", "vllm_plugins.cli.main", "kvshare", *words]
    options = ["--url", server.url, "--api-key", key, "--operator-key-file", keys / operator]
    return subprocess.run(
        [*command, *map(str, options)], capture_output=True, text=True, timeout=120, check=False
    )


def operate(server, keys, *words):
    done = run(server, keys, *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_tenants_are_told_by_their_keys_whatever_salt_they_send(server):
    assert cached(server, ALICE, PROMPTS[0]) == 0
    assert cached(server, ALICE, PROMPTS[1]) > 0.8 * len(PROMPTS[1])
    for salt in ({}, {"cache_salt": "alice"}, {"cache_salt": ALICE}):
        # Neither the store's nor vLLM's own.
        assert cached(server, BOB, [5, 3, *PROMPTS[1]], **salt) == 0
    assert cached(server, BOB, PROMPTS[2], stream=True) > 0


def test_a_chat_is_its_tenants_too(server):
    text = " ".join(str(number) for number in range(300))

    def chat(key):
        with OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
            usage = client.chat.completions.create(
                model=server.model,
                messages=[{"role": "user", "content": text}],
                max_tokens=2,
                extra_body={"chat_template": "{{ messages[0].content }}"},
            ).usage
        return usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0

    assert chat(ALICE) == 0
    assert chat(ALICE) > 0
    assert chat(BOB) == 0


def test_who_shows_no_key_gets_no_further_than_vllm_lets_them(server):
    body = json.dumps({"model": server.model, "prompt": [1, 2], "max_tokens": 1}).encode()
    request = urllib.request.Request(
        f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 401


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b'"x"', b"\xff\xfe", b"[" * 100_000])
def test_bad_bodies_are_vllms_to_refuse_and_the_server_goes_on(server, body):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {ALICE}"}
    request = urllib.request.Request(f"{server.url}/v1/completions", body, headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code in (400, 422)
    assert cached(server, ALICE, PROMPTS[0]) > 0


def test_an_operator_registers_looks_and_evicts(server, keys, tmp_path):
    text = tmp_path / "handbook.txt"
    text.write_text(" ".join(str(number) for number in range(200)))
    made = operate(server, keys, "register", "handbook", str(text))
    assert made["tokens"] > 100
    [row] = operate(server, keys, "inspect")["canonical"]
    assert (row["name"], row["tokens"]) == ("handbook", made["tokens"])
    again = run(server, keys, "register", "handbook", str(text))
    assert again.returncode == 2
    assert "evict it first" in again.stderr
    assert len(again.stderr.splitlines()) == 1
    with OpenAI(base_url=f"{server.url}/v1", api_key=BOB, max_retries=0) as client:
        usage = client.completions.create(
            model=server.model, prompt=f"Read: {text.read_text()} And?", max_tokens=2
        ).usage
    assert usage.prompt_tokens_details.cached_tokens > 0.5 * made["tokens"]
    shown = run(server, keys, "inspect")
    assert "handbook" in shown.stdout
    assert operate(server, keys, "evict", "handbook")["evicted_tokens"] == made["tokens"]
    assert not operate(server, keys, "inspect")["canonical"]


def test_only_who_has_both_keys_is_the_operator(server, keys):
    (keys / "wrong").write_text(secrets.token_hex(32))
    (keys / "wrong").chmod(0o600)
    for key, operator in ((ALICE, "wrong"), ("nobody", "operator")):
        done = run(server, keys, "evict", "--all", key=key, operator=operator)
        assert done.returncode == 2
        assert "401" in done.stderr
    held = operate(server, keys, "inspect")["segments"]
    assert held > 0
    forged = {"kvshare": {"operator": {"do": "evict", "what": "all", "name": "", "mac": "0" * 64}}}
    cached(server, BOB, [1, 2, 3], kv_transfer_params=forged)
    assert operate(server, keys, "inspect")["segments"] == held


def test_everything_can_be_evicted(server, keys):
    cached(server, ALICE, [9, *DOCS[0], *DOCS[1]])
    assert operate(server, keys, "evict", "--all")["evicted_segments"] > 0
    store = operate(server, keys, "inspect")
    assert (store["segments"], store["used_tokens"]) == (0, 0)


def test_tenants_that_nobody_vouches_for_are_refused(plugin):
    command = [sys.executable, "-m", "vllm_plugins.bench.vllm_command", "serve"]
    words = [str(tiny_llama(layers=4)), *SERVE_DEFAULTS, "--plugin", plugin]
    done = subprocess.run(
        [*command, *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.rstrip().splitlines()[-1] == (
        "vllm: error: --plugin kvshare: sharing_scope=public_canonical: tells tenants by their API "
        "keys, and the server checks none; set --api-key, or tenant_header behind a gateway that "
        "sets it"
    )

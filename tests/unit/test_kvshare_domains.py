"""Whose KV a request may use: scopes, canonical text, options that make no sense together."""

import secrets
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.unit.kvshare_texts import DOMAIN, OTHER, Server, check_plan, joined, random_text
from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.kvshare.domains import Domains
from vllm_plugins.kv_connectors.kvshare.index import holder
from vllm_plugins.kv_connectors.kvshare.plugin import FRONT_DOOR, KVShareOptions
from vllm_plugins.kv_connectors.kvshare.tenancy import TenantSalts
from vllm_plugins.registry import enable
from vllm_plugins.spec import parse_specs

DESCRIBE = "see `vllm-plugins describe kvshare`"
PUBLIC = b"for everybody"


def key_file(folder, name="secret"):
    path = folder / name
    path.write_text(secrets.token_hex(32))
    path.chmod(0o600)
    return path


def tenant_options(folder, **more):
    values = {"sharing_scope": "tenant", "tenant_secret_file": key_file(folder)}
    return KVShareOptions(**values | more)


# --- Domains ---


def test_requests_of_one_salt_share_a_domain_and_those_without_another():
    domains = Domains(KVShareOptions(), b"k" * 32)
    assert domains.of("a") == domains.of("a")
    assert len({domains.of("a"), domains.of("b"), domains.of(None), domains.of("shared")}) == 4
    assert domains.public is None


def test_a_domain_cannot_be_guessed_from_its_salt():
    first, second = (Domains(KVShareOptions(), secrets.token_bytes(32)) for _ in range(2))
    assert first.of("a") != second.of("a")
    assert first.of(None) != second.of(None)


def test_with_tenants_only_a_signed_salt_has_a_domain(tmp_path):
    options = tenant_options(tmp_path)
    domains = Domains(options, b"unused" * 6)
    salts = TenantSalts(options.tenant_secret_file.read_bytes())
    alice, bob = salts.salt("alice", None), salts.salt("bob", None)
    assert domains.of(alice) not in (None, domains.of(bob))
    assert domains.of("alice") is domains.of(None) is domains.of(alice[:-1]) is None


def test_a_tenants_divisions_are_one_holders(tmp_path):
    options = tenant_options(tmp_path)
    domains = Domains(options, b"unused" * 6)
    salts = TenantSalts(options.tenant_secret_file.read_bytes())
    whole, part, bobs = (
        domains.of(salts.salt(*who)) for who in (("alice", None), ("alice", "x"), ("bob", "x"))
    )
    assert len({whole, part, bobs}) == 3
    assert holder(whole) == holder(part) != holder(bobs)
    assert part[16:] != bobs[16:]


def test_a_tenants_domain_is_the_same_in_every_process(tmp_path):
    options = tenant_options(tmp_path)
    salt = TenantSalts(options.tenant_secret_file.read_bytes()).salt("alice", None)
    program = (
        "import sys\n"
        "from vllm_plugins.kv_connectors.kvshare.domains import Domains\n"
        "from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions\n"
        "options = KVShareOptions(sharing_scope='tenant', tenant_secret_file=sys.argv[1])\n"
        "print(Domains(options, b'other' * 8).of(sys.argv[2]).hex())"
    )
    words = [sys.executable, "-c", program, str(options.tenant_secret_file), salt]
    there = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    assert Domains(options, b"x" * 32).of(salt).hex() == there


def test_canonical_text_has_a_domain_of_its_own(tmp_path):
    canonical = Domains(
        tenant_options(
            tmp_path,
            sharing_scope="public_canonical",
            operator_key_file=key_file(tmp_path, "operator"),
        ),
        b"k" * 32,
    )
    assert canonical.public is not None
    assert Domains(tenant_options(tmp_path), b"k" * 32).public is None


# --- Plans over two domains ---


def two_domains():
    server = Server()
    server.planner._public = PUBLIC
    rng = np.random.default_rng(3)
    return server, [random_text(rng, 200) for _ in range(5)]


def test_a_plan_joins_ones_own_text_and_the_canonical_one():
    server, (own, canonical, secret, new, _) = two_domains()
    server.serve(own)
    server.serve(canonical, PUBLIC)
    server.serve(secret, OTHER)
    prompt = joined(new, canonical, own, secret)
    plan = server.plan(prompt)
    check_plan(plan, prompt)
    assert {run.segment.domain for run in plan.runs} == {DOMAIN, PUBLIC}
    assert plan.reused == 400


def test_canonical_text_behind_its_own_context_is_exact_for_everybody():
    server, (context, canonical, *_) = two_domains()
    server.serve(joined(context, canonical), PUBLIC)
    plan = server.plan(joined(context, canonical), OTHER)
    assert plan.exact_prefix_end == 400
    behind_another = server.plan(joined(canonical, context), OTHER)
    assert not any(run.exact for run in behind_another.runs)


def test_what_is_registered_sees_only_canonical_text():
    server, (own, *_) = two_domains()
    server.serve(own)
    assert server.plan(own, PUBLIC).reused == 0


def test_canonical_text_is_not_stored_again_by_who_reuses_it():
    server, (canonical, new, *_) = two_domains()
    server.serve(canonical, PUBLIC)
    server.serve(joined(new, canonical))
    assert server.index.domain_used(DOMAIN) == 200


# --- Options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("sharing_scope=tenant", "sharing_scope=tenant needs tenant_secret_file"),
        (
            "sharing_scope=public_canonical,tenant_secret_file=/x",
            "sharing_scope=public_canonical needs operator_key_file",
        ),
        ("tenant_header=X-A", "tenant_header has no meaning with sharing_scope=request_salt"),
        (
            "tenant_secret_file=/x",
            "tenant_secret_file has no meaning with sharing_scope=request_salt",
        ),
    ],
)
def test_a_scope_without_what_it_needs_is_refused(options, message):
    with pytest.raises(PluginError) as caught:
        enable(parse_specs([f"kvshare:{options}"]))
    assert str(caught.value) == f"--plugin kvshare: {message}; {DESCRIBE}"


def test_an_unreadable_secret_is_refused_when_the_domains_are_made(tmp_path):
    options = KVShareOptions(sharing_scope="tenant", tenant_secret_file=tmp_path / "nothing")
    with pytest.raises(PluginError, match="tenant_secret_file"):
        Domains(options, b"k" * 32)


@pytest.fixture
def server_line(monkeypatch):
    """Expand `--plugin` for a server with these further arguments; return its middleware."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm_plugins import activation

    monkeypatch.delenv("VLLM_API_KEY", raising=False)

    def expand(*texts, **arguments):
        args = SimpleNamespace(plugin=list(texts), middleware=["their.Own"], **arguments)
        activation._changes(args)
        return args.middleware

    return expand


def test_a_server_with_tenants_gets_the_front_door_once(server_line, tmp_path):
    spec = f"kvshare:sharing_scope=tenant,tenant_secret_file={key_file(tmp_path)}"
    assert server_line(spec, api_key=["k1", "k2"]) == [FRONT_DOOR, "their.Own"]
    assert server_line(f"{spec},tenant_header=X-Tenant", api_key=None) == [FRONT_DOOR, "their.Own"]
    assert server_line("kvshare", api_key=None) == ["their.Own"]


@pytest.mark.parametrize("keys", [None, [], [""]])
def test_tenants_that_nobody_vouches_for_are_refused(server_line, tmp_path, keys):
    spec = f"kvshare:sharing_scope=tenant,tenant_secret_file={key_file(tmp_path)}"
    assert server_line(spec, api_key=keys, headless=True) == ["their.Own"]
    with pytest.raises(SystemExit) as caught:
        server_line(spec, api_key=keys)
    assert str(caught.value) == (
        "vllm: error: --plugin kvshare: sharing_scope=tenant: tells tenants by their API keys, and "
        "the server checks none; set --api-key, or tenant_header behind a gateway that sets it"
    )

"""Keys, signed salts and signed orders: what verifies, and that nothing else does."""

import hashlib
import os
import pickle
import string
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vllm.entrypoints.generate.base.protocol import validate_cache_salt

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.kvshare.tenancy import (
    OperatorOrders,
    TenantSalts,
    canonical_salt,
    read_key,
    unsigned_salt,
)

SECRET, OTHER_SECRET = b"s" * 32, b"t" * 32
SALTS, OTHER_SALTS = TenantSalts(SECRET), TenantSalts(OTHER_SECRET)
ORDERS, OTHER_ORDERS = OperatorOrders(SECRET), OperatorOrders(OTHER_SECRET)
OPTION = "--plugin kvshare: tenant_secret_file"

# Halves of surrogate pairs included: JSON can spell them.
texts = st.text(st.characters(), max_size=40)
own_salts = st.none() | texts
sane = settings(deadline=None, derandomize=True, max_examples=300)


def key_file(folder: Path, content: bytes, mode: int = 0o600) -> Path:
    path = folder / "key"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def refusal(path: Path) -> PluginError:
    with pytest.raises(PluginError) as caught:
        read_key(OPTION, path)
    assert "\n" not in str(caught.value) and caught.value.where == f"{OPTION}={path}"
    return caught.value


# --- keys ---


@pytest.mark.parametrize(
    "content", [b"k" * 32, b"k" * 4096, b"  " + b"k" * 32 + b"\r\n", b"a word " * 8]
)
def test_a_key_is_read_without_the_white_space_around_it(tmp_path, content):
    assert read_key(OPTION, key_file(tmp_path, content)) == content.strip()


def test_a_key_made_as_the_message_says_is_taken(tmp_path):
    path = tmp_path / "FILE"
    mend = refusal(path).mend
    command = mend.split("`")[1].replace("FILE", str(path))
    subprocess.run(["bash", "-c", command], check=True)
    assert len(read_key(OPTION, path)) == 64


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "does not hold 32 to 4096 bytes"),
        (b"k" * 31, "does not hold 32 to 4096 bytes"),
        (b" " * 40 + b"k" * 31, "does not hold 32 to 4096 bytes"),
        (b"k" * 4097, "does not hold 32 to 4096 bytes"),
        (b"k" * 32 + b"\n" * 5000, "does not hold 32 to 4096 bytes"),
        (b"k" * 32 + b"\nsecond line", "is not one line of printable ASCII text"),
        (bytes(range(128, 192)), "is not one line of printable ASCII text"),
        ("ä".encode() * 32, "is not one line of printable ASCII text"),
        (b"k" * 31 + b"\0" + b"k" * 31, "is not one line of printable ASCII text"),
    ],
)
def test_a_file_that_holds_no_key_is_refused(tmp_path, content, reason):
    assert refusal(key_file(tmp_path, content)).reason == reason


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o620, 0o601, 0o777])
def test_a_key_that_others_may_read_or_write_is_refused(tmp_path, mode):
    error = refusal(key_file(tmp_path, b"k" * 32, mode))
    assert error.reason == f"others may read or write it (mode {mode:04o})"
    assert "0600" in error.mend


@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_a_key_that_only_its_owner_may_read_is_taken(tmp_path, mode):
    assert read_key(OPTION, key_file(tmp_path, b"k" * 32, mode)) == b"k" * 32


def test_the_group_may_read_a_key_that_somebody_else_owns(tmp_path, monkeypatch):
    path = key_file(tmp_path, b"k" * 32, 0o640)
    owner = path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    assert read_key(OPTION, path) == b"k" * 32
    path.chmod(0o644)
    assert "others may read" in refusal(path).reason


def test_a_missing_file_and_what_is_no_file_are_refused_at_once(tmp_path):
    assert refusal(tmp_path / "none").reason == "cannot be read: No such file or directory"
    assert refusal(tmp_path).reason in ("is not a regular file", "cannot be read: Is a directory")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    assert refusal(pipe).reason == "is not a regular file"
    assert refusal(Path("/dev/zero")).reason == "is not a regular file"


def test_a_link_to_a_key_is_followed(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(key_file(tmp_path, b"k" * 32))
    assert read_key(OPTION, link) == b"k" * 32


# --- salts ---


@sane
@given(texts, own_salts)
def test_a_salt_is_vllms_and_names_the_same_domain_each_time(tenant, own):
    salt = SALTS.salt(tenant, own)
    assert salt == TenantSalts(SECRET).salt(tenant, own)
    validate_cache_salt(salt)
    assert salt.isascii()
    domain = SALTS.domain(salt)
    assert domain is not None and len(domain) == 32


def test_a_salt_is_the_same_in_every_process():
    code = (
        "from vllm_plugins.kv_connectors.kvshare.tenancy import TenantSalts\n"
        f"print(TenantSalts({SECRET!r}).salt('acme', 'own'), end='')"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout == SALTS.salt("acme", "own")


@sane
@given(st.lists(st.tuples(texts, own_salts), unique=True, min_size=2, max_size=6))
def test_no_two_pairs_of_tenant_and_own_salt_share_a_domain(pairs):
    salts = [SALTS.salt(*pair) for pair in pairs]
    assert len({SALTS.domain(salt) for salt in salts}) == len(set(salts)) == len(pairs)


@sane
@given(texts, st.integers(0, 40), own_salts)
def test_text_moved_between_tenant_and_own_salt_gives_another_domain(text, cut, own):
    """The pairs that differ only in where one text ends and the next begins."""
    joined = text + (own or "")
    pairs = {(joined[:cut], joined[cut:]), (text, own), (joined, None), (joined, ""), ("", joined)}
    assert len({SALTS.domain(SALTS.salt(*pair)) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize(
    "a", ["é", "\ud800", "\U00010400", "", "\0", "a\0b", "none", "\ud801\udc00"]
)
@pytest.mark.parametrize("b", ["e\u0301", "\ud801", "\ud801\udc00", "\0\0", "a", "None", "é"])
def test_unicode_is_told_apart_as_it_is_spelt(a, b):
    assume_distinct = a != b
    assert (SALTS.salt(a, None) != SALTS.salt(b, None)) is assume_distinct
    assert (SALTS.salt("t", a) != SALTS.salt("t", b)) is assume_distinct


@sane
@given(texts, own_salts)
def test_another_secret_makes_other_domains_and_verifies_none_of_these(tenant, own):
    salt = SALTS.salt(tenant, own)
    assert OTHER_SALTS.domain(salt) is None
    assert OTHER_SALTS.domain(OTHER_SALTS.salt(tenant, own)) != SALTS.domain(salt)


@sane
@given(texts, own_salts, st.data())
def test_a_salt_with_any_other_character_does_not_verify(tenant, own, data):
    salt = SALTS.salt(tenant, own)
    at = data.draw(st.integers(0, len(salt) - 1))
    character = data.draw(st.sampled_from(string.printable) | st.characters())
    assume(character != salt[at])
    assert SALTS.domain(salt[:at] + character + salt[at + 1 :]) is None


@sane
@given(texts, st.data())
def test_a_salt_cut_or_prolonged_does_not_verify(tenant, data):
    salt = SALTS.salt(tenant, None)
    start = data.draw(st.integers(0, len(salt)))
    end = data.draw(st.integers(start, len(salt)))
    assume((start, end) != (0, len(salt)))
    assert SALTS.domain(salt[start:end]) is None
    more = data.draw(st.text(min_size=1, max_size=3))
    assert SALTS.domain(salt + more) is None
    assert SALTS.domain(more + salt) is None


@sane
@given(st.tuples(texts, own_salts), st.tuples(texts, own_salts))
def test_the_signature_of_one_domain_does_not_fit_another(one, other):
    assume(one != other)
    a, b = SALTS.salt(*one), SALTS.salt(*other)
    head, tail = a.rsplit(".", 1)[0], b.rsplit(".", 1)[1]
    assert SALTS.domain(f"{head}.{tail}") is None


@pytest.mark.parametrize(
    "salt",
    [
        None,
        "",
        "kvshare.",
        "kvshare.tenant." + "0" * 64 + "." + "0" * 32,
        "kvshare.tenant." + "\u0660" * 64 + "." + "0" * 32,
        b"kvshare.tenant.",
        7,
        True,
        ["a"],
        {"a": 1},
        "x" * 1_000_000,
    ],
)
def test_what_is_no_salt_of_ours_has_no_domain(salt):
    assert SALTS.domain(salt) is None


def test_a_verified_salt_in_capitals_or_with_a_line_end_does_not_verify():
    salt = SALTS.salt("acme", None)
    assert SALTS.domain(salt.upper()) is None
    assert SALTS.domain(salt[:15] + salt[15:].upper()) is None
    assert SALTS.domain(salt + "\n") is None


def test_fresh_salts_never_verify_never_repeat_and_are_vllms():
    fresh = [make() for make in (canonical_salt, unsigned_salt) for _ in range(200)]
    assert len(set(fresh)) == len(fresh)
    for salt in fresh:
        validate_cache_salt(salt)
        assert SALTS.domain(salt) is None
    assert all(salt.startswith("kvshare.canonical.") for salt in fresh[:200])
    assert all(salt.startswith("kvshare.unsigned.") for salt in fresh[200:])


def test_a_salt_says_nothing_of_the_tenants_name():
    name = "acme-corporation-berlin"
    salt = SALTS.salt(name, name)
    assert not any(name[i : i + 5] in salt for i in range(len(name) - 4))
    # Nor does a digest without the key lead to it.

    for digest in (hashlib.sha256, hashlib.blake2b, hashlib.md5):
        assert digest(name.encode()).hexdigest()[:16] not in salt


def test_own_salts_that_look_like_ours_stay_within_the_tenants_domains():
    """A client that learnt another tenant's salt gets nowhere with it."""
    stolen = SALTS.salt("victim", None)
    salt = SALTS.salt("thief", stolen)
    assert SALTS.domain(salt) not in (SALTS.domain(stolen), SALTS.domain(SALTS.salt("thief", None)))


# --- orders ---

names = st.text(min_size=1, max_size=12).filter(lambda name: name != "mac")
# What msgpack, by which an order travels to the engine, can carry.
values = st.text(max_size=20) | st.integers(-(2**63), 2**63 - 1)
orders = st.dictionaries(names, values, max_size=8)


@sane
@given(orders)
def test_a_signed_order_verifies_also_after_a_journey(order):
    signed = ORDERS.sign(order)
    assert ORDERS.verify(signed) == order
    assert ORDERS.verify(dict(reversed(signed.items()))) == order
    assert ORDERS.verify(pickle.loads(pickle.dumps(signed))) == order
    assert ORDERS.verify(msgspec.msgpack.decode(msgspec.msgpack.encode(signed))) == order


@sane
@given(orders, st.data())
def test_an_order_that_was_changed_does_not_verify(order, data):
    signed = ORDERS.sign(order)
    changed = dict(signed)
    others = names.filter(lambda name: name not in order)
    action = data.draw(st.sampled_from(["drop", "add", "change", "rename", "swap"]))
    if action == "add" or not order:
        changed[data.draw(others)] = data.draw(values)
    else:
        name, other = (data.draw(st.sampled_from(sorted(order))) for _ in range(2))
        if action == "drop":
            del changed[name]
        elif action == "rename":
            changed[data.draw(others)] = changed.pop(name)
        elif action == "swap":
            changed[name], changed[other] = changed[other], changed[name]
        else:
            changed[name] = data.draw(values)
    assume(changed != signed)
    assert ORDERS.verify(changed) is None


@pytest.mark.parametrize(
    ("signed", "claimed"),
    [
        ({"do": "register", "context": 1}, {"do": "register", "context": True}),
        ({"do": "register", "context": 1}, {"do": "register", "context": 1.0}),
        ({"do": "register", "context": 1}, {"do": "register", "context": "1"}),
        ({"do": "evict", "name": "None"}, {"do": "evict", "name": None}),
        ({"do": "evict", "name": "a"}, {"do": "evict", "name": ["a"]}),
        ({"do": "evict", "name": "a"}, {"do": "evict", "name": {"a": 1}}),
        ({"do": "evict", "name": "a"}, {"do": "evict", "name": b"a"}),
        ({"do": "inspect", "1": "a"}, {"do": "inspect", 1: "a"}),
        ({"do": "inspect", "null": "a"}, {"do": "inspect", None: "a"}),
        ({"do": "inspect"}, {"do": "evict", "what": "all"}),
        ({"do": "evict", "what": "domain", "name": "ab"}, {"do": "evict", "what": "domainab"}),
        ({"do": "evict", "what": "a", "name": "b"}, {"do": "evict", "what": "b", "name": "a"}),
    ],
)
def test_values_of_another_type_or_place_do_not_pass_for_what_was_signed(signed, claimed):
    mac = ORDERS.sign(signed)["mac"]
    assert ORDERS.verify({**claimed, "mac": mac}) is None


@sane
@given(orders, st.data())
def test_no_other_signature_verifies(order, data):
    signed = ORDERS.sign(order)
    mac = signed["mac"]
    at = data.draw(st.integers(0, len(mac) - 1))
    character = data.draw(st.characters())
    assume(character != mac[at])
    assert ORDERS.verify({**signed, "mac": mac[:at] + character + mac[at + 1 :]}) is None
    assert ORDERS.verify({**signed, "mac": mac[: data.draw(st.integers(0, len(mac) - 1))]}) is None
    assert ORDERS.verify({**signed, "mac": mac.upper()}) is None
    assert ORDERS.verify(order) is None


@pytest.mark.parametrize("mac", [None, 0, True, b"", "", [], {}, "é" * 64, "\ud800", float("nan")])
def test_a_signature_of_another_type_does_not_verify(mac):
    assert ORDERS.verify({"do": "inspect", "mac": mac}) is None


@pytest.mark.parametrize("signed", [None, 1, "inspect", b"x", [], ["mac"], {}, {"mac": "0" * 64}])
def test_what_is_no_order_does_not_verify(signed):
    assert ORDERS.verify(signed) is None


def test_another_key_signs_otherwise():
    order = {"do": "evict", "what": "all"}
    assert ORDERS.verify(OTHER_ORDERS.sign(order)) is None
    assert OTHER_ORDERS.verify(ORDERS.sign(order)) is None


@pytest.mark.parametrize(
    "order",
    [
        {"do": "x" * 257},
        {"x" * 257: "do"},
        {str(i): i for i in range(9)},
        {"mac": "a"},
        {"do": True},
        {"do": 1.5},
        {"do": None},
        {"do": ["a"]},
        {1: "a"},
    ],
)
def test_what_is_too_large_or_ambiguous_is_not_signed(order):
    with pytest.raises(ValueError, match="not an order"):
        ORDERS.sign(order)
    assert ORDERS.verify({**order, "mac": "0" * 64}) is None


def test_uses_of_one_secret_do_not_pass_for_one_another():
    """The same file may hold both secrets: no signature of one use is one of the other."""
    domain = SALTS.domain(SALTS.salt("acme", None))
    parts = [SALTS.salt("acme", None).rsplit(".", 1)[1], domain.hex()]
    mac = ORDERS.sign({"do": "inspect"})["mac"]
    assert not any(part in mac or mac in part for part in parts)
    keys = {SALTS._naming, SALTS._signing, ORDERS._key, SECRET}
    assert len(keys) == 4


def test_the_module_imports_neither_torch_nor_vllm():
    code = (
        "import sys, vllm_plugins.kv_connectors.kvshare.tenancy\n"
        "print(sorted({'torch', 'vllm', 'numpy', 'fastapi'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

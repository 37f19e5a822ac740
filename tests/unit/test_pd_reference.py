"""What names a prompt's KV: read back as written, and refused in every malformed form."""

import copy

import pytest

from vllm_plugins.kv_connectors.pd.reference import (
    KEY,
    MAX_PEERS,
    MAX_TOKENS,
    BadReferenceError,
    Peer,
    Reference,
    prompt_digest,
    transfer_id,
)
from vllm_plugins.wire.address import Address

TOKENS = list(range(5, 55))
PEERS = (
    Peer(Address("127.0.0.1", 4000), "0" * 16),
    Peer(Address("::1", 65535, "vllm-plugins-" + "a" * 32, "b" * 32), "f" * 16),
)


def reference(tokens=TOKENS, extra=()) -> Reference:
    return Reference("chat-1:a.b_c", len(tokens), prompt_digest(tokens, extra), PEERS)


STREAMED = Reference("t", None, None, PEERS)


@pytest.mark.parametrize("one", [reference(), STREAMED], ids=["computed", "streamed"])
def test_a_reference_is_read_back_as_it_was_written(one):
    params = one.to_params()
    assert Reference.from_params(params) == one
    assert params["do_remote_prefill"] is True
    assert params["do_remote_decode"] is False
    assert one.streams is (one is STREAMED)


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": False}, {"remote_host": "h"}])
def test_a_request_without_reference_has_none(params):
    assert Reference.from_params(params) is None


WRONG = [None, True, False, 0, -1, 1.5, float("nan"), "", "x", [], {}, [None], {"a": 1}, "é" * 9]
PATHS = {
    ("version",): [2, "1", 1.0],
    ("transfer_id",): ["a" * 257, "a b", "a/b", "a\n"],
    ("num_tokens",): [MAX_TOKENS + 1, 1 << 70, "50"],
    ("digest",): ["0" * 31, "0" * 33, "G" * 32, "A" * 32, "0" * 32 + "\n"],
    ("peers",): [[{}] * (MAX_PEERS + 1), "peers", [[]]],
    ("peers", 0): [],
    ("peers", 0, "generation"): ["0" * 15, "0" * 17, "F" * 16],
    ("peers", 0, "address"): [],
    ("peers", 0, "address", "host"): ["a" * 254, "a b", "a\0", "/etc"],
    ("peers", 0, "address", "port"): [65536, "4000"],
    ("peers", 1, "address", "unix"): ["other-program", "vllm-plugins-" + "z" * 32],
    ("peers", 1, "address", "host_id"): ["b" * 31],
}
# A name of one letter is one, and an address may do without a Unix socket.
HARMLESS = {"transfer_id": "x", "host": "x", "unix": "", "host_id": ""}
REQUIRED = [
    [str(step) for step in path] for path in PATHS if path[-1] not in (0, "unix", "host_id")
]
MUTATIONS = [
    pytest.param(path, value, id=f"{'.'.join(map(str, path))}={value!r:.20}")
    for path, values in PATHS.items()
    for value in WRONG + values
    if HARMLESS.get(path[-1]) != value or value is None
]


def mutated(path, value):
    params = copy.deepcopy(reference().to_params())
    place = params[KEY]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return params


@pytest.mark.parametrize(("path", "value"), MUTATIONS)
def test_a_malformed_field_is_refused(path, value):
    with pytest.raises(BadReferenceError):
        Reference.from_params(mutated(path, value))


@pytest.mark.parametrize("name", [".".join(path) for path in REQUIRED])
def test_a_missing_field_is_refused(name):
    path = [int(step) if step.isdigit() else step for step in name.split(".")]
    params = copy.deepcopy(reference().to_params())
    place = params[KEY]
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    with pytest.raises(BadReferenceError):
        Reference.from_params(params)


def test_an_unknown_field_of_an_address_is_refused():
    with pytest.raises(BadReferenceError, match="address"):
        Reference.from_params(mutated(("peers", 0, "address", "extra"), 1))


@pytest.mark.parametrize("body", [None, 1, "x", [], True])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(BadReferenceError, match="not from this connector"):
        Reference.from_params({"do_remote_prefill": True, KEY: body})


@pytest.mark.parametrize("params", ["do_remote_prefill", 1, ["do_remote_prefill"], True])
def test_parameters_that_are_no_object_are_refused(params):
    # They come from a client, and an exception of another kind would end the engine.
    with pytest.raises(BadReferenceError, match="no JSON object"):
        Reference.from_params(params)


def test_a_version_is_a_whole_number():
    with pytest.raises(BadReferenceError, match="version True, here 1"):
        Reference.from_params(mutated(("version",), True))


def test_a_transfer_is_named_by_short_plain_text():
    assert transfer_id({"transfer_id": "A-z0.9:_"}) == "A-z0.9:_"
    with pytest.raises(BadReferenceError, match="transfer_id"):
        transfer_id({})


EXTRAS = [
    (),
    (None, None),
    ("adapter", None),
    (None, "adapter"),
    (None, "salt"),
    ("adapter", "salt"),
    (None, None, ("image", 3)),
    (None, None, ("image", 4)),
    (None, None, ("other", 3)),
    (None, None, ("image", 3), ("image", 9)),
]


def test_the_digest_depends_on_tokens_adapter_salt_and_media():
    token_lists = [TOKENS, TOKENS[:-1], [*TOKENS, 5], TOKENS[::-1], [TOKENS[0] + 1, *TOKENS[1:]]]
    digests = {prompt_digest(tokens, extra) for tokens in token_lists for extra in EXTRAS}
    assert len(digests) == len(token_lists) * len(EXTRAS)
    assert prompt_digest(TOKENS, EXTRAS[5]) == prompt_digest(tuple(TOKENS), list(EXTRAS[5]))


def test_tokens_cannot_be_taken_for_what_follows_them():
    # What a salt of 6 characters puts into the digest, as the token ids that have the same bytes.
    text = repr("salted").encode()
    tokens = [len(text), int.from_bytes(text, "little")]
    assert prompt_digest([], ("salted",)) != prompt_digest(tokens)


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_reference_covers_its_own_prompt_and_no_other(extra):
    one = reference(TOKENS, extra)
    assert one.check(TOKENS, extra) == len(TOKENS)
    assert one.check([*TOKENS, 1, 2], extra) == len(TOKENS)
    for other in EXTRAS:
        if other != extra:
            with pytest.raises(BadReferenceError, match="others than those"):
                one.check(TOKENS, other)


@pytest.mark.parametrize("position", range(len(TOKENS)))
def test_a_reference_to_a_prompt_that_differs_in_one_token_is_refused(position):
    changed = TOKENS.copy()
    changed[position] ^= 1
    with pytest.raises(BadReferenceError, match="others than those"):
        reference().check(changed, ())


def test_a_reference_to_more_tokens_than_the_prompt_has_is_refused():
    with pytest.raises(BadReferenceError, match="50 tokens, and the prompt has 49"):
        reference().check(TOKENS[:-1], ())


def test_a_streamed_reference_covers_the_whole_prompt():
    assert STREAMED.check(TOKENS, ("anything",)) == len(TOKENS)

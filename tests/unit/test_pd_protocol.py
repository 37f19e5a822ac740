"""Messages: read back as written, refused where malformed, and pieces that cover their span."""

import json

import pytest

from vllm_plugins.kv_connectors.pd.geometry import MAX_LAYERS
from vllm_plugins.kv_connectors.pd.protocol import (
    GONE,
    MAX_BLOCKS,
    MAX_GROUPS,
    MAX_TRANSFERS,
    PullRequest,
    Span,
    integers,
    says_gone,
    text,
    transfers,
)
from vllm_plugins.wire.errors import WireClosedError, WireRefusedError
from vllm_plugins.wire.frame import Limits

REQUEST = PullRequest(
    "t", "d" * 32, (Span(1, 5), Span(0, 0)), (("a", 0), ("b", 1)), (2, 4), 1, 2, 1 << 25
)


def test_a_request_is_read_back_as_it_was_written():
    assert PullRequest.from_json(json.loads(json.dumps(REQUEST.to_json()))) == REQUEST


WRONG = {
    "transfer": [None, 1, ["t"], "t" * 257],
    "digest": [None, 0, "d" * 257],
    "groups": [None, [], {}, "x", [[1]], [[1, 2, 3]], [[-1, 2]], [[0, MAX_BLOCKS + 1]], [[0, 1.0]],
               [[True, 2]], [["0", "1"]], [None], [[0, 1]] * (MAX_GROUPS + 1), [[0, 1]]],
    "layers": [None, [], "ab", ["a"], [["a"]], [["a", 0, 0]], [[0, 0]], [["a", "0"]], [["a", 2]],
               [["a", -1]], [["a", True]], [["a", 0], ["a", 0]], [["a", 0], ["a", 1]],
               [[f"{i}", 0] for i in range(MAX_LAYERS + 1)]],
    "heads": [None, 3, [1], [1, 2, 3], [-1, 2], ["1", 2], [1, 1.5], [0, MAX_BLOCKS + 1]],
    "reader": [None, -1, "0", 1.0, [0], True, 1 << 41],
    "readers": [None, -1, "1", {}],
    "shared": [None, -1, "0", 0.5, (1 << 40) + 1],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}={value!r:.20}")
        for name, values in WRONG.items()
        for value in values
    ],
)
def test_a_malformed_request_is_refused(name, value):
    with pytest.raises(ValueError):
        PullRequest.from_json(REQUEST.to_json() | {name: value})


@pytest.mark.parametrize("name", REQUEST.to_json())
def test_a_request_that_lacks_something_is_refused(name):
    header = REQUEST.to_json()
    del header[name]
    with pytest.raises(ValueError):
        PullRequest.from_json(header)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 128, 640, 1 << 20])
@pytest.mark.parametrize("span", [Span(0, 1), Span(3, 3), Span(0, 10), Span(7, 24), Span(5, 2)])
def test_pieces_cover_a_span_exactly(span, size):
    pieces = list(span.pieces(64, size))
    assert [i for piece in pieces for i in range(piece.first, piece.last)] == list(
        range(span.first, span.last)
    )
    assert all(0 < len(piece) * 64 <= max(size, 64) for piece in pieces)
    assert len(pieces) == -(-len(span) // max(1, size // 64))


def test_transfers_are_short_names_and_not_too_many():
    names = ["a", "b" * 256]
    assert transfers({"transfers": names}) == names
    assert transfers({"transfers": []}) == []
    for value in (None, "ab", {}, [1], ["a", None], ["b" * 257], ["a"] * (MAX_TRANSFERS + 1)):
        with pytest.raises(ValueError):
            transfers({"transfers": value})


def test_as_many_transfers_as_are_taken_fit_into_a_header():
    header = {"generation": "0" * 16, "transfers": ["t" * 256] * MAX_TRANSFERS}
    assert len(json.dumps(header)) < Limits().header_bytes


@pytest.mark.parametrize("value", [None, 1, [], "x" * 257])
def test_a_text_is_short(value):
    with pytest.raises(ValueError, match="name is no short text"):
        text({"name": value}, "name")


@pytest.mark.parametrize("value", [None, 5, "12", [1], [1, 2, 3], [1, 8], [-1, 2], [1, True]])
def test_integers_are_so_many_and_bounded(value):
    with pytest.raises(ValueError, match="not 2 integers up to 7"):
        integers(value, 2, 7)
    assert integers([0, 7], 2, 7) == [0, 7]


def test_only_the_workers_own_word_says_gone():
    assert says_gone(WireRefusedError(f"the peer refuses: {GONE}the lease has ended"))
    assert not says_gone(WireRefusedError("the peer refuses: no such heads"))
    assert not says_gone(WireClosedError(f"{GONE}away"))

"""Who pulls what from whom, against a map of every single (layer, head)."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from vllm_plugins.kv_connectors.pd.geometry import (
    MAX_HEADS,
    MAX_LAYERS,
    Heads,
    Shard,
    plan_pulls,
    readers_of,
)

LAYERS = tuple(f"layer.{i}" for i in range(12))
SIZES = [1, 2, 3, 4]


def possible(total, tp):
    """Whether vLLM divides, or replicates, so many heads over so many ranks."""
    return total % tp == 0 or tp % total == 0


def shards(total, tp, pp):
    """Return an instance's shards, in order of pipeline rank, then tensor rank."""
    share = len(LAYERS) // pp
    return [
        Shard(
            LAYERS[p * share : (p + 1) * share],
            Heads.of_rank(total, t, tp),
            16,
            (64,) * share,
            "same",
        )
        for p in range(pp)
        for t in range(tp)
    ]


SHAPES = [
    pytest.param(
        total,
        *shape,
        id=f"{total} heads, tp {shape[0]} pp {shape[1]} to tp {shape[2]} pp {shape[3]}",
    )
    for total in (1, 2, 4, 8)
    for shape in itertools.product(SIZES, repeat=4)
    if possible(total, shape[0]) and possible(total, shape[2])
]


def elements(shard):
    return {(name, h) for name in shard.layers for h in range(shard.heads.first, shard.heads.last)}


@pytest.mark.parametrize(("total", "tp_p", "pp_p", "tp_d", "pp_d"), SHAPES)
def test_each_element_comes_exactly_once_from_one_who_has_it(total, tp_p, pp_p, tp_d, pp_d):
    writers, readers = shards(total, tp_p, pp_p), shards(total, tp_d, pp_d)
    asking = {index: set() for index in range(len(writers))}
    for rank, reader in enumerate(readers):
        came = Counter()
        for pull in plan_pulls(reader, writers):
            wanted = elements(replace(reader, layers=pull.layers, heads=pull.heads))
            assert wanted
            assert wanted <= elements(writers[pull.writer])
            came.update(wanted)
            assert rank not in asking[pull.writer], "a writer is asked twice, and told twice"
            asking[pull.writer].add(rank)
        assert came == dict.fromkeys(elements(reader), 1)
    counts = {index: len(ranks) for index, ranks in asking.items()}
    assert counts == {w: readers_of(w, readers, writers) for w in range(len(writers))}


@pytest.mark.parametrize("total", [1, 2, 4, 8])
@pytest.mark.parametrize("tp", SIZES)
def test_ranks_hold_all_heads_equally_often(total, tp):
    if not possible(total, tp):
        assert tp == 3
        return
    held = Counter(h for rank in range(tp) for h in range(*_ends(Heads.of_rank(total, rank, tp))))
    assert held == dict.fromkeys(range(total), max(1, tp // total))


def _ends(heads):
    return heads.first, heads.last


@pytest.mark.parametrize("a", [(0, 2), (1, 4), (3, 3), (5, 2)])
@pytest.mark.parametrize("b", [(0, 4), (2, 3), (4, 8)])
def test_intervals_meet_where_their_numbers_do(a, b):
    one, other = Heads(*a), Heads(*b)
    both = set(range(*a)) & set(range(*b))
    assert set(range(*_ends(one & other))) == both
    assert (len(one), len(one & other)) == (len(range(*a)), len(both))


ONE = shards(4, 1, 1)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"identity": "another"}, "models, numeric types or KV layouts differ"),
        ({"block_size": 32}, "block sizes differ: 32 on the prefill instance, 16 here"),
        ({"bytes_per_head": (64,) * 11 + (65,)}, "the blocks of layer.11 have another size"),
        ({"layers": LAYERS[1:], "bytes_per_head": (64,) * 11}, "lacks heads of layer.0"),
        ({"heads": Heads(0, 3)}, "lacks heads of layer.0"),
        ({"heads": Heads(1, 4)}, "lacks heads of layer.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        plan_pulls(ONE, [replace(ONE, **change)])


def test_a_gap_between_writers_is_refused():
    writers = [replace(ONE, heads=Heads(0, 1)), replace(ONE, heads=Heads(2, 4))]
    with pytest.raises(ValueError, match="lacks heads"):
        plan_pulls(ONE, writers)


def test_a_layer_of_the_writer_alone_does_not_matter():
    reader = replace(ONE, layers=LAYERS[:2], bytes_per_head=(64, 64))
    assert [pull.layers for pull in plan_pulls(reader, [ONE])] == [LAYERS[:2]]


def test_a_shard_is_read_back_as_it_was_written():
    assert Shard.from_json(ONE.to_json()) == ONE


WRONG = [None, True, -1, 1.5, "x", [], {}, [[]], ["a", 1], [1, 2, 3]]
SPECIAL = [
    ("layers", ["a"] * (MAX_LAYERS + 1)),
    ("layers", list(LAYERS[1:])),
    ("heads", [1, 1]),
    ("heads", [2, 1]),
    ("heads", [-1, 1]),
    ("heads", [0, MAX_HEADS + 1]),
    ("heads", [False, True]),
    ("bytes_per_head", [64] * 11),
    ("bytes_per_head", ["64"] * 12),
    ("states", [["layer.0"]]),
    ("states", [["layer.0", 1]]),
    ("states", [["layer.0", "x"]] * 13),
    ("tensor", [1, 1]),
    ("tensor", [-1, 1]),
    ("tensor", [0, MAX_HEADS + 1]),
]
HARMLESS = {"block_size": -1, "identity": "x", "states": []}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}={value!r:.20}")
        for name, value in [*itertools.product(ONE.to_json(), WRONG), *SPECIAL]
        if HARMLESS.get(name) != value or value is None
    ],
)
def test_a_malformed_shard_is_refused(name, value):
    with pytest.raises(ValueError, match="malformed"):
        Shard.from_json(ONE.to_json() | {name: value})

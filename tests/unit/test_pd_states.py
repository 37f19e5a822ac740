"""Recurrent states on their way: what of a prompt is handed over, as which bytes, by whom."""

import hashlib
import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import SamplingParams
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.pd.geometry import Heads, Shard, plan_pulls, readers_of
from vllm_plugins.kv_connectors.pd.groups import Group, Groups, stop_before_last_token
from vllm_plugins.kv_connectors.pd.outbox import GoneError, Outbox
from vllm_plugins.kv_connectors.pd.pages import Pages
from vllm_plugins.kv_connectors.pd.protocol import Span
from vllm_plugins.registry import enable
from vllm_plugins.simulator.config import make_config, write_model_config
from vllm_plugins.spec import PluginSpec

BLOCKS, STATE_BYTES = 6, 28
OWN = Heads(0, 2)
FORM = "torch.float32[7]"


def pages_of(cache, **more):
    attention = torch.zeros(BLOCKS, 2, 4, 6)
    caches = {"mixer": cache, "attention": attention}
    return Pages(caches, BLOCKS, 4, OWN, "same", {"mixer": FORM}, **more)


def states(seed, padded=True):
    """A recurrent layer's pages, as vLLM gives them: inside of larger ones that others use too."""
    numbers = torch.Generator().manual_seed(seed)
    width = 3 * STATE_BYTES if padded else STATE_BYTES
    larger = torch.randint(-128, 128, (BLOCKS, 1, 1, width), generator=numbers, dtype=torch.int8)
    return larger, larger[..., :STATE_BYTES]


def test_states_leave_and_come_whole_and_alone():
    _, source = states(1, padded=False)
    larger, target = states(2)
    expected = larger.clone()
    pages, others = pages_of(source), pages_of(target)
    leaving, coming = [4, 5], [1, 3]
    assert pages.block_bytes("mixer", OWN) == pages.block_bytes("mixer", Heads(0, 1)) == 28
    data = bytearray(2 * STATE_BYTES)
    pages.gather("mixer", leaving, Heads(0, 1), data)
    assert data == source[leaving].numpy().tobytes()
    others.scatter("mixer", coming, Heads(0, 1), data)
    expected[coming, ..., :STATE_BYTES] = source[leaving]
    assert torch.equal(larger, expected)


def test_the_form_of_states_and_the_rank_are_told():
    shard = pages_of(states(1)[1], tensor_ranks=(1, 2)).shard
    assert shard == Shard(
        ("mixer", "attention"), OWN, 4, (28, 96), "same", (("mixer", FORM),), 1, 2
    )
    assert Shard.from_json(shard.to_json()) == shard


@pytest.mark.parametrize(
    "cache",
    [
        torch.zeros(BLOCKS, 1, 28, dtype=torch.int8),
        torch.zeros(BLOCKS + 1, 1, 1, 28, dtype=torch.int8),
        torch.zeros(BLOCKS, 2, 1, 28, dtype=torch.int8),
        torch.zeros(BLOCKS, 1, 2, 28, dtype=torch.int8),
        torch.zeros(BLOCKS, 1, 1, 7),
    ],
    ids=["3-d", "more blocks", "heads", "several states", "numbers"],
)
def test_states_of_another_form_are_refused(cache):
    with pytest.raises(PluginError) as caught:
        pages_of(cache)
    assert str(caught.value) == (
        "--plugin pd: the cache of mixer is not one of states by block; use another model"
    )


# Layers 1, 3, 5, ... are recurrent.
LAYERS = tuple(f"layer.{i}" for i in range(12))
MIXERS = tuple((name, "float32[2, 8]") for name in LAYERS[1::2])


def shards(total, tp, pp):
    share = len(LAYERS) // pp
    return [
        Shard(
            own := LAYERS[p * share : (p + 1) * share],
            Heads.of_rank(total, t, tp),
            16,
            (64,) * share,
            "same",
            tuple(state for state in MIXERS if state[0] in own),
            t,
            tp,
        )
        for p in range(pp)
        for t in range(tp)
    ]


@pytest.mark.parametrize("total", [1, 2, 4])
@pytest.mark.parametrize(("tp", "pp_p", "pp_d"), itertools.product([1, 2, 4], [1, 2, 3], [1, 2, 3]))
def test_a_state_comes_once_from_the_same_tensor_rank(total, tp, pp_p, pp_d):
    writers, readers = shards(total, tp, pp_p), shards(total, tp, pp_d)
    asking = {index: set() for index in range(len(writers))}
    for rank, reader in enumerate(readers):
        came = []
        for pull in plan_pulls(reader, writers):
            writer = writers[pull.writer]
            assert pull.heads & writer.heads == pull.heads and len(pull.heads)
            mine = [name for name in pull.layers if name in dict(MIXERS)]
            assert not mine or writer.tensor_rank == reader.tensor_rank
            assert set(pull.layers) <= set(writer.layers)
            came += pull.layers
            assert rank not in asking[pull.writer], "a writer is asked twice, and told twice"
            asking[pull.writer].add(rank)
        assert sorted(came) == sorted(reader.layers)
    counts = {index: len(ranks) for index, ranks in asking.items()}
    assert counts == {w: readers_of(w, readers, writers) for w in range(len(writers))}


@pytest.mark.parametrize(("tp_p", "tp_d"), [(1, 2), (2, 1), (2, 4)])
def test_states_of_unequal_tensor_parallelism_are_refused(tp_p, tp_d):
    message = (
        f"divided over {tp_p} tensor ranks on the prefill instance and over {tp_d} here; both need "
        "the same tensor parallel size"
    )
    with pytest.raises(ValueError, match=message):
        plan_pulls(shards(4, tp_d, 1)[0], shards(4, tp_p, 1))


def test_states_of_another_form_on_the_other_side_are_refused():
    (one,) = shards(4, 1, 1)
    for states in (
        (("layer.1", "float32[3, 8]"), *MIXERS[1:]),
        (("layer.1", "bfloat16[2, 8]"), *MIXERS[1:]),
        MIXERS[1:],
    ):
        with pytest.raises(ValueError, match=r"the state of layer\.1 has another form"):
            plan_pulls(one, [replace(one, states=states)])


ATTENTION = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32)
WINDOW = SlidingWindowSpec(
    block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=40
)
MIXER = MambaSpec(block_size=16, shapes=((2, 8),), dtypes=(torch.float32,))


def cache_config(*specs):
    own = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=own)


def groups(*specs):
    return Groups.of(cache_config(*specs))


def test_forms_of_states_have_types_and_shapes():
    both = MambaSpec(
        block_size=16, shapes=((7, 3), (2, 3, 5)), dtypes=(torch.bfloat16, torch.float32)
    )
    assert Groups.state_forms(cache_config(MIXER, ATTENTION, both)) == {
        "layer.0": "torch.float32[2, 8]",
        "layer.2": "torch.bfloat16[7, 3] torch.float32[2, 3, 5]",
    }


def test_groups_are_told_apart():
    assert groups(MIXER, ATTENTION, WINDOW).all == (
        Group(16, is_state=True, forgets=True),
        Group(16),
        Group(16, forgets=True),
    )
    dense, hybrid, windowed = groups(ATTENTION), groups(MIXER, ATTENTION), groups(WINDOW, ATTENTION)
    assert [g.stop_early for g in (dense, hybrid, windowed)] == [False, True, True]
    assert [g.have_states for g in (dense, hybrid, windowed)] == [False, True, False]
    # Without prefix caching a state's block has as many tokens as a request may.
    assert groups(replace(MIXER, block_size=2048), ATTENTION).block_size == 16
    assert [g.most_blocks(33) for g in (dense, hybrid, windowed)] == [3, 4, 6]


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33])
def test_a_state_is_the_block_behind_the_last_token_wherever_that_is(tokens):
    aligned, alone = Group(16, is_state=True, forgets=True), Group(2048, True, True)
    table = [0] * ((tokens - 1) // 16) + [7]
    # A step may have set blocks aside for later tokens.
    for own in (table, [*table, 8]):
        assert aligned.kept(own, tokens) == [7]
        assert aligned.targets(own, 0, tokens) == (Span(0, 1), [7])
    assert alone.kept([7], tokens) == [7]
    assert len(aligned.wanted(0, tokens)) == 1


def test_attention_is_pulled_from_the_hit_on_and_a_window_from_its_start():
    attention, window = Group(16), Group(16, forgets=True)
    assert attention.targets([1, 2, 3, 4], 32, 63) == (Span(2, 4), [3, 4])
    assert window.targets([0, 0, 3, 4], 16, 63) == (Span(2, 4), [3, 4])
    assert window.targets([0, 0, 3, 4], 48, 63) == (Span(3, 4), [4])
    assert window.targets([0, 0], 0, 32) == (Span(2, 2), [])


def digest(value):
    return hashlib.sha256(repr(value).encode()).digest()


def request(tokens, **params):
    init_none_hash(digest)
    hasher = get_request_block_hasher(4, digest)
    return Request("r", tokens, SamplingParams(max_tokens=5, **params), None, block_hasher=hasher)


@pytest.mark.parametrize("length", [2, 4, 5, 8, 9])
def test_a_prompt_is_shortened_by_its_last_token(length):
    tokens = list(range(100, 100 + length))
    made, shorter = request(tokens), request(tokens[:-1])
    assert stop_before_last_token(made)
    assert len(tokens) == length, "the list is the front end's"
    assert made.prompt_token_ids == shorter.prompt_token_ids
    assert list(made.all_token_ids) == list(shorter.all_token_ids)
    assert (made.num_tokens, made.num_prompt_tokens, made.max_tokens) == (length - 1, length - 1, 1)
    assert made.block_hashes == shorter.block_hashes
    made.append_output_token_ids([1])
    shorter.append_output_token_ids([1])
    assert made.block_hashes == shorter.block_hashes


@pytest.mark.parametrize(
    ("tokens", "params"),
    [([7], {}), ([7, 8], {"prompt_logprobs": 1})],
    ids=["one token", "computed anew in any case"],
)
def test_a_prompt_stays_whole_where_nothing_would_be_gained(tokens, params):
    made = request(tokens, **params)
    assert not stop_before_last_token(made)
    assert (made.prompt_token_ids, made.num_prompt_tokens, made.max_tokens) == (
        tokens, len(tokens), 5,
    )  # fmt: skip


def test_blocks_that_are_not_kept_are_not_read():
    outbox = Outbox({"mixer": 0}, 5.0)
    outbox.hold("t", "r", "d", [[0, 4]])
    with outbox.reading("t", "d") as reading:
        with reading.copying("mixer", Span(1, 2)) as blocks:
            assert list(blocks) == [4]
        with (
            pytest.raises(GoneError, match="does not keep these blocks"),
            reading.copying("mixer", Span(0, 2)),
        ):
            pass


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return make_config(write_model_config(tmp_path_factory.mktemp("model")), "pd:role=both")


@pytest.mark.parametrize(
    ("kind", "options", "changes", "message"),
    [
        ("is_hybrid", {}, {}, None),
        (
            "is_attention_free", {}, {},
            "--model {model}: a model without attention has no KV to hand over; use a model with "
            "attention layers",
        ),
        (
            "is_hybrid", {}, {"speculative_config": object()},
            "--speculative-config: recurrent states of {model} are handed over without those of "
            "drafts; drop --speculative-config",
        ),
        (
            "is_hybrid", {"transport": "nixl"}, {},
            "transport=nixl: NixlConnector does not hand the recurrent states of {model} over "
            "exactly in every mode of the router; use another transport",
        ),
    ],
    ids=["hybrid", "without attention", "drafts", "nixl"],
)  # fmt: skip
def test_what_states_do_not_go_with_is_refused(
    config, monkeypatch, kind, options, changes, message
):
    monkeypatch.setattr(type(config.model_config), kind, True)
    for name, value in changes.items():
        monkeypatch.setattr(config, name, value)
    (item,) = enable([PluginSpec("pd", {"role": "both", **options})])
    if message is None:
        item.plugin.check(item.options, config)
        return
    with pytest.raises(PluginError) as caught:
        item.plugin.check(item.options, config)
    assert str(caught.value) == "--plugin pd with " + message.format(
        model=config.model_config.model
    )

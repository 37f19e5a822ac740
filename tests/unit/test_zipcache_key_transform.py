"""Bases of keys: what is fitted, what it costs scores, and files of it."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_plugins.attention_backends.zipcache import key_transform, quantiser, worker
from vllm_plugins.attention_backends.zipcache.key_transform import (
    BLOCK,
    KeyTransform,
    KeyTransformFile,
    Moments,
    fit,
    rotation,
)
from vllm_plugins.attention_backends.zipcache.plugin import ZipCacheOptions
from vllm_plugins.attention_backends.zipcache.train import check, joined, windows
from vllm_plugins.engine.kv_heads import heads_of_rank
from vllm_plugins.errors import PluginError

HEADS, KV_HEADS = 6, 2
SIZES = [16, 64, 80, 96, 128]


def moments(size, seed=0):
    """Covariances whose channels differ by orders of magnitude and go together, as those of models
    do."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(2, KV_HEADS, size, size, generator=generator, dtype=torch.float64)
    wide = torch.logspace(-1.5, 1.5, size, dtype=torch.float64)
    first, second = (wide[:, None] * (torch.eye(size) + 0.3 * x) for x in mixed)
    return first @ first.mT, second @ second.mT


def tokens(size, count, seed=0):
    """Queries and keys of such covariances, keys around a mean of their own."""
    generator = torch.Generator().manual_seed(seed)
    spread, queries = (torch.linalg.cholesky(x) for x in moments(size))
    key = torch.randn(count, KV_HEADS, size, generator=generator, dtype=torch.float64)
    query = torch.randn(count, HEADS, size, generator=generator, dtype=torch.float64)
    key = torch.einsum("tkd,ked->tke", key, spread) + 20
    grouped = query.unflatten(1, (KV_HEADS, -1))
    return torch.einsum("tkgd,ked->tkge", grouped, queries).flatten(1, 2), key


def cost(spread, queries, matrix):
    """What noise in proportion to each channel's spread costs a score, up to a factor."""
    inverse = torch.linalg.inv(matrix)
    of_keys = (matrix.mT @ spread @ matrix).diagonal(dim1=-2, dim2=-1)
    of_queries = (inverse @ queries @ inverse.mT).diagonal(dim1=-2, dim2=-1)
    return (of_keys * of_queries).sum(-1)


def scores(query, key, scale=1.0):
    grouped = query.unflatten(1, (KV_HEADS, -1))
    return torch.einsum("tkgd,nkd->tkgn", grouped, key) * scale


@pytest.mark.parametrize("size", SIZES)
def test_rotations_are_orthogonal_and_spread_every_channel(size):
    matrix = rotation(size)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(size, dtype=torch.float64))
    assert matrix.square().max() <= 2 / size + 1e-12


@pytest.mark.parametrize("size", SIZES)
def test_the_fit_costs_as_little_as_any_basis_can(size, monkeypatch):
    monkeypatch.setattr(key_transform, "DAMPING", 0.0)
    spread, queries = moments(size)
    lower, other = torch.linalg.cholesky(spread), torch.linalg.cholesky(queries)
    # Roots of the eigenvalues of the two matrices' product.
    least = torch.linalg.svdvals(lower.mT @ other).sum(-1).square() / size
    found = cost(spread, queries, fit(spread, queries))
    assert (found >= least * (1 - 1e-6)).all()
    # The rotation leaves channels a little apart, the more the fewer there are.
    assert (found <= least * (1.25 if size < 64 else 1.1)).all()
    eye = torch.eye(size, dtype=torch.float64).expand(KV_HEADS, size, size)
    assert (found < cost(spread, queries, eye) / 2).all()


def test_a_head_that_is_always_zero_is_left_alone():
    zero = torch.zeros(1, 16, 16, dtype=torch.float64)
    matrix = fit(zero, zero)
    torch.testing.assert_close(matrix[0] @ matrix[0].mT, torch.eye(16, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_is_the_same(dtype):
    """Up to the rounding of what is multiplied: the softmax does not see the keys' mean."""
    size = 64
    query, key = tokens(size, 96)
    query, key = (x / x.std(dim=0).mean() for x in (query, key))
    by = KeyTransform.of(fit(*moments(size)), key.mean(dim=0), dtype)
    given = query.to(dtype), key.to(dtype)
    found = by.apply(*given)
    assert all(x.dtype == dtype and x.is_contiguous() for x in found)
    wanted, other = (
        scores(q.double(), k.double(), size**-0.5).softmax(-1) for q, k in (given, found)
    )
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    torch.testing.assert_close(other, wanted, rtol=0, atol=tolerance)


def test_strided_queries_and_keys_are_read_as_they_are():
    query, key = (x.float() for x in tokens(16, 10))
    by = KeyTransform.of(fit(*moments(16)), key.mean(dim=0), torch.float32)
    wide = torch.full((10, HEADS + KV_HEADS + 1, 16), torch.nan)
    wide[:, :HEADS], wide[:, HEADS:-1] = query, key
    found = by.apply(wide[:, :HEADS], wide[:, HEADS:-1])
    assert all(torch.equal(x, y) for x, y in zip(found, by.apply(query, key), strict=True))


@pytest.mark.parametrize("block", [64, 128])
def test_four_bits_cost_scores_less(block):
    """In the mean over queries, as the fit promises, and in each KV head."""
    size = 64
    query, key = (x.float() for x in tokens(size, 8 * block, seed=1))
    by = KeyTransform.of(fit(*moments(size)), key.mean(dim=0), torch.float32)

    def error(query, key):
        blocks = key.transpose(0, 1).unflatten(1, (-1, block))
        codes = quantiser.quantise(blocks, blocks)
        every = torch.ones(*blocks.shape[:2], 2, block, dtype=torch.bool)
        rebuilt = quantiser.dequantise(codes, every)[0].flatten(1, 2).transpose(0, 1)
        off = scores(query, rebuilt) - scores(query, key)
        return off.square().mean(dim=(0, 2, 3))

    plain, transformed = error(query, key), error(*by.apply(query, key))
    assert (transformed < plain / 2).all()


def test_moments_are_those_of_whole_blocks():
    query, key = tokens(16, 2 * BLOCK + 9)
    counted = Moments(KV_HEADS, 16)
    counted.add(query[: BLOCK + 5], key[: BLOCK + 5])
    counted.add(query[BLOCK : 2 * BLOCK + 9], key[BLOCK : 2 * BLOCK + 9])
    assert counted.tokens == 2 * BLOCK
    query, key = query[: 2 * BLOCK], key[: 2 * BLOCK]
    spread = sum(
        torch.stack([torch.cov(x[:, h].T, correction=0) * BLOCK for h in range(KV_HEADS)])
        for x in key.split(BLOCK)
    )
    of_head = query[:, HEADS // KV_HEADS :].flatten(0, 1)
    torch.testing.assert_close(counted.spread, spread)
    torch.testing.assert_close(counted.queries[1], of_head.T @ of_head)
    torch.testing.assert_close(counted.keys / counted.tokens, key.mean(dim=0))


def test_ranks_put_their_heads_together():
    query, key = tokens(16, BLOCK)
    whole = Moments(KV_HEADS, 16)
    whole.add(query, key)

    def rank(queries, keys):
        own = Moments(1, 16)
        own.add(query[:, queries], key[:, keys])
        return own

    group = HEADS // KV_HEADS
    each = [rank(slice(h * group, (h + 1) * group), slice(h, h + 1)) for h in range(KV_HEADS)]
    for found in (joined(each, KV_HEADS), joined([whole], KV_HEADS)):
        assert found.tokens == whole.tokens
        for name in ("spread", "queries", "keys"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name))
    # Two ranks have the same KV head, and a query head each of its first two.
    shared = [rank(slice(g, g + 1), slice(0, 1)) for g in range(2)]
    found, both = joined(shared, 1), rank(slice(2), slice(0, 1))
    torch.testing.assert_close(found.queries, both.queries / 2)
    torch.testing.assert_close(found.spread, both.spread)


@pytest.mark.parametrize(
    ("total", "ranks", "wanted"),
    [
        (8, 1, ["0:8"]),
        (8, 2, ["0:4", "4:8"]),
        (2, 4, ["0:1", "0:1", "1:2", "1:2"]),
    ],
)
def test_a_rank_has_its_heads(total, ranks, wanted):
    found = [heads_of_rank(total, rank, ranks) for rank in range(ranks)]
    assert [f"{x.start}:{x.stop}" for x in found] == wanted


def test_a_layer_with_heads_of_its_own_number_is_refused(monkeypatch):
    ranks = SimpleNamespace(rank_in_group=0, world_size=2)
    monkeypatch.setattr(worker, "get_tp_group", lambda: ranks)
    model = SimpleNamespace(get_total_num_kv_heads=lambda: 8)
    listener = worker.ZipCacheListener(ZipCacheOptions(), SimpleNamespace(model_config=model))
    with pytest.raises(PluginError, match=r"a\.attn has another number of KV heads"):
        listener._transform(None, "a.attn", SimpleNamespace(num_kv_heads=8))


@pytest.fixture
def file(tmp_path):
    """Two layers' bases."""
    path = tmp_path / "keys.safetensors"
    matrix = fit(*moments(16))
    mean = torch.arange(32.0).view(2, 16)
    key_transform.write(
        path, {"a.attn": (matrix, mean), "b.attn": (-matrix, mean.clone())}, "some model"
    )
    return path


def test_files_are_read_head_by_head(file):
    assert [x.name for x in file.parent.iterdir()] == [file.name]
    found = KeyTransformFile(str(file)).layer("b.attn", 2, slice(1, 2), 16, torch.float32)
    matrix = -fit(*moments(16))[1:].float()
    wanted = KeyTransform.of(matrix, torch.arange(16.0, 32.0)[None], torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(vars(found).values(), vars(wanted).values(),
                                                 strict=True))  # fmt: skip
    eye = torch.eye(16, dtype=torch.float64)[None]
    torch.testing.assert_close(found.keys.double() @ found.queries.mT.double(), eye)


@pytest.mark.parametrize(
    ("name", "total", "size", "reason"),
    [
        ("c.attn", 2, 16, "made for another model (some model): it has no c.attn.matrix"),
        ("a.attn", 4, 16, "it has [2, 16, 16], not [4, 16, 16], for a.attn.matrix"),
        ("a.attn", 2, 32, "it has [2, 16, 16], not [2, 32, 32], for a.attn.matrix"),
    ],
)
def test_another_models_file_is_refused(file, name, total, size, reason):
    with pytest.raises(PluginError) as error:
        KeyTransformFile(str(file)).layer(name, total, slice(0, 1), size, torch.float32)
    assert reason in str(error.value)
    assert "make one: vllm-plugins train zipcache" in str(error.value)


@pytest.mark.parametrize(
    ("part", "number", "dtype"),
    [
        ("matrix", torch.nan, torch.float32),
        ("matrix", torch.inf, torch.bfloat16),
        ("matrix", 0.0, torch.float32),
        ("matrix", 1e6, torch.float16),
        ("mean", torch.nan, torch.float32),
    ],
)
def test_numbers_that_cannot_be_used_are_refused(file, part, number, dtype):
    tensors = load_file(file)
    tensors[f"a.attn.{part}"][0] = number
    save_file(tensors, file, {"format": key_transform.FORMAT})
    with pytest.raises(PluginError, match=r"a\.attn: its numbers (are none|do not fit into)"):
        KeyTransformFile(str(file)).layer("a.attn", 2, slice(0, 1), 16, dtype)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="directory"):
        key_transform.write(tmp_path, {"a": (torch.eye(16)[None], torch.zeros(1, 16))}, "x")
    assert not list(tmp_path.parent.glob(".*.new"))


def test_what_is_no_such_file_is_refused(file):
    half = {name: x.half() for name, x in load_file(file).items()}
    ours = {"format": key_transform.FORMAT}
    for tensors, metadata in (({"x": torch.zeros(1)}, {}), (half, ours)):
        save_file(tensors, file, metadata)
        with pytest.raises(PluginError, match="it holds no transforms of keys"):
            KeyTransformFile(str(file))
    for content in (b"", b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises(PluginError, match="it cannot be read"):
            KeyTransformFile(str(file))
    for path in (file.parent, file.parent / "missing"):
        with pytest.raises(PluginError, match="it cannot be read"):
            KeyTransformFile(str(path))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda own: setattr(own, "tokens", 0), "has seen nothing"),
        (lambda own: own.queries.fill_(torch.nan), "was given numbers that are none"),
        (lambda own: setattr(own, "kv_heads", 3), "has another number of KV heads"),
    ],
)
def test_layers_of_which_nothing_can_be_told_are_refused(spoil, reason):
    own = Moments(KV_HEADS, 16)
    own.add(*tokens(16, BLOCK))
    check({"a.attn": [own]}, KV_HEADS)
    spoil(own)
    with pytest.raises(PluginError, match=f"this model: a.attn {reason}"):
        check({"a.attn": [own]}, KV_HEADS)


def test_windows_lie_from_a_texts_beginning_to_its_end():
    found = windows(range(1000), 100, 350)
    assert [(x[0], len(x)) for x in found] == [(0, 100), (300, 100), (600, 100), (900, 100)]
    assert [x[0] for x in windows(range(250), 100, 8192)] == [0, 150]
    assert [x[0] for x in windows(range(199), 100, 8192)] == [0]
    with pytest.raises(PluginError, match="it has 99 tokens, and a sequence has 100"):
        windows(range(99), 100, 100)

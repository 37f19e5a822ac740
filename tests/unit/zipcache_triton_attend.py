"""Attention by ZipCache's Triton kernels against float64; `test_zipcache_triton` runs this."""

import pytest
import torch

from tests.unit.zipcache_triton_problem import Problem
from vllm_plugins.attention_backends.zipcache.cuda_kernel_cases import CudaLayer
from vllm_plugins.attention_backends.zipcache.page import PageFormat
from vllm_plugins.attention_backends.zipcache.triton_kernels import decode as decoding
from vllm_plugins.attention_backends.zipcache.triton_kernels import ops
from vllm_plugins.attention_backends.zipcache.triton_kernels.prefill import tile_tokens
from vllm_plugins.bench.kernels import KernelShape, Load

N = 32


def attend(problem, counts):
    query, key, value = problem.step(counts)
    out = torch.full_like(query, torch.nan)
    batch = problem.batch(counts, tile_tokens(problem.heads // problem.kv_heads))
    ops.zipcache_attend(problem.memory, query, key, value, out, batch, problem.space, problem.scale)
    problem.check(out, counts, query, key, value)
    return out


@pytest.mark.parametrize("states", ["s", "g", "sgr"])
def test_decode_at_every_edge(states):
    # Nothing cached, one token, around one block, and more keys than a split has at least.
    lengths = [0, 1, N - 1, N, N + 1, 9 * N + 1]
    attend(Problem(lengths, states, heads=2, kv_heads=1), [1] * len(lengths))


@pytest.mark.parametrize(("salient", "seed"), [(0, 1), (1, 2), (31, 3), (32, 4)])
def test_decode_with_any_quota(salient, seed):
    attend(Problem([3 * N + 7], salient=salient, seed=seed), [1])


# Of keys and of values: each of them all tokens, none, or some.
QUOTAS = [(N, 12), (0, 12), (12, N), (12, 0), (25, 7), (7, 25), (N, 0), (0, N)]


@pytest.mark.parametrize(("of_keys", "salient"), QUOTAS)
def test_keys_and_values_have_quotas_of_their_own(of_keys, salient):
    """In decode and for a prompt's next chunk."""
    for lengths, counts in (([2 * N + 7], [1]), ([2 * N + 7, 2 * N], [3, 1])):
        attend(Problem(lengths, "sg", salient=salient, of_keys=of_keys, seed=4), counts)


@pytest.mark.parametrize("of_keys", [64, 50])
def test_two_quotas_in_half_precision(of_keys):
    quotas = {"block": 64, "of_keys": of_keys, "salient": 19}
    attend(Problem([64 + 5], heads=6, kv_heads=2, size=96, dtype=torch.bfloat16, **quotas), [1])


SHAPES = [
    (1, 1, 64, 32, torch.bfloat16), (6, 2, 96, 64, torch.float16), (5, 1, 80, 32, torch.bfloat16),
    (8, 1, 128, 128, torch.bfloat16), (14, 2, 256, 32, torch.float16),
    (24, 1, 16, 32, torch.float32), (4, 1, 64, 32, torch.float16), (6, 1, 128, 32, torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize(("heads", "kv_heads", "size", "block", "dtype"), SHAPES)
def test_decode_of_shapes_and_dtypes(heads, kv_heads, size, block, dtype):
    problem = Problem(
        [block + 5, 2 * block], "sg", heads=heads, kv_heads=kv_heads, size=size, block=block,
        salient=block // 2 + 1, dtype=dtype, seed=size,
    )  # fmt: skip
    attend(problem, [1, 1])


@pytest.mark.parametrize("splits", [1, 7])
def test_how_keys_are_split_changes_rounding_alone(splits):
    # Splits of two, one and one piece of MIN_KEYS, the last of which is one token.
    length = 2 * decoding.MIN_KEYS.value + 1
    attend(Problem([length], "sgs", heads=1, kv_heads=1, size=16, splits=splits), [1])


def test_other_rows_change_no_bit():
    one = Problem([3 * N + 5], "sgs", seed=5)
    query, key, value = one.step([1])
    found = []
    for rows in (1, 5):
        # The same request in every row.
        problem = Problem([one.lengths[0]] * rows)
        problem.memory, problem.state = one.memory, one.state
        problem.table = one.table.repeat(rows, 1)
        out = torch.full((rows, *query.shape[1:]), torch.nan)
        many = [x.repeat(rows, 1, 1) for x in (query, key, value)]
        ops.zipcache_attend(
            one.memory, *many, out, problem.batch([1] * rows), problem.space, problem.scale
        )
        found.append(out)
    assert torch.equal(found[1], found[0].expand_as(found[1]))


@pytest.mark.parametrize("states", ["s", "gr"])
def test_chunks_of_prompts_beside_decodes(states):
    problem = Problem([0, 3 * N, N + 9, 40], states, heads=6, kv_heads=2, seed=6)
    attend(problem, [50, 2, 70, 1])


@pytest.mark.parametrize(("heads", "kv_heads", "size", "dtype"), [
    (8, 1, 128, torch.bfloat16), (3, 3, 96, torch.float16), (7, 1, 256, torch.bfloat16),
])  # fmt: skip
def test_prompts_of_shapes_and_dtypes(heads, kv_heads, size, dtype):
    problem = Problem([N + 3], "sg", heads=heads, kv_heads=kv_heads, size=size, dtype=dtype)
    attend(problem, [21])


def test_splits_suit_the_heads():
    assert decoding.num_splits(8, 131072) == 33
    assert decoding.num_splits(1, 131072) == decoding.MOST_SPLITS
    assert decoding.num_splits(64, 131072) == decoding.LEAST_SPLITS
    # A short sequence has no use for more.
    assert decoding.num_splits(8, 1000) == 4


def test_what_bench_times_on_cuda():
    shape = KernelShape(4, 2, 64, 64, "float32", "cpu")
    layer = CudaLayer(shape, Load("decode", 200, 2), PageFormat.of(64, 64, "4/2", 0.6), False)
    layer.packed()()
    problem = Problem([199, 199], heads=4, kv_heads=2, size=64, block=64)
    problem.memory, problem.table, problem.state = layer.memory, layer.table, layer.tables.state
    problem.check(layer.out, [1, 1], layer.query, layer.key, layer.value)
    layer.sealing()()

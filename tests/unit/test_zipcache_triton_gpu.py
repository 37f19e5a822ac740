"""ZipCache's Triton kernels on a GPU: what the interpreter cannot show."""

import dataclasses

import pytest
import torch

from vllm_plugins.attention_backends.zipcache import torch_kernels
from vllm_plugins.attention_backends.zipcache.batch import RAW, Seals

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
N = 64
SHAPES = [
    (32, 8, 128, 64, torch.bfloat16), (32, 8, 128, 128, torch.float16),
    (28, 4, 128, 64, torch.bfloat16), (8, 8, 64, 32, torch.bfloat16),
    (6, 2, 96, 64, torch.float16), (16, 2, 256, 256, torch.bfloat16),
]  # fmt: skip


# Shares of keys with four bits, beside 0.6 of values.
OF_KEYS = [0.6, 0.8, 1.0]


def problem_of(lengths, states, heads=32, kv_heads=8, size=128, block=N, dtype=torch.bfloat16,
               of_keys=0.6):  # fmt: skip
    from tests.unit.zipcache_triton_problem import Problem

    return Problem(
        lengths, states, heads=heads, kv_heads=kv_heads, size=size, block=block,
        salient=round(0.6 * block), of_keys=round(of_keys * block), dtype=dtype, splits=33,
        device="cuda",
    )  # fmt: skip


def attend(problem, batch, query, key, value):
    from vllm_plugins.attention_backends.zipcache.triton_kernels import ops

    out = torch.full_like(query, torch.nan)
    ops.zipcache_attend(problem.memory, query, key, value, out, batch, problem.space, problem.scale)
    return out


@pytest.mark.parametrize("of_keys", OF_KEYS)
@pytest.mark.parametrize(("heads", "kv_heads", "size", "block", "dtype"), SHAPES)
def test_attention(heads, kv_heads, size, block, dtype, of_keys):
    from vllm_plugins.attention_backends.zipcache.triton_kernels.prefill import tile_tokens

    lengths = [0, 1, block - 1, block, block + 1, 17 * block + 3, 2 * block, 5, 3 * block + 7]
    counts = [1] * 6 + [33, 200, 100]
    problem = problem_of(lengths, "sgssr", heads, kv_heads, size, block, dtype, of_keys)
    step = problem.step(counts)
    batch = problem.batch(counts, tile_tokens(heads // kv_heads))
    # The first time compiles; then nothing may wait for the device.
    attend(problem, batch, *step)
    torch.cuda.set_sync_debug_mode("error")
    out = attend(problem, batch, *step)
    torch.cuda.set_sync_debug_mode("default")
    problem.check(out, counts, *step)


@pytest.mark.parametrize("of_keys", OF_KEYS)
@pytest.mark.parametrize(("heads", "kv_heads", "size", "block", "dtype"), SHAPES)
def test_sealed_pages_are_those_of_the_cpu(heads, kv_heads, size, block, dtype, of_keys):
    from tests.unit.zipcache_triton_problem import moved
    from vllm_plugins.attention_backends.zipcache.triton_kernels import ops

    problem = problem_of([2 * block], "rg", heads, kv_heads, size, block, dtype, of_keys)
    memory = problem.memory
    for sums in (memory.residual_sums, memory.staging_sums):
        sums.uniform_()
    blocks = problem.table[0, :2].tolist()
    source = [int(problem.state[x]) for x in blocks]
    ints = (torch.tensor(x, dtype=torch.int32) for x in (blocks, source, [4, 0]))
    seals = Seals(*ints, torch.rand(2, block))
    host = moved(memory, "cpu")
    torch_kernels.seal(host, seals)
    ops.zipcache_seal(memory, Seals(*(x.cuda() for x in vars(seals).values())))
    pages = [x.cache[blocks][..., : memory.page.size].cpu() for x in (host, memory)]
    assert torch.equal(*pages)


def test_a_graph_follows_lengths_tables_and_states():
    problem = problem_of([5 * N + 3, 9 * N, 40], "sg")
    counts = [1, 1, 1]
    query, key, value = problem.step(counts)
    batch = problem.batch(counts)
    attend(problem, batch, query, key, value)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(problem, batch, query, key, value)
    graph.replay()
    problem.check(out, counts, query, key, value)
    # Other rows in the places of the same batch.
    order = torch.tensor([2, 0, 1], device="cuda")
    problem.lengths = [problem.lengths[i] for i in order.tolist()]
    problem.table = problem.table[order]
    batch.block_table[:3].copy_(problem.table[:, :-1])
    batch.seq_lens[:3].copy_(batch.seq_lens[order])
    graph.replay()
    problem.check(out, counts, query, key, value)


def test_writing_packs_as_the_cpu_does():
    from vllm_plugins.attention_backends.zipcache.triton_kernels import ops

    problem = problem_of([N], "r")
    counts = [2 * N + 5]
    _, key, value = problem.step(counts)
    # Two whole blocks: what was the begun one is staged now, and one behind it is begun.
    table = torch.tensor([[1, 2, 3, 4]], dtype=torch.int32, device="cuda")
    problem.state[table[0, 1:].long()] = torch.tensor([0, 1, RAW], dtype=torch.int32, device="cuda")
    batch = dataclasses.replace(problem.batch(counts), block_table=table)
    batch.slots.fill_(4 * N)
    batch.parts[4, 0] = 0
    ops.zipcache_write(problem.memory, key, value, batch)
    from vllm_plugins.attention_backends.zipcache import quantiser

    page = problem.memory.page
    for i in range(2):
        rows = slice(i * N, (i + 1) * N)
        codes = quantiser.quantise(*(x[rows].transpose(0, 1).float().cpu() for x in (key, value)))
        wanted = torch.zeros(key.shape[1], page.bytes, dtype=torch.uint8)
        quantiser.write_page(codes, wanted, page)
        found = problem.memory.cache[2 + i].cpu()
        for part in (slice(0, page.k_low), slice(page.k_min, page.k_bitmap)):
            assert torch.equal(found[:, part], wanted[:, part])
        assert torch.equal(problem.memory.staging[i].cpu(), quantiser.low_planes(codes))
    assert torch.equal(problem.memory.residual[0, :, 0, :5], key[2 * N :].transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "group", "size"), [(1, 4, 128), (100, 8, 96), (33, 1, 256)])
def test_a_change_of_basis(tokens, group, size, dtype):
    from tests.unit.zipcache_triton_ops import basis
    from vllm_plugins.attention_backends.zipcache.key_transform import KeyTransform
    from vllm_plugins.attention_backends.zipcache.triton_kernels import ops

    by = basis(4, size, dtype)
    query, key = (torch.randn(tokens, n, size).to(dtype) for n in (4 * group, 4))
    on_device = KeyTransform(*(x.cuda() for x in (*(y.to(dtype) for y in (by.keys, by.queries)),
                                                  by.centre)))  # fmt: skip
    found = ops.zipcache_transform(on_device, query.cuda(), key.cuda())
    off = torch.finfo(dtype).eps * 2
    for ours, wanted in zip(found, by.apply(query, key), strict=True):
        torch.testing.assert_close(ours.cpu().double(), wanted.double(), rtol=off, atol=off)

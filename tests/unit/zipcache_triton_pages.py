"""Writing, scoring and sealing by ZipCache's Triton kernels; `test_zipcache_triton` runs this.

Pages have to be those of `torch_kernels` byte by byte: so the CPU's and CUDA's are interchangeable.
"""

import pytest
import torch

from tests.unit.zipcache_triton_problem import Problem, apart, memory_of
from vllm_plugins.attention_backends.zipcache import saliency, torch_kernels
from vllm_plugins.attention_backends.zipcache.batch import RAW, SEALED, Batch, Seals
from vllm_plugins.attention_backends.zipcache.page import PageFormat
from vllm_plugins.attention_backends.zipcache.triton_kernels import ops
from vllm_plugins.attention_backends.zipcache.triton_kernels.batches import FIELDS, DeviceBatch
from vllm_plugins.attention_backends.zipcache.triton_kernels.prefill import tile_tokens

HEADS = 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def awkward(shape, dtype, seed):
    """Keys or values: random ones, constant channels, zeros, huge and tiny numbers."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[..., 0], x[..., 1], x[..., 2] = 0, -0.3, 1e-7
    x[..., 3] *= 6e4
    x[..., 4] += 1000
    x[5::7, :, 5] = -0.0
    x[3] = 0
    return apart(x.to(dtype))


def batches(requests, table, state, size, slots):
    """The same batch for both: requests are first position, tokens and residual row."""
    position, length, row = (
        torch.tensor(x, dtype=torch.int32) for x in zip(*requests, strict=True)
    )
    start = torch.cat([torch.zeros(1, dtype=torch.int32), length.cumsum(0).to(torch.int32)])
    n = len(requests)
    none = torch.zeros(n, dtype=torch.int32)
    host = Batch(
        start[:-1], length, position, table, state, row, none, none,
        torch.zeros(n + 1, dtype=torch.int32), none[:0],
    )  # fmt: skip
    parts = torch.zeros((len(state), FIELDS.value), dtype=torch.int32)
    parts[:, 0] = -2
    for m, end in enumerate((position + length).tolist()):
        parts[table[m, (end - 1) // size].long(), 0] = row[m]
    prompts = (length > 1).nonzero().flatten().to(torch.int32)
    return host, DeviceBatch(
        start, position + length, table, slots, state, parts, none,
        torch.arange(n, dtype=torch.int32), prompts if len(prompts) else None, None,
        int(length.max()), table.shape[1], bool((length == 1).any()),
    )  # fmt: skip


def slots_of(requests, table, size):
    return torch.tensor([
        int(table[m, i // size]) * size + i % size
        for m, (first, n, _) in enumerate(requests) for i in range(first, first + n)
    ])  # fmt: skip


def write_both(page, dtype, scaled, steps, state):
    """Write steps of requests by both paths; return their memories."""
    size = page.block_size
    table = torch.tensor([[7, 2, 5, 9], [4, 8, 1, 3]], dtype=torch.int32)
    found = []
    for path in ("torch", "triton"):
        memory = memory_of(page, HEADS, 3, 4, 11, dtype, scaled)
        for number, requests in enumerate(steps):
            tokens = sum(n for _, n, _ in requests)
            shape = (tokens, HEADS, page.head_size)
            key, value = (awkward(shape, dtype, 2 * number + i) for i in range(2))
            slots = slots_of(requests, table, size)
            host, device = batches(requests, table, state, size, slots)
            if path == "torch":
                torch_kernels.write(memory, key, value, host)
            else:
                ops.zipcache_write(memory, key, value, device)
        found.append(memory)
    return found


def assert_equal(wanted, found, page):
    assert torch.equal(wanted.cache[..., : page.size], found.cache[..., : page.size])
    for name in ("staging", "residual", "residual_sums", "staging_sums"):
        x, y = (getattr(m, name) for m in (wanted, found))
        if x.is_floating_point():
            x, y = x.float().nan_to_num(1e9), y.float().nan_to_num(1e9)
        assert torch.equal(x, y), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [True, False])
def test_whole_blocks_are_staged_byte_by_byte(dtype, scaled):
    page = PageFormat(32, 48, 20, 20)
    state = torch.full((11,), SEALED, dtype=torch.int32)
    # Staged blocks and the begun ones behind them.
    state[torch.tensor([7, 2, 5, 4])] = torch.tensor([2, 0, RAW - 1, RAW - 2], dtype=torch.int32)
    memories = write_both(page, dtype, scaled, [[(0, 70, 1), (0, 9, 2)]], state)
    assert_equal(*memories, page)


@pytest.mark.parametrize(("size", "head", "quotas"), [
    (32, 64, (0, 0)), (64, 16, (64, 64)), (128, 96, (128, 128)), (32, 48, (32, 0)),
    (64, 32, (0, 64)),
])  # fmt: skip
def test_without_a_choice_blocks_are_sealed_as_they_are_written(size, head, quotas):
    page = PageFormat(size, head, *quotas)
    state = torch.full((11,), SEALED, dtype=torch.int32)
    memories = write_both(page, torch.bfloat16, True, [[(0, size, -1)]], state)
    assert_equal(*memories, page)


def test_a_begun_block_is_filled_and_the_next_begins_in_its_row():
    """In one step: what is written over must have been read before."""
    page = PageFormat(32, 32, 25, 20)
    state = torch.full((11,), SEALED, dtype=torch.int32)
    state[torch.tensor([7, 4])] = torch.tensor([RAW - 1, RAW], dtype=torch.int32)
    steps = [[(0, 20, 1), (0, 31, 0)], [(20, 12 + 32 + 13, 1), (31, 1, 0)]]
    # As of the second step; the first one fills nothing.
    state[torch.tensor([7, 2, 5, 4])] = torch.tensor([3, 1, RAW - 1, 0], dtype=torch.int32)
    wanted, found = write_both(page, torch.float32, True, steps, state)
    # The reference also keeps the tokens that it has packed, behind those of the next block.
    for memory in (wanted, found):
        memory.residual[1, :, :, 20:], memory.residual[0, :, :, 31:] = 0, 0
        memory.residual_sums[1, :, 20:], memory.residual_sums[0, :, 31:] = 0, 0
    assert_equal(wanted, found, page)


def test_nothing_is_written_for_padding_and_dummy_batches():
    page = PageFormat(32, 32, 20, 20)
    state = torch.full((11,), SEALED, dtype=torch.int32)
    table = torch.tensor([[7, 2]], dtype=torch.int32)
    memory = memory_of(page, HEADS, 3, 4, 11, torch.float32)
    before = memory.cache.clone()
    requests = [(0, 40, 1)]
    key = torch.ones(40, HEADS, 32)
    for slots, owner in ((torch.full((40,), -1), 1), (slots_of(requests, table, 32), -2)):
        _, batch = batches(requests, table, state, 32, slots)
        batch.parts[:, 0] = owner
        ops.zipcache_write(memory, key, key, batch)
    assert torch.equal(memory.cache, before)
    assert memory.residual.isnan().all() and memory.residual_sums.isnan().all()


@pytest.mark.parametrize(("dtype", "size", "head", "quotas"), [
    (torch.float32, 32, 32, (1, 1)), (torch.bfloat16, 64, 80, (38, 38)),
    (torch.float16, 128, 32, (127, 127)), (torch.bfloat16, 32, 128, (0, 0)),
    (torch.bfloat16, 32, 256, (32, 32)),
    # Each with all tokens, none and some; two sets of bits.
    (torch.bfloat16, 64, 48, (64, 19)), (torch.float16, 32, 32, (19, 32)),
    (torch.float32, 32, 16, (0, 20)), (torch.float32, 32, 48, (20, 0)),
    (torch.float32, 32, 16, (32, 0)), (torch.bfloat16, 64, 32, (50, 19)),
    (torch.float16, 128, 48, (40, 77)),
])  # fmt: skip
def test_sealed_pages_are_equal_byte_by_byte(dtype, size, head, quotas):
    """From residual rows and from staged blocks; scores with equal ones, and forced tokens."""
    page = PageFormat(size, head, *quotas)
    found = []
    for path in (torch_kernels.seal, ops.zipcache_seal):
        memory = memory_of(page, HEADS, 3, 4, 11, dtype)
        generator = torch.Generator().manual_seed(3)
        shape = memory.residual.shape
        rows = awkward((size, 3 * HEADS * 2, head), dtype, 3).transpose(0, 1)
        memory.residual.copy_(rows.reshape(shape))
        memory.staging.copy_(torch.randint(0, 256, memory.staging.shape, generator=generator))
        for sums in (memory.residual_sums, memory.staging_sums):
            sums.copy_((torch.rand(sums.shape, generator=generator) * 8).round() / 8)
            # A request whose hidden states are no numbers must not write over others' pages.
            sums[2, 0], sums[0, 1, ::3] = torch.nan, torch.nan
        weight = torch.rand(3, size, generator=generator)
        ints = [[5, 3, 9], [RAW - 1, 2, RAW], [0, 4, size]]
        path(memory, Seals(*(torch.tensor(x, dtype=torch.int32) for x in ints), weight))
        found.append(memory)
    assert_equal(*found, page)


def test_scores_are_those_of_a_dense_softmax():
    """Of probes in a chunk, over staged, raw and own keys; decodes add to their block or reset."""
    size = 32
    problem = Problem([2 * size + 7, size + 9, 12, 3 * size], "gs", heads=6, kv_heads=2, seed=8)
    counts = [45, 1, 1, 2]
    query, key, value = problem.step(counts)
    batch = problem.batch(counts, tile_tokens(3))
    memory = problem.memory
    sums = {"residual_sums": memory.residual_sums, "staging_sums": memory.staging_sums}
    for x in sums.values():
        x.fill_(0.5)
    probes = [[3, 17, 44], [0], [0], []]
    starts = [sum(map(len, probes[:m])) for m in range(4)]
    slots, first = batch.slots, 0
    for m, (n, count) in enumerate(zip(problem.lengths, counts, strict=True)):
        last = int(problem.table[m, (n + count - 1) // size])
        slots[first : first + count] = last * size
        from_block = [0, n // size, 0, 0][m]
        record = [0, from_block, m == 1, starts[m], len(probes[m])]
        batch.parts[last, :5] = torch.tensor(record, dtype=torch.int32)
        first += count
    batch.probes.resize_(5).copy_(
        torch.tensor([x for own in probes for x in own], dtype=torch.int32)
    )
    out = torch.empty_like(query)
    ops.zipcache_attend(memory, query, key, value, out, batch, problem.space, problem.scale)
    ops.zipcache_score(memory, query, key, batch, problem.space, problem.scale)
    first, total = 0, 0.0
    for m, (n, count) in enumerate(zip(problem.lengths, counts, strict=True)):
        keys = torch.cat([problem.cached(m)[0], key[first : first + count].float()]).double()
        chosen = torch.tensor(probes[m], dtype=torch.int64)
        wanted = saliency.attention_sums(
            query[first : first + count][chosen].double(), keys, n + chosen, problem.scale
        )
        for i in range([0, n // size, 0, 0][m], -(-(n + count) // size)):
            state = int(problem.state[problem.table[m, i]])
            if state == SEALED or not probes[m]:
                continue
            own = memory.residual_sums[RAW - state] if state <= RAW else memory.staging_sums[state]
            part = wanted[:, i * size : (i + 1) * size]
            before = 0.0 if m == 1 else 0.5
            torch.testing.assert_close(
                own[:, : part.shape[1]].double(), part + before, rtol=1e-4, atol=2e-6
            )
            total += float(own.sum())
            own.fill_(0.5)
        first += count
    # Nothing else was written.
    assert all(bool((x == 0.5).all()) for x in sums.values())
    assert total > 0

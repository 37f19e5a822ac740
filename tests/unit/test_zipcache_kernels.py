"""ZipCache's kernels, compiled and in torch, step by step against exact attention in float64."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from tests.unit.zipcache_steps import Steps, exact
from vllm_plugins.attention_backends.zipcache import cpu_kernels, quantiser, torch_kernels
from vllm_plugins.attention_backends.zipcache.batch import RAW, SEALED
from vllm_plugins.attention_backends.zipcache.saliency import Probing

N = 32
# Of keys and of values: each of them all tokens, none, or some.
QUOTAS = [(N, 12), (0, 12), (12, N), (12, 0), (25, 7), (7, 25), (N, 0), (0, N)]
# Outputs are means of values of about 1; half precision rounds them.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=["compiled", "torch"])
def kernels(request):
    if request.param == "torch":
        return torch_kernels
    assert cpu_kernels.library() is not None, "the set-up has a compiler, so this must be built"
    return cpu_kernels


def prefill(steps, request, chunks):
    for n in chunks:
        steps.step((request, n))
    assert request.computed == request.prompt


def decode(steps, *requests, count):
    for _ in range(count):
        steps.step(*[(x, 1) for x in requests])


def error(steps, request):
    wanted = exact(request.query, request.key, request.value, steps.scale)[: request.computed]
    return (request.output.double() - wanted).abs().max().item()


def seen_by_last(steps, request):
    """Keys and values as the last query has seen them."""
    parts = []
    for index, block in enumerate(request.blocks):
        first, last = index * N, min((index + 1) * N, request.computed)
        state = int(steps.life.state[block])
        k, v = torch_kernels.read(steps.memory, block, state)
        parts.append((k[: last - first], v[: last - first]))
    return [torch.cat(x) for x in zip(*parts, strict=True)]


def test_the_page_is_as_large_as_python_says():
    for size, block, salient in ((32, 32, 20), (80, 64, 0), (128, 128, 128), (256, 256, 77)):
        for of_keys in (salient, 0, 3, block):
            options = {"size": size, "block": block, "salient": salient, "of_keys": of_keys}
            memory = Steps(cpu_kernels, **options).memory
            assert cpu_kernels.page_size(memory) == memory.page.size


@pytest.mark.parametrize("length", [1, 2, 31, 32])
def test_within_one_block_attention_is_exact(kernels, length):
    steps = Steps(kernels)
    request = steps.request("a", length, N)
    prefill(steps, request, [length])
    decode(steps, request, count=N - length)
    assert error(steps, request) < TOLERANCE[torch.float32]


def test_query_heads_that_are_cut_out_of_wider_ones(kernels):
    def attend(memory, query, *rest):
        wide = torch.cat([query, torch.full_like(query, torch.nan)], dim=2)
        kernels.attend(memory, wide[..., : query.shape[2]], *rest)

    steps = Steps(SimpleNamespace(write=kernels.write, attend=attend, seal=kernels.seal))
    request = steps.request("a", N - 3, N)
    prefill(steps, request, [N - 3])
    decode(steps, request, count=3)
    assert error(steps, request) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("length", [*range(1, 12), *range(29, 4 * N + 4, 7), 127, 128, 129, 131])
def test_a_prompt_in_one_chunk_is_exact_and_its_decodes_see_the_cache(kernels, length):
    steps = Steps(kernels)
    request = steps.request("a", length, length + 2)
    prefill(steps, request, [length])
    assert error(steps, request) < TOLERANCE[torch.float32]
    steps.step((request, 1))
    check_last(steps, request)


def check_last(steps, request):
    """Compare what the last query got with exact attention to what the reference reads."""
    keys, values = seen_by_last(steps, request)
    position = request.computed - 1
    # The query's own key is read as it came, also where it fills a block.
    wanted = exact(request.query[position : position + 1], keys, values, steps.scale, position)
    torch.testing.assert_close(request.outputs[-1].double(), wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize(("of_keys", "salient"), QUOTAS)
@pytest.mark.parametrize("heads", [1, 8])
def test_keys_and_values_have_quotas_of_their_own(kernels, of_keys, salient, heads):
    """Decodes and chunks see sealed and staged blocks as the reference reads them."""
    steps = Steps(kernels, heads=heads, kv_heads=1, size=48, of_keys=of_keys, salient=salient)
    request = steps.request("a", 3 * N + 5, 4 * N + 5)
    prefill(steps, request, [2 * N, N + 5])
    for _ in range(2):
        decode(steps, request, count=1)
        check_last(steps, request)
    # A block of generated tokens is sealed.
    decode(steps, request, count=N - 3)
    check_last(steps, request)
    pages = steps.memory.cache[request.blocks[:4]]
    _, marked = quantiser.read_page(pages, steps.memory.page)
    keys, values = marked.unbind(-2)
    assert bool((keys.sum(-1) == of_keys).all()) and bool((values.sum(-1) == salient).all())
    # By one ranking, so that the fewer are among the more.
    fewer, more = (keys, values) if of_keys < salient else (values, keys)
    assert not bool((fewer & ~more).any())


SHAPES = [(1, 1, 16), (2, 1, 32), (3, 1, 48), (4, 1, 64), (10, 2, 80), (6, 1, 96), (7, 1, 112),
          (8, 1, 128), (4, 4, 256)]  # fmt: skip


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("heads", "kv_heads", "size"), SHAPES)
def test_compiled_and_torch_do_the_same(dtype, heads, kv_heads, size):
    compare(dtype, heads=heads, kv_heads=kv_heads, size=size, seed=size)


@pytest.mark.parametrize(("of_keys", "salient"), QUOTAS)
def test_they_do_the_same_with_two_quotas(of_keys, salient):
    compare(torch.float32, heads=6, kv_heads=2, size=80, of_keys=of_keys, salient=salient)


def compare(dtype, **options):
    """Serve the same requests by both paths: equal outputs, codes and ranges."""
    found = []
    for path in (cpu_kernels, torch_kernels):
        steps = Steps(path, dtype=dtype, **options)
        a, b = steps.request("a", 3 * N + 5, 5 * N), steps.request("b", N + 3, 4 * N)
        steps.step((a, 40), (b, 3))
        steps.step((b, N), (a, 61))
        decode(steps, a, b, count=N + 3)
        found.append((steps, a, b))
    (one, *ones), (two, *twos) = found
    for x, y in zip(ones, twos, strict=True):
        torch.testing.assert_close(x.output, y.output, rtol=0, atol=2 * TOLERANCE[dtype])
    assert torch.equal(one.life.state, two.life.state)
    assert one.life.sealed == two.life.sealed
    blocks = sorted(i for i in (*ones[0].blocks, *ones[1].blocks) if one.life.state[i] == SEALED)
    page = one.memory.page
    # Scores differ in their last bits, so a choice between two equal tokens may too.
    pages = [x.memory.cache[blocks][..., : page.size] for x in (one, two)]
    codes = [quantiser.read_page(x, page) for x in pages]
    assert torch.equal(pages[0][..., : page.k_low], pages[1][..., : page.k_low])
    ranges = slice(page.k_min, page.k_bitmap)
    assert torch.equal(pages[0][..., ranges], pages[1][..., ranges])
    assert (codes[0][1] != codes[1][1]).float().mean() < 0.02


@pytest.mark.parametrize("chooses", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_four_bits_can_represent_is_attended_to_exactly(kernels, chooses, dtype):
    """Every token salient, in every state of blocks: 4 bits lose nothing of such values."""
    steps = Steps(kernels, salient=N, chooses=chooses, scaled=False, dtype=dtype, staged=9)
    a = steps.lossless("a", 2 * N + 9, 4 * N + 3)
    b = steps.lossless("b", 5 * N, 6 * N)
    steps.step((a, 10), (b, N))
    steps.step((a, N), (b, 1))
    steps.step((a, 31), (b, 3 * N))
    decode(steps, a, count=7)
    steps.step((a, 1), (b, N - 1))
    decode(steps, a, b, count=N)
    decode(steps, a, count=9)
    for request in (a, b):
        assert error(steps, request) < TOLERANCE[dtype]


@pytest.mark.parametrize("chunks", [[133], [64, 64, 5], [32, 101], [1] * 5 + [128], [31, 33, 69]])
def test_chunks_do_not_change_codes(kernels, chunks):
    """Equal keys and values have equal codes however the prompt is cut; scores differ a little."""
    whole, cut = (Steps(kernels, seed=5) for _ in range(2))
    found = []
    for steps, parts in ((whole, [133]), (cut, chunks)):
        request = steps.request("a", 133, 140)
        prefill(steps, request, parts)
        decode(steps, request, count=2)
        pages = steps.memory.cache[request.blocks[:4]]
        found.append((pages, *quantiser.read_page(pages, steps.memory.page)))
    (one, _, kept), (two, _, other) = found
    page = whole.memory.page
    assert torch.equal(one[..., : page.k_low], two[..., : page.k_low])
    assert torch.equal(one[..., page.k_min : page.k_bitmap], two[..., page.k_min : page.k_bitmap])
    assert (kept != other).float().mean() < 0.1


def test_sums_are_those_of_a_dense_softmax(kernels):
    """With all queries as probes, in one chunk."""
    steps = Steps(kernels, probing=Probing(0.5, 0.5), heads=6, kv_heads=2)
    length = 3 * N + 7
    request = steps.request("a", length, length)
    prefill(steps, request, [length])
    scores = torch.einsum(
        "qkgd,nkd->kgqn", request.query.double().unflatten(1, (2, 3)), request.key.double()
    )
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    dense = (scores * steps.scale).masked_fill(hidden, -torch.inf).softmax(-1)
    wanted = dense.sum(dim=(1, 2))
    for index, block in enumerate(request.blocks):
        state = int(steps.life.state[block])
        memory = steps.memory
        sums = memory.residual_sums[RAW - state] if state <= RAW else memory.staging_sums[state]
        part = wanted[:, index * N : (index + 1) * N]
        torch.testing.assert_close(sums[:, : part.shape[1]].double(), part, rtol=1e-5, atol=1e-6)


def peaked(steps, request, hot):
    """Let queries look at few tokens, as attention in models does."""
    direction = torch.randn(steps.size, generator=steps.generator)
    request.key[hot] += 1.5 * direction
    request.query += 1.5 * direction
    return request


def output_error(kernels, salient, normal=True, **options):
    """Mean error of decode outputs after a prompt with peaked attention."""
    steps = Steps(kernels, size=64, salient=salient, seed=2, **options)
    request = steps.request("a", 8 * N, 8 * N + 8)
    hot = torch.randperm(8 * N, generator=steps.generator)[: 2 * N]
    peaked(steps, request, hot)
    prefill(steps, request, [8 * N])
    if not normal:
        # Scores that say nothing.
        steps.memory.staging_sums.copy_(
            torch.rand(steps.memory.staging_sums.shape, generator=steps.generator)
        )
    decode(steps, request, count=8)
    wanted = exact(request.query, request.key, request.value, steps.scale)[8 * N :]
    return (request.output[8 * N :].double() - wanted).square().mean().sqrt().item()


def test_errors_fall_with_the_salient_share(kernels):
    errors = [output_error(kernels, salient) for salient in (0, 8, 16, 24, 32)]
    # Beyond the tokens that matter more bits change nothing but the last digits.
    assert all(after < before * 1.0001 for before, after in pairwise(errors))
    assert errors[0] > 2 * errors[-1]


def test_salient_tokens_are_better_than_random_ones(kernels):
    assert output_error(kernels, 12) < 0.8 * output_error(kernels, 12, normal=False)


def test_every_sealed_block_has_its_quota(kernels):
    steps = Steps(kernels, salient=13, kv_heads=4)
    request = steps.request("a", 4 * N, 6 * N)
    prefill(steps, request, [4 * N])
    decode(steps, request, count=N + 1)
    _, salient = quantiser.read_page(steps.memory.cache[request.blocks[:5]], steps.memory.page)
    assert bool((salient.sum(-1) == 13).all())
    # Heads choose for themselves.
    assert not torch.equal(salient[:, 0], salient[:, 1])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_within_its_request(kernels, bad):
    """Its blocks have their quota all the same, and a neighbour's outputs and pages are its own."""
    found = []
    for broken in (False, True):
        steps = Steps(kernels, seed=5)
        good, other = steps.request("a", 3 * N + 5, 5 * N), steps.request("b", 2 * N + 3, 5 * N)
        if broken:
            for x in (other.key, other.value, other.query):
                x[N - 3 :: 2] = bad
        steps.step((good, 3 * N + 5), (other, 2 * N + 3))
        for _ in range(N + 3):
            steps.step((good, 1), (other, 1))
        found.append((good.output, steps.memory.cache[good.blocks[:4]]))
        pages = steps.memory.cache[other.blocks[:3]]
        _, salient = quantiser.read_page(pages, steps.memory.page)
        assert (salient.sum(-1) == steps.memory.page.v_salient).all()
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_the_first_tokens_are_salient_at_any_rate(kernels):
    steps = Steps(kernels, salient=5, always_salient_first=4)
    request = steps.request("a", 2 * N, 3 * N)
    prefill(steps, request, [2 * N])
    decode(steps, request, count=1)
    _, salient = quantiser.read_page(steps.memory.cache[request.blocks[:2]], steps.memory.page)
    assert bool(salient[0, ..., :4].all())
    assert not bool(salient[1, ..., :4].all())


@pytest.mark.parametrize("score", ["last_query", "accumulate"])
def test_blocks_of_generated_tokens_are_scored(kernels, score):
    """By the query that fills them alone, or by the mean of all that saw a token."""
    steps = Steps(kernels, decode_score=score, salient=16)
    request = steps.request("a", N, 2 * N + 1)
    prefill(steps, request, [N])
    decode(steps, request, count=N)
    row = RAW - int(steps.life.state[request.blocks[1]])
    sums = steps.memory.residual_sums[row].double()
    seen = steps.life._row_seen[row]
    block, grouped = request.blocks[0], request.query.double().unflatten(1, (2, 2))
    k, _ = torch_kernels.read(steps.memory, block, int(steps.life.state[block]))
    keys = torch.cat([k.double(), request.key[N : 2 * N].double()])
    scores = torch.einsum("qkgd,nkd->kgqn", grouped[N : 2 * N], keys) * steps.scale
    hidden = torch.arange(2 * N) > torch.arange(N, 2 * N)[:, None]
    dense = scores.masked_fill(hidden, -torch.inf).softmax(-1)[..., N:]
    rows = dense[:, :, -1:] if score == "last_query" else dense
    torch.testing.assert_close(sums, rows.sum(dim=(1, 2)), rtol=1e-4, atol=1e-6)
    if score == "accumulate":
        assert seen.tolist() == list(range(N, 0, -1))
    decode(steps, request, count=1)
    _, salient = quantiser.read_page(steps.memory.cache[request.blocks[1]], steps.memory.page)
    weight = 1 / torch.arange(N, 0, -1) if score == "accumulate" else 1.0
    best = (sums * weight).topk(16, dim=1).indices
    assert all(bool(salient[h, :, best[h]].all()) for h in range(2))


def test_what_bench_times_runs():
    from vllm.platforms import current_platform

    from vllm_plugins.attention_backends.zipcache.kernel_cases import kernel_cases
    from vllm_plugins.bench.kernels import STOCK, KernelShape, Load

    current_platform.import_kernels()
    shape = KernelShape(4, 2, 64, 64, "float32", "cpu")
    cases = kernel_cases(shape, Load("decode", 200, 2), {})
    assert [case.name for case in cases] == [STOCK, "zipcache", "zipcache, seal one block"]
    for case in cases:
        case.run()
    # Bytes of a token and head: keys and values in float32, and packed.
    assert cases[0].bytes == 2 * 200 * 2 * 512
    assert cases[1].bytes == 2 * 200 * 2 * 62
    with pytest.raises(ValueError, match="decode"):
        kernel_cases(shape, Load("prefill", 2048, 1), {})

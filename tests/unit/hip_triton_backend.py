"""HiP's CUDA backend in the real engine, on CPU, interpreted; `test_hip_triton` runs this.

Its sparse rows are served by its kernels. FlashAttention, which serves the others, needs CUDA: here
all rows are sparse, and another way to write the cache stands in.
"""

from contextlib import contextmanager

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from tests.models import make_engine, tiny_llama, worker_of
from tests.unit import hip_kernels  # Makes the interpreter right and fast.
from vllm_plugins import engine_args
from vllm_plugins.attention_backends.hip.batch import BatchPlanner
from vllm_plugins.attention_backends.hip.cuda_backend import HipCudaBackend, HipCudaImpl
from vllm_plugins.attention_backends.hip.plugin import HipPlugin

assert hip_kernels
OPTIONS = {
    "dense_layers": [],
    "sink_tokens": 8,
    "window_tokens": 64,
    "overlap_tokens": 16,
    "stages": [{"chunk": 32, "keep": 64}, {"chunk": 8}],
    "top_k": 16,
    "refresh": [8, 4],
    "dense_threshold": 0,
    "phases": "both",
    "dense_tail_queries": 0,
}
PROMPTS = [[(7 * i + j * j) % 500 for j in range(n)] for i, n in enumerate((3, 163, 203))]


class Impl(HipCudaImpl):
    """Writes the cache without CUDA."""

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        size, n = kv_cache.shape[2], len(slot_mapping)
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        keys[slot_mapping // size, slot_mapping % size] = key[:n]
        values[slot_mapping // size, slot_mapping % size] = value[:n]


class Backend(HipCudaBackend):
    """Stands in for the CPU's."""

    @staticmethod
    def get_name():
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls():
        return Impl


@contextmanager
def engine():
    arguments = {"seed": 0, "max_num_batched_tokens": 256, "num_gpu_blocks_override": 64}
    arguments |= engine_args("hip", **OPTIONS)
    with make_engine(tiny_llama(layers=1), **arguments) as llm:
        yield llm


def greedy(llm, tokens=7):
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1)
    requests = [{"prompt_token_ids": x} for x in PROMPTS]
    answers = [x.outputs[0] for x in llm.generate(requests, params, use_tqdm=False)]
    logprobs = [
        [p[t].logprob for p, t in zip(x.logprobs, x.token_ids, strict=True)] for x in answers
    ]
    return [x.token_ids for x in answers], torch.tensor(logprobs)


@pytest.fixture(scope="module")
def on_cpu():
    with engine() as llm:
        return greedy(llm)


@pytest.fixture(scope="module")
def llm(on_cpu):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(HipPlugin.backends, "cpu", f"{__name__}.Backend")
        with engine() as llm:
            yield llm


def builder_of(llm):
    [[group]] = worker_of(llm).model_runner.attn_groups
    return group.get_metadata_builder()


def test_it_answers_as_the_cpu_backend_does(llm, on_cpu):
    tokens, logprobs = greedy(llm)
    assert type(builder_of(llm)) is HipCudaBackend.get_builder_cls()
    assert tokens == on_cpu[0]
    assert torch.allclose(logprobs, on_cpu[1], atol=1e-4)


def test_kernels_are_compiled_before_requests_come(llm, monkeypatch):
    """Of a phase that is sparse, all are launched, and none does anything."""
    from triton.runtime.interpreter import InterpretedFunction

    launched, original = [], InterpretedFunction.__getitem__

    def listed(self, grid):
        def launch(*arguments, **named):
            # What kernels are compiled for, as requests' own tensors are.
            tensors = [x for x in (*arguments, *named.values()) if isinstance(x, torch.Tensor)]
            assert not any(x.data_ptr() % 16 for x in tensors)
            original(self, grid)(*arguments, **named)

        launched.append(self.fn.__name__)
        return launch

    monkeypatch.setattr(InterpretedFunction, "__getitem__", listed)
    view = worker_of(llm).plugin_view()
    [name] = view.config.compilation_config.static_forward_context
    layer = view.attention_layer(name)
    before = layer.kv_cache.clone(), [x.clone() for x in layer.impl._kept]
    selected = ["_keep_best"] * 2
    for phases, wanted in (
        ("decode", ["_attend_split", *selected, "_merge", *["_scan_few"] * 2]),
        ("prefill", ["_attend_block", *selected, *["_scan_many"] * 2]),
    ):
        launched.clear()
        layer.impl.warm_up(layer.kv_cache, 2048, phases)
        assert sorted(launched) == sorted(wanted)
    assert torch.equal(layer.kv_cache, before[0])
    assert all(map(torch.equal, layer.impl._kept, before[1]))


def batch_of(requests):
    """A batch of requests: first position, tokens, whether they are of its prompt."""
    lengths = torch.tensor([n for _, n, _ in requests])
    loc = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    ends = torch.tensor([p + n for p, n, _ in requests], dtype=torch.int32)
    table = torch.arange(len(requests) * 16, dtype=torch.int32).view(-1, 16)
    slots = [
        int(table[r, x // 128]) * 128 + x % 128
        for r, (p, n, _) in enumerate(requests) for x in range(p, p + n)
    ]  # fmt: skip
    return CommonAttentionMetadata(
        query_start_loc=loc, query_start_loc_cpu=loc, seq_lens=ends, num_reqs=len(requests),
        num_actual_tokens=int(loc[-1]), max_query_len=int(lengths.max()),
        max_seq_len=int(ends.max()), block_table_tensor=table, slot_mapping=torch.tensor(slots),
        is_prefilling=torch.tensor([x for _, _, x in requests]), seq_lens_cpu_upper_bound=ends,
    )  # fmt: skip


@pytest.fixture
def plan(llm, monkeypatch):
    """Builds a batch with the engine's own builder, with other options."""
    builder = builder_of(llm)
    assert builder.block_size == 128

    def build(batch, **options):
        planner = builder._planner
        options = planner._options.model_copy(update=options)
        monkeypatch.setattr(planner, "_options", options)
        monkeypatch.setattr(planner, "_prompts", BatchPlanner(options, 1, 1))
        return builder.build(0, batch)

    return build


def test_the_stock_kernel_is_told_nothing_of_rows_that_are_served_elsewhere(plan):
    batch = batch_of([(130, 70, True), (200, 1, False), (50, 1, False), (0, 0, False)])
    built = plan(batch, phases="decode", dense_threshold=100)
    assert built.seq_lens.tolist() == [200, 201, 51, 0]
    # Start, length, row, position, level.
    assert built.sparse.decodes[:, :5].tolist() == [[70, 1, 1, 200, 0]]
    assert built.sparse.prompts is None
    assert built.sparse.rest.seq_lens.tolist() == [200, 1, 51, 0]
    assert built.sparse.rest.max_seq_len == 200 and built.sparse.max_len == 201
    assert built.sparse.rest.scheduler_metadata is None
    # The next step: the same row is kept, nothing is due.
    batch = batch_of([(200, 8, True), (201, 1, False), (51, 1, False), (0, 0, False)])
    assert plan(batch).sparse.decodes[:, :5].tolist() == [[8, 1, 1, 201, 2]]
    # Without sparse rows it serves all; what was kept stays until its place is written to.
    assert plan(batch_of([(208, 8, True), (50, 1, False)])).sparse is None
    batch = batch_of([(216, 8, True), (202, 1, False)])
    assert plan(batch).sparse.decodes[:, :5].tolist() == [[8, 1, 1, 202, 2]]
    assert plan(batch_of([(224, 8, True), (200, 8, True)])).sparse is None
    batch = batch_of([(232, 8, True), (203, 1, False)])
    assert plan(batch).sparse.decodes[:, :5].tolist() == [[8, 1, 1, 203, 0]]


def test_sparse_prompts(plan):
    batch = batch_of([(0, 60, True), (60, 100, True), (300, 1, False)])
    built = plan(batch, phases="both", dense_threshold=100)
    assert built.sparse.prompts.tolist() == [
        # Start, length, row, position, level, row of lists: cut at multiples of 64.
        [60, 4, 1, 60, -1, 0], [64, 64, 1, 64, 0, 1], [128, 32, 1, 128, 0, 2],
    ]  # fmt: skip
    assert built.sparse.decodes[:, :5].tolist() == [[160, 1, 2, 300, 0]]
    assert built.sparse.rest.seq_lens.tolist() == [60, 100, 1]
    # Where all rows are served here, the stock kernel has nothing to do.
    assert plan(batch_of([(60, 100, True), (301, 1, False)])).sparse.rest is None
    assert plan(batch, phases="prefill").sparse.decodes is None


@pytest.fixture
def graphs(llm, monkeypatch):
    """Lets the planner describe steps of single tokens for graphs."""
    planner = builder_of(llm)._planner
    monkeypatch.setattr(planner, "_blocks", torch.full((8, 6), -7, dtype=torch.int32))
    monkeypatch.setattr(planner, "_lengths", torch.full((8,), -7, dtype=torch.int32))


def test_what_a_graph_reads_stays_where_it_is(plan, graphs):
    options = {"phases": "decode", "dense_threshold": 100}
    first = plan(batch_of([(200, 1, False), (50, 1, False), (0, 0, False)]), **options)
    assert first.sparse.decodes[:, :5].tolist() == [
        # Start, length, row, position, level: two are empty, the stock kernel's and padding.
        [0, 1, 0, 200, 0], [1, 0, 1, 50, 0], [2, 0, 2, 0, 0],
    ]  # fmt: skip
    assert first.sparse.rest.seq_lens.tolist() == [1, 51, 0]
    assert first.sparse.rest.scheduler_metadata is None and first.sparse.prompts is None
    # A step with a prompt in between is none of a graph's.
    assert plan(batch_of([(201, 1, False), (0, 40, True)])).sparse.decodes.shape == (1, 6)
    second = plan(batch_of([(202, 1, False), (300, 1, False), (99, 1, True)]))
    assert second.sparse.decodes[:, 1:5].tolist() == [[1, 0, 202, 2], [1, 1, 300, 0], [0, 2, 99, 0]]
    assert second.sparse.rest.seq_lens.tolist() == [1, 1, 100]
    for old, new in ((first.sparse.decodes, second.sparse.decodes),
                     (first.sparse.rest.seq_lens, second.sparse.rest.seq_lens)):  # fmt: skip
        assert old.data_ptr() == new.data_ptr() and old.equal(new)


def test_the_second_runner_says_nothing_of_rows_that_pad_a_graphs_batch(plan, graphs):
    batch = batch_of([(200, 1, False), (99, 1, True), (0, 0, False), (0, 0, False)])
    batch = batch.replace(is_prefilling=batch.is_prefilling[:2])
    built = plan(batch, phases="decode", dense_threshold=90)
    assert built.sparse.decodes[:, 1].tolist() == [1, 0, 0, 0]


def test_graphs_are_stocks_where_decodes_are_never_sparse(plan, llm, graphs, monkeypatch):
    builder, counted = builder_of(llm), []
    monkeypatch.setattr(builder._planner._meter, "count", lambda *blocks: counted.append(blocks))
    monkeypatch.setattr(builder, "is_counting", True)
    batch = batch_of([(200, 1, False), (50, 1, True), (0, 0, False)])
    built = plan(batch, phases="prefill", dense_threshold=0)
    assert built.sparse is None and built.seq_lens.tolist() == [201, 51, 0]
    [(decodes, dense, prompts)] = counted
    assert decodes is None and dense.row.tolist() == [0, 1] and len(prompts) == 0
    assert builder.build_for_cudagraph_capture(batch).sparse is None
    built = plan(batch_of([(201, 1, False), (0, 128, True)]), dense_tail_queries=0)
    assert built.sparse.decodes is None and len(built.sparse.prompts) == 2


def test_graphs_are_captured_for_the_longest_sequence_and_not_counted(llm, graphs, monkeypatch):
    builder, counted = builder_of(llm), []
    monkeypatch.setattr(builder._planner._meter, "count", lambda *blocks: counted.append(blocks))
    batch = batch_of([(200, 1, False), (50, 1, False)])
    # Outside of steps of requests.
    built = builder.build_for_cudagraph_capture(batch)
    longest = builder.model_config.max_model_len
    assert built.sparse.max_len == built.sparse.rest.max_seq_len == longest > 201
    builder.build(0, batch)
    assert not counted
    monkeypatch.setattr(builder, "is_counting", True)
    builder.build(0, batch)
    assert len(counted) == 1


def test_it_answers_the_same_where_steps_are_described_for_graphs(llm, graphs, on_cpu, monkeypatch):
    # All rows are sparse, so that there is nothing for the stock kernel, which needs CUDA.
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda *_: None)
    tokens, logprobs = greedy(llm)
    assert tokens == on_cpu[0]
    assert torch.allclose(logprobs, on_cpu[1], atol=1e-4)
    assert (builder_of(llm)._planner._blocks[:3] != -7).all()


def test_stock_where_no_layer_is_sparse(llm, monkeypatch):
    monkeypatch.setattr(builder_of(llm), "_planner", None)
    batch = batch_of([(300, 1, False)])
    stock = FlashAttentionMetadataBuilder.build(builder_of(llm), 0, batch)
    built = builder_of(llm).build(0, batch)
    assert built.sparse is None and built.seq_lens is stock.seq_lens

"""A partial forward restores what a full prefill computed, and the worker host changes nothing."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from vision import QWEN_FAMILIES, tiny_qwen_vl

from tests.models import make_engine, tiny_llama, worker_of

pytestmark = pytest.mark.engine

WORKER = "vllm_plugins.engine.worker_host.PluginWorker"
LENGTHS = (300, 70, 201)
PROMPTS = [[(7 * i + 5 * j * (i + 2)) % 500 for j in range(n)] for i, n in enumerate(LENGTHS)]


def greedy(llm, prompts, tokens=8):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [out.outputs[0] for out in llm.generate(inputs, params, use_tqdm=False)]


def recorder():
    """A listener that notes what it is told and which blocks requests get."""
    from vllm_plugins.engine.worker_host import WorkerListener

    class Recorder(WorkerListener):
        def __init__(self) -> None:
            self.steps, self.inside, self.blocks = 0, False, {}

        @contextmanager
        def around_execute_model(self, scheduler_output):
            assert not self.inside
            self.inside = True
            for new in scheduler_output.scheduled_new_reqs:
                self.blocks[tuple(new.prompt_token_ids)] = np.array(new.block_ids[0], np.int32)
            yield
            self.inside, self.steps = False, self.steps + 1

    return Recorder()


class Prefilled:
    """An engine in whose KV cache the prompts' KV still lies after they are answered."""

    def __init__(self, llm, layers: int) -> None:
        from vllm_plugins.engine.kv_pages import KVPages
        from vllm_plugins.engine.partial_forward import PartialForward, Rows, slot_mapping

        self.worker, self.rows, self.slot_mapping = worker_of(llm), Rows, slot_mapping
        self.recorder = recorder()
        self.worker.plugin_listeners.append(self.recorder)
        view = self.worker.plugin_view()
        self.forward = PartialForward(view, max_rows=128)
        with self.positions_given() as self.given:
            greedy(llm, PROMPTS, tokens=1)
        assert self.forward.num_layers == layers
        names = [self.forward.attention_name(i) for i in range(layers)]
        self.pages = KVPages(view, names)
        self.generator = torch.Generator().manual_seed(1)

    @contextmanager
    def positions_given(self):
        """A list to which each run of the first layer adds the positions that it is given."""
        given = []
        hook = self.forward._stack.layers[0].register_forward_pre_hook(
            lambda module, inputs: given.append(inputs[0].clone())
        )
        yield given
        hook.remove()

    def part(self, prompt, positions):
        positions = np.asarray(positions, np.int64)
        tokens = np.array(prompt, np.int32)[positions]
        return self.rows(positions, self.recorder.blocks[tuple(prompt)], tokens)

    def slots(self, part):
        slots = self.slot_mapping(part.block_ids, part.positions, self.pages.block_size)
        return torch.from_numpy(slots)

    def read(self, part):
        return [self.pages.read(layer, self.slots(part)) for layer in range(self.pages.num_layers)]

    def spoil(self, part, layers):
        slots = self.slots(part)
        shape = (len(slots), self.pages.num_heads, self.pages.head_size)
        for layer in layers:
            keys, values = torch.randn(2, *shape, generator=self.generator).to(self.pages.dtype)
            self.pages.write(layer, keys, values, slots)


@pytest.fixture(
    scope="module",
    params=[
        ("llama", 32, "float32"),
        ("llama", 128, "float32"),
        ("qwen2", 32, "float32"),
        ("qwen3", 64, "float32"),
        ("llama", 32, "bfloat16"),
        ("qwen2_vl", 32, "float32"),
        ("qwen2_5_vl", 32, "float32"),
        ("qwen3_vl", 32, "float32"),
    ],
    ids=lambda p: f"{p[0]}-block{p[1]}-{p[2]}",
)
def prefilled(request):
    family, block_size, dtype = request.param
    if family in QWEN_FAMILIES:
        model = tiny_qwen_vl(family, layers=4, vocab=512)
    else:
        model = tiny_llama(family=family, layers=4)
    with make_engine(
        model,
        worker_cls=WORKER,
        block_size=block_size,
        max_num_seqs=8,
        dtype=dtype,
        max_model_len=1024,
    ) as llm:
        yield Prefilled(llm, layers=4)


def scattered(generator, length, count, first=0):
    rows = torch.randperm(length - first, generator=generator)[:count] + first
    return np.sort(rows.numpy())


def assert_same(before, after):
    """Bit for bit; in bfloat16, whose products' sums may be rounded by shape, within 2^-6.

    Of a tensor's norm: it is four of the type's roundings, for the layers that they pass through.
    """
    for old, new in zip(before, after, strict=True):
        for kept, computed in zip(old, new, strict=True):
            if kept.dtype == torch.bfloat16:
                error = (computed.float() - kept.float()).norm() / kept.float().norm()
                assert error < 2**-6
            else:
                assert torch.equal(kept, computed)


def test_the_cache_reads_back_what_was_written(prefilled):
    part = prefilled.part(PROMPTS[0], range(40, 90))
    prefilled.spoil(part, [2])
    keys, values = prefilled.pages.read(2, prefilled.slots(part))
    prefilled.pages.write(2, values, keys, prefilled.slots(part))
    swapped = prefilled.pages.read(2, prefilled.slots(part))
    assert torch.equal(swapped[0], values)
    assert torch.equal(swapped[1], keys)
    prefilled.pages.write(2, keys, values, prefilled.slots(part))
    prefilled.forward.run([part], range(4))


def test_layers_are_given_positions_in_vllms_own_form(prefilled):
    with prefilled.positions_given() as given:
        prefilled.forward.run([prefilled.part(PROMPTS[0], range(64))], range(1))
    [ours] = given
    assert torch.equal(ours, prefilled.given[0][..., :64])
    mrope = prefilled.worker.plugin_view().config.model_config.uses_mrope
    assert ours.shape == ((3, 64) if mrope else (64,))


def test_scattered_rows_of_several_requests_are_restored_bit_for_bit(prefilled):
    for count in (1, 30, 60):
        parts = [
            prefilled.part(prompt, scattered(prefilled.generator, len(prompt), count))
            for prompt in PROMPTS
        ]
        before = [prefilled.read(part) for part in parts]
        for part in parts:
            prefilled.spoil(part, range(4))
        assert not torch.equal(prefilled.read(parts[0])[3][1], before[0][3][1])
        prefilled.forward.run(parts, range(4))
        for part, kept in zip(parts, before, strict=True):
            assert_same(kept, prefilled.read(part))


def test_a_range_of_layers_goes_on_from_kept_hidden_states(prefilled):
    """All rows through layers 0 and 1, then only some through 2 and 3."""
    everything = prefilled.part(PROMPTS[0], range(len(PROMPTS[0])))
    before = prefilled.read(everything)
    chosen = scattered(prefilled.generator, len(PROMPTS[0]), 25)
    prefilled.spoil(everything, [0, 1])
    prefilled.spoil(prefilled.part(PROMPTS[0], chosen), [2, 3])
    prefilled.forward.run([everything], range(2))
    some = everything.take(chosen)
    prefilled.forward.run([some], range(2, 4))
    assert_same(before, prefilled.read(everything))


def test_a_row_never_depends_on_a_later_token(prefilled):
    prompt, changed = PROMPTS[2], 150
    early = prefilled.part(prompt, [3, 4, 70, 149])
    before = prefilled.read(early)
    late = prefilled.part(prompt, range(changed, len(prompt)))
    kept = prefilled.read(late)
    prefilled.spoil(late, range(4))
    prefilled.spoil(early, range(4))
    prefilled.forward.run([early], range(4))
    assert_same(before, prefilled.read(early))
    prefilled.forward.run([late], range(4))
    assert_same(kept, prefilled.read(late))


def test_it_refuses_to_run_inside_itself(prefilled, monkeypatch):
    part = prefilled.part(PROMPTS[1], [5])
    monkeypatch.setattr(
        prefilled.forward, "_run", lambda parts, layers: prefilled.forward.run(parts, layers)
    )
    with pytest.raises(RuntimeError, match="inside another"):
        prefilled.forward.run([part], range(1))
    monkeypatch.undo()
    prefilled.forward.run([part], range(4))


def test_the_host_without_listeners_is_stock_and_with_one_tells_of_every_step():
    model = tiny_llama(layers=4)
    with make_engine(model) as llm:
        stock = greedy(llm, PROMPTS)
    with make_engine(model, worker_cls=WORKER) as llm:
        hosted = greedy(llm, PROMPTS)
        listener = recorder()
        worker_of(llm).plugin_listeners.append(listener)
        listened = greedy(llm, [[*prompt, 1] for prompt in PROMPTS])
        assert listener.steps >= 8
        assert len(listener.blocks) == len(PROMPTS)
    assert listened
    for ours, theirs in zip(hosted, stock, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.cumulative_logprob == theirs.cumulative_logprob

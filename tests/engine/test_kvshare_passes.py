"""Blends of several requests at once whose scattered rows take several passes, against float64.

A pass holds `max_num_seqs` runs of rows. Here that is so few, and what is recomputed so scattered,
that a request's rows do not fit into one, and filling all holes between them would cost more.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

from tests.engine.dense_llama import DenseLlama
from tests.engine.kvshare_engine import BLOCK, LOGPROBS, prompt, served
from tests.models import tiny_llama
from vllm_plugins.engine.partial_forward import slot_mapping, virtual_batch

pytestmark = pytest.mark.engine

CHECK, LAYERS, RUNS, ROWS = 1, 4, 4, 256
SPEC = (
    f"kvshare:check_layer={CHECK},selector=random,recompute_max=0.06,fix_tokens_per_step={ROWS},"
    "decode_interval=1,decode_k=24,decode_budget=0.3"
)
STORED = prompt(0, 1, 2, 3)
# Without a common beginning, so that all of them is blended.
ASKED = [[5 * i + 1, *prompt(*order)] for i, order in enumerate([(2, 0, 1), (3, 1, 0), (1, 3, 2)])]
KEEP_OUT = {"kv_transfer_params": {"kvshare": {"store": False}}}


def kv_of(pages, block_ids, count):
    """Keys and values of a request's first tokens: (layers, 2, count, kv heads, head size)."""
    slots = torch.from_numpy(slot_mapping(block_ids, np.arange(count), BLOCK))
    return torch.stack([torch.stack(pages.read(i, slots)) for i in range(LAYERS)]).double()


@dataclass
class Blended:
    """What one request's blend did, and what came of it."""

    reuse: object
    computed: np.ndarray
    kv: torch.Tensor


@dataclass
class Look:
    """What one look at decoding requests recomputed of a request, and its KV after that."""

    request_id: str
    rows: np.ndarray
    kv: torch.Tensor


@dataclass
class Watch:
    """What happens in an engine's worker.

    A pass is `(layers, first blocks of its requests, runs, rows)`.
    """

    engine: object
    blends: dict = field(default_factory=dict)
    looks: list = field(default_factory=list)
    passes: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    together: int = 0

    def install(self, patch):
        worker, forward = self.engine.worker, self.engine.worker.kitchen.forward
        finish, refresh, run = worker._finish, worker._refresh, forward._pass

        def finished(blend):
            self.blends[blend.reuse.request_id] = self.blended(blend)
            finish(blend)

        def refreshed(orders):
            stale = {o.request_id: worker._stale.get(o.request_id) for o in orders}
            before = {name: known.positions for name, known in stale.items() if known}
            spent = refresh(orders)
            for order in orders:
                name = order.request_id
                if name in before and len(before[name]) > len(stale[name].positions):
                    self.look(order, np.setdiff1d(before[name], stale[name].positions))
            return spent

        def passed(taken, layers):
            self.together = max(self.together, len(worker._blends))
            runs = [virtual_batch([part.positions]).runs for part in taken]
            owners = [int(part.block_ids[0]) for part in taken]
            rows = sum(len(part.positions) for part in taken)
            self.passes.append((layers, owners, sum(runs), rows))
            run(taken, layers)

        patch.setattr(worker, "_finish", finished)
        patch.setattr(worker, "_refresh", refreshed)
        patch.setattr(forward, "_pass", passed)

    def blended(self, blend):
        reuse, computed = blend.reuse, np.ones(blend.reuse.end, bool)
        computed[blend._reused] = blend.chosen
        pages = self.engine.worker.kitchen.pages
        return Blended(reuse, computed, kv_of(pages, reuse.block_ids, reuse.end))

    def look(self, order, rows):
        end = self.blends[order.request_id].reuse.end
        kv = kv_of(self.engine.worker.kitchen.pages, order.block_ids, end)
        self.looks.append(Look(order.request_id, rows, kv))


def expected_blend(model, blended):
    """The KV of a span whose rows were put together as `blended` says."""
    stored = model.blank(len(STORED))
    everything = torch.arange(len(STORED))
    model.through(stored, model.embed(STORED), everything, range(LAYERS))
    tokens = blended.reuse.token_ids.tolist()
    kv = model.blank(len(tokens))
    for source in blended.reuse.sources:
        here = slice(source.start, source.start + source.length)
        there = slice(source.position, source.position + source.length)
        shift = torch.full((source.length,), source.start - source.position)
        for layer in range(LAYERS):
            kv[layer, 0, here] = model.rotated(stored[layer, 0, there], shift)
        kv[:, 1, here] = stored[:, 1, there]
    span, chosen = torch.arange(len(tokens)), torch.from_numpy(np.flatnonzero(blended.computed))
    hidden = model.through(kv, model.embed(tokens), span, range(CHECK))
    model.write(kv, CHECK, hidden, span)
    model.through(kv, hidden[chosen], chosen, range(CHECK, LAYERS))
    return kv


def error(found, expected):
    """The largest error of a token's key or value in any layer and head, over its norm."""
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


@pytest.fixture(scope="module")
def watch():
    """What happened while three requests were blended and decoded at once, and their answers."""
    from vllm import SamplingParams

    with served(SPEC, max_num_seqs=RUNS) as engine, pytest.MonkeyPatch.context() as patch:
        engine.greedy([STORED])
        watch = Watch(engine)
        watch.install(patch)
        params = SamplingParams(
            temperature=0, max_tokens=14, ignore_eos=True, logprobs=LOGPROBS, extra_args=KEEP_OUT
        )
        inputs = [{"prompt_token_ids": text} for text in ASKED]
        watch.outputs = engine.llm.generate(inputs, params, use_tqdm=False)
        engine.assert_idle()
    return watch


@pytest.fixture(scope="module")
def model():
    return DenseLlama(tiny_llama(layers=LAYERS))


@pytest.fixture(scope="module")
def expected(watch, model):
    """The KV of each request once it is blended, by request."""
    assert len(watch.blends) == len(ASKED)
    return {name: expected_blend(model, blended) for name, blended in watch.blends.items()}


def test_rows_in_several_passes_give_the_kv_of_one_dense_pass(watch, model, expected):
    assert watch.together == len(ASKED)
    for name, blended in watch.blends.items():
        owner = [int(blended.reuse.block_ids[0])]
        passes = [p for p in watch.passes if p[:2] == (range(CHECK, LAYERS), owner)]
        assert len(passes) > 2
        assert all(runs == RUNS and rows < ROWS for _, _, runs, rows in passes[:-1])
        assert sum(rows for *_, rows in passes) == blended.computed.sum() < 0.2 * blended.reuse.end
        assert error(blended.kv, expected[name]) < 1e-3
        # Stale rows are far from a full prefill's, so that it matters what each row has seen.
        full, tokens = model.blank(blended.reuse.end), blended.reuse.token_ids.tolist()
        model.through(full, model.embed(tokens), torch.arange(len(tokens)), range(LAYERS))
        assert error(expected[name], full) > 0.1


def test_the_first_token_comes_from_that_kv(watch, model, expected):
    by_prompt = {tuple(output.prompt_token_ids): output for output in watch.outputs}
    for name, blended in watch.blends.items():
        end, tokens = blended.reuse.end, blended.reuse.token_ids.tolist()
        [text] = [text for text in ASKED if text[:end] == tokens]
        kv = torch.cat((expected[name], model.blank(len(text) - end)), dim=2)
        rest = torch.arange(end, len(text))
        hidden = model.through(kv, model.embed(text[end:]), rest, range(LAYERS))
        wanted = model.logprobs(hidden[-1:])[0]
        found = by_prompt[tuple(text)].outputs[0].logprobs[0]
        assert len(found) >= LOGPROBS
        assert max(abs(known.logprob - wanted[t].item()) for t, known in found.items()) < 1e-3


def test_looks_at_several_requests_share_passes_and_recompute_each_in_order(watch, model, expected):
    shared = [p for p in watch.passes if p[0] == range(LAYERS) and len(p[1]) > 1 and p[3] > RUNS]
    assert shared
    kv = {name: known.clone() for name, known in expected.items()}
    for look in watch.looks:
        tokens = watch.blends[look.request_id].reuse.token_ids[look.rows].tolist()
        rows, before = torch.from_numpy(look.rows), kv[look.request_id].clone()
        model.through(kv[look.request_id], model.embed(tokens), rows, range(LAYERS))
        assert error(look.kv, kv[look.request_id]) < 1e-3
        assert error(before, kv[look.request_id]) > 0.01
    assert {look.request_id for look in watch.looks} == set(expected)

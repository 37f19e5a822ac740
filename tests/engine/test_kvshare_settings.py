"""KVShare under settings that each need an engine of their own."""

import numpy as np
import pytest
import torch

from tests.engine.kvshare_engine import (
    BLOCK,
    DOCS,
    NEUTRAL,
    PROMPTS,
    assert_stock,
    prompt,
    served,
)

pytestmark = pytest.mark.engine


@pytest.mark.parametrize("order", ["arrival", "hit_rate"])
def test_preempted_requests_are_planned_again_and_lose_no_block(stock, order):
    """Room for two prompts, but not for their answers too."""
    spec = f"{NEUTRAL},order={order}"
    with served(spec, num_gpu_blocks_override=35, max_model_len=800) as engine:
        engine.greedy([prompt(0, 1, 2)])
        preempted = 0
        for p in PROMPTS[:4]:
            engine.add(p, tokens=96)
        answers = {}
        while engine.engine.has_unfinished_requests():
            for output in engine.engine.step():
                if output.finished:
                    answers[output.request_id.split("-")[0]] = output.outputs[0].token_ids
            preempted += sum(r.num_preemptions > 0 for r in engine.scheduler.requests.values())
        assert preempted
        assert [answers[f"r{i}"] for i in range(1, 5)] == stock[:4]
        engine.assert_idle()


def test_identical_context_is_exact_without_recomputation(stock):
    with served("kvshare:mode=exact_only") as engine:
        engine.greedy([prompt(0, 1, 2)])
        engine.llm.reset_prefix_cache()
        outputs = engine.greedy([PROMPTS[0]])
        assert outputs[0].num_cached_tokens >= len(PROMPTS[0]) - 2 * BLOCK
        assert_stock(outputs, stock[:1])
        # Other orders share nothing but the prefix.
        [other] = engine.greedy([PROMPTS[1]])
        assert other.num_cached_tokens == 0
        assert_stock([other], stock[1:2])
        engine.assert_idle()


def test_the_store_is_bounded_and_evicts(stock):
    """Room for about 200 tokens, asked to hold many times that."""
    gib = 200 * 4 * 2 * 2 * 32 * 4 / 2**30
    with served(f"kvshare:recompute_min=1,recompute_max=1,host_gib={gib:.9f}") as engine:
        assert engine.side.index.capacity == pytest.approx(200, abs=1)
        for p, answer in zip(PROMPTS, stock, strict=True):
            assert_stock(engine.greedy([p]), [answer])
            assert engine.side.index.used <= 200
        engine.assert_idle()
        # Prompts that are complete in the same step push each other out in it.
        engine.greedy([[*DOCS[i][:120], i] for i in range(5)])
        engine.assert_idle()


def read_all(engine, block_ids, count):
    """Keys and values of a request's first tokens in every layer."""
    from vllm_plugins.engine.partial_forward import slot_mapping

    pages = engine.worker.kitchen.pages
    slots = torch.from_numpy(slot_mapping(block_ids, np.arange(count), BLOCK))
    return [torch.stack(pages.read(layer, slots)) for layer in range(pages.num_layers)]


def test_decoding_makes_stale_tokens_fresh_within_its_budget():
    """With budget for all of them, the prompt's KV becomes that of a full prefill."""
    from vllm_plugins.engine.partial_forward import Rows

    spec = "kvshare:recompute_min=0,recompute_max=0,link_tokens=0,decode_interval=4,decode_k=512"
    # A look costs no more than a step.
    with served(f"{spec},decode_budget=1", max_num_batched_tokens=1024) as engine:
        engine.greedy([prompt(0, 1, 2)])
        name = engine.add(PROMPTS[1], tokens=12)
        while not engine.worker._stale:
            engine.engine.step()
        [request] = [r for key, r in engine.scheduler.requests.items() if key.startswith(name)]
        blocks = np.array(
            engine.scheduler.kv_cache_manager.get_block_ids(request.request_id)[0], np.int32
        )
        [stale] = engine.worker._stale.values()
        positions = stale.positions.copy()
        assert len(positions) > 0.8 * len(PROMPTS[1])
        span = len(blocks) * BLOCK
        blended = read_all(engine, blocks, span)
        while engine.worker._stale and stale.allowance == len(positions):
            engine.engine.step()
        assert not len(stale.positions)
        fresh = read_all(engine, blocks, span)
        rows = Rows(np.arange(span), blocks, np.array(PROMPTS[1][:span], np.int32))
        engine.worker.kitchen.forward.run([rows], range(4))
        exact = read_all(engine, blocks, span)
        assert all(torch.equal(a, b) for a, b in zip(fresh, exact, strict=True))
        assert not torch.equal(blended[3], exact[3])
        while engine.engine.has_unfinished_requests():
            engine.engine.step()
        engine.assert_idle()
        assert not engine.worker._stale


def test_decoding_spends_no_more_than_its_share():
    spec = "kvshare:recompute_max=0.1,decode_interval=2,decode_k=5,decode_budget=0.05"
    with served(spec) as engine:
        engine.greedy([prompt(0, 1, 2)])
        refreshed = []
        lookup = engine.worker._refresh
        engine.worker._refresh = lambda orders: refreshed.append(lookup(orders)) or 1
        [output] = engine.greedy([PROMPTS[1]], tokens=40)
        reused = output.num_cached_tokens
        # The look itself counts as one token.
        counts = [count - 1 for count in refreshed if count]
        assert all(count <= 5 for count in counts)
        assert 0.04 * reused <= sum(counts) <= 0.05 * reused


def test_by_hit_rate_who_has_most_stored_is_admitted_first(stock):
    spec = f"{NEUTRAL},order=hit_rate,max_bypass=1"
    with served(spec, max_num_seqs=1) as engine:
        engine.greedy([prompt(0, 1, 2)])
        novel, known, other = PROMPTS[6], PROMPTS[1], PROMPTS[3]
        names = [engine.add(p).split("-")[0] for p in (PROMPTS[5], novel, known, other)]
        finished, answers = [], {}
        while engine.engine.has_unfinished_requests():
            for output in engine.engine.step():
                if output.finished:
                    finished.append(output.request_id.split("-")[0])
                    answers[finished[-1]] = output.outputs[0].token_ids
        places = [finished.index(name) for name in names]
        # The known one overtakes the novel one, which then goes before the partly known one.
        assert places[2] < places[1] < places[3]
        assert [answers[name] for name in names] == [stock[i][:6] for i in (5, 6, 1, 3)]
        engine.assert_idle()

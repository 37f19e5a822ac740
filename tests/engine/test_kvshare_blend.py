"""Blended KV stays within its budget and away from everybody else."""

import pytest

from tests.engine.kvshare_engine import (
    BLOCK,
    DOCS,
    PROMPTS,
    assert_stock,
    prompt,
    served,
)
from tests.models import plugin_samples
from vllm_plugins.kv_connectors.kvshare import blend as blending

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def blend(stock):
    with served("kvshare:fix_tokens_per_step=256") as engine:
        yield engine


def test_what_is_not_shared_is_answered_as_by_stock(blend, stock):
    blend.forget()
    outputs = blend.greedy([PROMPTS[0]])
    assert_stock(outputs, stock[:1])
    assert outputs[0].num_cached_tokens == 0


def test_approximate_blocks_never_enter_the_exact_prefix_cache(blend, stock):
    blend.forget()
    blend.greedy([prompt(0, 1, 2)])
    [mixed] = blend.greedy([PROMPTS[1]])
    assert mixed.num_cached_tokens > 0
    # The same prompt again, without reuse: only the prefix cache could help it, and must not.
    off = {"kv_transfer_params": {"kvshare": {"reuse": False}}}
    [plain] = blend.greedy([PROMPTS[1]], extra=off)
    assert plain.num_cached_tokens == 0
    assert_stock([plain], stock[1:2])
    blend.assert_idle()


def test_the_exact_head_of_a_blended_prompt_stays_shared(blend):
    blend.forget()
    blend.greedy([prompt(0, 1, 2)])
    head = len(DOCS[0]) // BLOCK * BLOCK
    blend.greedy([prompt(0, 2, 1)])
    off = {"kv_transfer_params": {"kvshare": {"reuse": False}}}
    [again] = blend.greedy([prompt(0, 2, 1)], extra=off)
    assert again.num_cached_tokens == head


def test_the_next_turn_of_a_blended_conversation_is_blended_again(blend):
    """None of its blocks, the answer's neither, can be found by the exact prefix cache."""
    blend.forget()
    blend.greedy([prompt(0, 1, 2)])
    [first] = blend.greedy([PROMPTS[1]], tokens=40)
    turn = [*PROMPTS[1], *first.outputs[0].token_ids, 11, 12]
    off = {"kv_transfer_params": {"kvshare": {"reuse": False, "store": False}}}
    [plain] = blend.greedy([turn], extra=off)
    assert plain.num_cached_tokens == 0
    blend.llm.reset_prefix_cache()
    [again] = blend.greedy([turn])
    assert again.num_cached_tokens > 0.8 * len(PROMPTS[1])


def test_only_the_budget_is_recomputed(blend, monkeypatch):
    # What stands between two recomputed tokens and saves a pass comes on top.
    monkeypatch.setattr(blending, "bridged", lambda wanted, max_runs: wanted)
    blend.forget()
    blend.greedy([prompt(0, 1, 2)])
    counts = []
    worker = blend.worker
    finish = worker._finish
    worker._finish = lambda b: (counts.append((b.recomputed, len(b.chosen))), finish(b))
    try:
        blend.greedy([PROMPTS[1]])
    finally:
        del worker._finish
    [(recomputed, reused)] = counts
    assert 0.05 * reused <= recomputed <= 0.15 * reused + 1


def deviations() -> tuple[float, float]:
    """Return how many deviations `/metrics` shows, and their sum."""
    name, samples = "vllm_plugins:kvshare_relative_deviation", plugin_samples()
    count, total = (
        sum(s.value for s in samples if s.name == name + end) for end in ("_count", "_sum")
    )
    return count, total


def test_every_reused_tokens_deviation_is_counted_once(blend):
    blend.forget()
    before = deviations()
    blend.greedy([prompt(0, 1, 2)])
    assert deviations() == before
    blend.greedy([PROMPTS[1]])
    blend.step_once()
    after = deviations()
    # Document 2 stands first in this prompt: what is before it has gone, so all of it deviates.
    assert 0.8 * len(PROMPTS[1]) < after[0] - before[0] <= len(PROMPTS[1])
    assert after[1] > before[1]


def test_a_deviation_that_comes_later_from_the_device_holds_up_nobody(blend, monkeypatch):
    """As on a device: the slice that measures ends, and the next ones wait for the copy."""
    from vllm_plugins.kv_connectors.kvshare import blend as module

    class LateCopy(module.HostCopy):
        def __init__(self, *tensors):
            super().__init__(*tensors)
            self.comes_later, self.asked = True, 0

        def is_here(self):
            self.asked += 1
            return self.asked > 3

        def arrays(self):
            assert self.asked > 3
            return super().arrays()

    def answer():
        blend.forget()
        blend.greedy([prompt(0, 1, 2)])
        output = blend.greedy([PROMPTS[1]], tokens=12)[0]
        return output.outputs[0].token_ids, output.num_cached_tokens

    expected = answer()
    monkeypatch.setattr(module, "HostCopy", LateCopy)
    assert answer() == expected
    blend.assert_idle()

"""KVShare on models whose positions are M-RoPE's: neutral is stock, and moved keys are new ones."""

import numpy as np
import pytest
import torch
from vision import QWEN_FAMILIES, tiny_qwen_vl

from tests.engine.kvshare_engine import (
    BLOCK,
    DOCS,
    LOGPROBS,
    NEUTRAL,
    PROMPTS,
    Served,
    assert_stock,
    logprob_error,
    prompt,
    served,
    tokens_of,
)
from tests.engine.kvshare_images import TEXTS, with_images

pytestmark = pytest.mark.engine

LAYERS = 4
# Nothing is recomputed: what is loaded stays in the cache as it was moved.
MOVED = "kvshare:selector=none,recompute_min=0,recompute_max=0,check_layer=0,decode_interval=0"


def model(family):
    return tiny_qwen_vl(family, layers=LAYERS, vocab=512)


@pytest.mark.parametrize("family", QWEN_FAMILIES)
def test_everything_recomputed_equals_stock(family):
    arguments = {"model": model(family), "max_model_len": 1024}
    with served(None, **arguments) as llm:
        stock = [Served(llm).greedy([p], logprobs=LOGPROBS)[0] for p in PROMPTS]
    with served(NEUTRAL, **arguments) as engine:
        outputs = [engine.greedy([p], logprobs=LOGPROBS)[0] for p in PROMPTS]
        assert_stock(outputs, tokens_of(stock))
        assert logprob_error(outputs, stock) < 1e-3
        # (2, 0, 1) is made of what (0, 1, 2) stored, in another order.
        assert outputs[1].num_cached_tokens > 0.8 * len(PROMPTS[1])
        engine.assert_idle()


class Moving:
    """An engine that reuses without recomputing, and what is in its cache of a prompt."""

    def __init__(self, engine) -> None:
        self.engine, self.pages = engine, engine.worker.kitchen.pages

    def kv(self, prompt_ids, reuse):
        """Serve a prompt and return its keys and values: (2, layers, n, kv heads, head size)."""
        from vllm_plugins.engine.partial_forward import slot_mapping

        engine, blocks = self.engine, []
        extra = {"kv_transfer_params": {"kvshare": {"reuse": reuse, "store": not reuse}}}
        ended = engine.side.ended

        def end(request):
            blocks.append(engine.side._block_ids(request.request_id))
            return ended(request)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine.side, "ended", end)
            [output] = engine.greedy([prompt_ids], tokens=1, extra=extra)
        slots = torch.from_numpy(slot_mapping(blocks[0], np.arange(len(prompt_ids)), BLOCK))
        layers = [torch.stack(self.pages.read(i, slots)) for i in range(self.pages.num_layers)]
        return torch.stack(layers, 1), output.num_cached_tokens


@pytest.mark.parametrize("family", QWEN_FAMILIES)
def test_moved_keys_are_those_of_their_new_positions(family):
    with served(MOVED, model=model(family), max_model_len=1024) as engine:
        moving = Moving(engine)
        first, second = prompt(0, 1), prompt(2, 1)
        old, cached = moving.kv(first, reuse=False)
        assert cached == 0
        moved, cached = moving.kv(second, reuse=True)
        assert cached > len(DOCS[2])
        fresh, _ = moving.kv([*second, 5], reuse=False)
        source = torch.arange(len(DOCS[0]), len(DOCS[0]) + len(DOCS[1]))
        target = source + len(DOCS[2]) - len(DOCS[0])
        loaded = target < cached
        source, target = source[loaded], target[loaded]
        shift = engine.worker.kitchen.shift
        for layer in range(1, LAYERS):
            assert torch.equal(
                moved[0, layer, target], shift(old[0, layer, source], source, target)
            )
            assert torch.equal(moved[1, layer, target], old[1, layer, source])
        # A key of the first layer is made of its token and its position alone.
        there = shift(old[0, 0, source], source, target)
        assert torch.allclose(there, fresh[0, 0, target], atol=1e-5, rtol=0)
        assert not torch.allclose(old[0, 0, source], fresh[0, 0, target], atol=1e-2, rtol=0)
        engine.assert_idle()


WITH_IMAGES = [
    with_images(TEXTS[0], TEXTS[1], "a", TEXTS[2], "b", [7, 8]),
    with_images(TEXTS[1], "c", TEXTS[0], [7, 8]),
    with_images(TEXTS[2], TEXTS[0], "a", TEXTS[1], [9]),
    with_images("a", TEXTS[0], TEXTS[1], [9]),
    with_images(TEXTS[0], TEXTS[2], [10]),
]


def answers(llm):
    """Greedy answers, one prompt after the other."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=LOGPROBS)
    return [llm.generate([request], params, use_tqdm=False)[0] for request in WITH_IMAGES]


@pytest.mark.parametrize("family", QWEN_FAMILIES)
def test_text_before_an_image_is_reused_and_what_is_behind_it_computed(family):
    arguments = {"model": model(family), "max_model_len": 1024}
    with served(None, **arguments) as llm:
        stock = answers(llm)
    assert len({tuple(tokens) for tokens in tokens_of(stock)}) == len(stock)
    with served(NEUTRAL, **arguments) as engine:
        outputs = answers(engine.llm)
        assert_stock(outputs, tokens_of(stock), tokens=12)
        assert logprob_error(outputs, stock) < 1e-3
        reused = [output.num_cached_tokens for output in outputs]
        before = [0, len(DOCS[1]), len(DOCS[2]) + len(DOCS[0]), 0, 0]
        assert [n > 64 for n in reused[:4]] == [False, True, True, False]
        assert all(n <= most for n, most in zip(reused[:4], before[:4], strict=True))
        # Stored by prompts with images, taken by one without.
        assert reused[4] > 64
        engine.assert_idle()


@pytest.mark.parametrize("family", QWEN_FAMILIES)
def test_what_is_stored_of_a_prompt_with_images_is_its_text(family):
    """Identical text is loaded as it is, with nothing recomputed over it."""
    arguments = {"model": model(family), "max_model_len": 1024, "enable_prefix_caching": False}
    with served("kvshare:mode=exact_only", **arguments) as engine:
        stored, loaded = answers(engine.llm), answers(engine.llm)
        assert tokens_of(loaded) == tokens_of(stored)
        assert logprob_error(loaded, stored) < 1e-3
        reused = [output.num_cached_tokens > 64 for output in loaded]
        assert reused == [True, True, True, False, True]
        engine.assert_idle()

"""The check layer's keys and values without its attention, against a pass through the layer."""

import numpy as np
import pytest
import torch

from tests.engine.kvshare_engine import BLOCK, ENGINE, Served
from tests.models import make_engine, tiny_llama
from vllm_plugins import engine_args
from vllm_plugins.engine.partial_forward import Rows, slot_mapping

pytestmark = pytest.mark.engine

TOKENS = 100


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("check", [0, 2])
def test_keys_and_values_are_those_of_the_layer_and_hidden_states_stay(family, check):
    spec = engine_args("kvshare")
    with make_engine(tiny_llama(layers=4, family=family), **ENGINE, **spec) as llm:
        kitchen = Served(llm).worker.kitchen
        forward, pages = kitchen.forward, kitchen.pages
        token_ids = np.random.default_rng(0).integers(0, 500, TOKENS).astype(np.int32)
        positions, blocks = np.arange(TOKENS), np.array([3, 1, 5, 2], np.int32)
        slots = torch.from_numpy(slot_mapping(blocks, positions, BLOCK))

        whole = Rows(positions, blocks, token_ids)
        forward.run([whole], range(check + 1))
        expected = pages.read(check, slots)
        pages.write(check, *(torch.zeros_like(x) for x in expected), slots)

        part = Rows(positions, blocks, token_ids)
        if check:
            forward.run([part], range(check))
        before = part.hidden
        kept = None if before is None else before.clone()
        # In two passes, as slices are.
        for half in (slice(0, 37), slice(37, TOKENS)):
            forward.write_keys_values(part.take(half), check, pages)
        for found, wanted in zip(pages.read(check, slots), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        if kept is not None:
            assert torch.equal(before, kept)
        # What was chosen goes on through the layer itself.
        chosen = np.array([5, 6, 40, 99])
        rows = part.take(chosen)
        forward.run([rows], range(check, check + 1))
        torch.testing.assert_close(rows.hidden, whole.hidden[chosen], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rows.residual, whole.residual[chosen], rtol=1e-4, atol=1e-5)

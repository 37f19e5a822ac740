"""SpecVLM and what requests bring of their own, a grammar or an adapter: answers are stock's."""

import json

import pytest
import torch

from tests.engine.grammars import KINDS, assert_follows, constrained, json_words
from tests.engine.specvlm_engine import PROMPTS, assert_idle, drafter_of, engine, target

pytestmark = pytest.mark.engine

RANK = 8
LAYERS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
FREE, LONGEST = 24, 60
"""Tokens of an answer without a grammar, and more than any that one allows."""
ROUNDS = range(4)
"""Until every kind of answer has been asked of every adapter."""


def head_is_adapted() -> bool:
    """Whether adapters may change the head, which with drafts is refused on model runner V2."""
    from vllm.config import VllmConfig

    return not VllmConfig().use_v2_model_runner


def lora(folder, modules, seed):
    """Make an adapter of some modules of the target's language model."""
    from safetensors.torch import load_file, save_file

    random, made = torch.Generator().manual_seed(seed), {}
    for name, weight in load_file(target() / "model.safetensors").items():
        *_, module, kind = name.split(".")
        if "vision" in name or module not in modules or kind != "weight":
            continue
        shapes = (RANK, weight.shape[1]), (weight.shape[0], RANK)
        names = "lora_A.weight", "lora_B.weight"
        if module == "embed_tokens":
            shapes = (RANK, weight.shape[0]), (weight.shape[1], RANK)
            names = "lora_embedding_A", "lora_embedding_B"
        for part, shape, scale in zip(names, shapes, (float(weight.std()), 0.3), strict=True):
            values = torch.randn(shape, generator=random) * scale
            made[f"base_model.model.{name.removesuffix('weight')}{part}"] = values
    save_file(made, folder / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [*modules]}
    (folder / "adapter_config.json").write_text(json.dumps(described))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """No adapter, and one each for layers, embeddings and, where it may have one, the head."""
    from vllm.lora.request import LoRARequest

    parts = [LAYERS, ("embed_tokens",), ("lm_head",) if head_is_adapted() else ("k_proj",)]
    found = [None]
    for number, modules in enumerate(parts, start=1):
        folder = tmp_path_factory.mktemp("adapter")
        lora(folder, modules, seed=number)
        found.append(LoRARequest(modules[0], number, str(folder)))
    return found


def run(options, adapters):
    modules = None if head_is_adapted() else [*LAYERS, "k_proj", "embed_tokens"]
    return engine(
        options,
        tokenizer=str(json_words()),
        enable_lora=True,
        max_lora_rank=RANK,
        lora_target_modules=modules,
        # vLLM's CPU build gives requests without an adapter that of the last place.
        max_loras=len(adapters),
    )


def answers(llm, adapters, round_, temperature=0.0):
    """Return the tokens of an answer to each prompt, kinds and adapters mixed."""
    from vllm import SamplingParams

    kinds = [KINDS[i % len(KINDS)] for i in range(len(PROMPTS))]
    params = [
        constrained(
            SamplingParams(
                temperature=temperature,
                max_tokens=FREE if kind is None else LONGEST,
                ignore_eos=True,
            ),
            kind,
        )
        for kind in kinds
    ]
    outputs = llm.generate(
        PROMPTS,
        params,
        use_tqdm=False,
        lora_request=[adapters[(i + round_) % len(adapters)] for i in range(len(PROMPTS))],
    )
    for output, kind in zip(outputs, kinds, strict=True):
        assert_follows(output, kind)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def stock(adapters):
    with run(None, adapters) as llm:
        return [answers(llm, adapters, round_) for round_ in ROUNDS]


@pytest.fixture(scope="module")
def drafting(stock, adapters):
    with run({}, adapters) as llm:
        yield llm


def test_every_adapter_changes_answers(stock):
    """Else the other tests would show nothing."""
    for i in range(0, len(PROMPTS), len(KINDS)):
        assert len({tuple(stock[round_][i]) for round_ in ROUNDS}) == len(ROUNDS)


@pytest.mark.parametrize("round_", ROUNDS)
def test_answers_are_the_targets(drafting, stock, adapters, round_):
    seen = sum(drafter_of(drafting).model.tally.rows.values())
    assert answers(drafting, adapters, round_) == stock[round_]
    assert sum(drafter_of(drafting).model.tally.rows.values()) > seen
    assert_idle(drafting)


def test_cached_prompts_of_several_adapters(drafting, stock, adapters):
    for round_ in (2, 0):
        assert answers(drafting, adapters, round_) == stock[round_]
    assert_idle(drafting)


def test_grammars_hold_at_a_temperature(drafting, adapters):
    answers(drafting, adapters, 0, temperature=1.0)
    assert_idle(drafting)

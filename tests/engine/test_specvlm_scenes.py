"""A drafter that was trained: its drafts are mostly right, and answers still the target's own."""

from pathlib import Path
from typing import Any

import pytest
from scenes import scenes
from scenes_data import DESCRIBE, ID
from scenes_evaluate import held_out
from scenes_model import BOS, EOS, IMAGE_TOKEN

from tests.models import make_engine, scheduler_of
from vllm_plugins import engine_args

pytestmark = pytest.mark.engine

DRAFTER = Path(__file__).resolve().parents[1] / "fixtures" / "scenes-drafter"
ENGINE = {"block_size": 32, "max_model_len": 512, "limit_mm_per_prompt": {"image": 1}}


def asked() -> list[dict[str, object]]:
    """Descriptions and short questions on held-out scenes."""
    return [
        {
            "prompt_token_ids": [BOS, IMAGE_TOKEN, *(ID[word] for word in text.split())],
            "multi_modal_data": {"image": scene.image},
        }
        for scene in held_out(3, seed=700)
        for text in (DESCRIBE, scene.questions[0].text)
    ]


def told(llm, prompts, **sampling) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=80, stop_token_ids=[EOS], **sampling)
    results = llm.generate(prompts, params, use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]


def without_commas() -> dict[str, Any]:
    """Return sampling parameters with a grammar that most drafts keep to."""
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(regex="[a-z]+")}


def test_answers_are_the_targets_in_a_third_of_the_steps():
    prompts = asked()
    with make_engine(scenes(), **ENGINE) as llm:
        stock = told(llm, prompts)
        guided = told(llm, prompts, **without_commas())
    assert guided != stock
    assert not {ID[","], ID["."]} & {token for answer in guided for token in answer}
    assert max(map(len, stock)) > 40
    with make_engine(scenes(), **ENGINE, **engine_args("specvlm", model=str(DRAFTER))) as llm:
        assert told(llm, prompts) == stock
        assert told(llm, prompts, **without_commas()) == guided
        scheduler, rounds = scheduler_of(llm), []
        original = scheduler.schedule

        def schedule(*args, **kwargs):
            output = original(*args, **kwargs)
            rounds.extend(output.scheduled_spec_decode_tokens)
            return output

        scheduler.schedule = schedule
        # One at a time, from cached images whose rows the drafter does not see.
        assert [told(llm, [prompt])[0] for prompt in prompts[::2]] == stock[::2]
        assert sum(map(len, stock[::2])) > 3 * len(rounds) > 0
        rounds.clear()
        for prompt, answer in zip(prompts[::2], guided[::2], strict=True):
            assert told(llm, [prompt], **without_commas()) == [answer]
        assert sum(map(len, guided[::2])) > 2 * len(rounds) > 0

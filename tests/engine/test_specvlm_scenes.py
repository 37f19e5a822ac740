"""A drafter that was trained: its drafts are mostly right, and answers still the target's own."""

from pathlib import Path

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


def told(llm, prompts) -> list[list[int]]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=80, stop_token_ids=[EOS])
    results = llm.generate(prompts, params, use_tqdm=False)
    return [list(result.outputs[0].token_ids) for result in results]


def test_answers_are_the_targets_in_a_third_of_the_steps():
    prompts = asked()
    with make_engine(scenes(), **ENGINE) as llm:
        stock = told(llm, prompts)
    assert max(map(len, stock)) > 40
    with make_engine(scenes(), **ENGINE, **engine_args("specvlm", model=str(DRAFTER))) as llm:
        assert told(llm, prompts) == stock
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

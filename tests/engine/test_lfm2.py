"""A tiny LFM2 on CPU with a plug-in on: the log-probabilities of transformers' model in float32."""

import pytest
import torch
from vllm import SamplingParams
from vllm.model_executor.layers.rotary_embedding import get_rope

from tests import models
from tests.pd_servers import prompt
from tests.tiny_lfm2 import reference, tiny_lfm2
from vllm_plugins.activation import engine_args
from vllm_plugins.engine.rotary_heads import HEAD_SIZE, repair_rotary_embedding

# Around blocks of 32 tokens and chunks of 128.
LENGTHS = (5, 37, 100, 128, 300, 390)
ANSWER = 16


# Batches of whole prompts too, whose chunks end where a state is to be kept.
@pytest.fixture(scope="module", params=["pd:role=both", "pd:role=both,saturating_tokens=96"])
def llm(request):
    arguments = engine_args(request.param)
    with models.make_engine(
        tiny_lfm2(), block_size=32, max_num_batched_tokens=128, **arguments
    ) as engine:
        yield engine


def logprobs(llm, prompts):
    """Return what the engine answers, and the log-probabilities of prompts and answers."""
    params = SamplingParams(
        max_tokens=ANSWER, temperature=0, logprobs=0, prompt_logprobs=0, ignore_eos=True
    )
    made = []
    asked = [{"prompt_token_ids": tokens} for tokens in prompts]
    for answer in llm.generate(asked, params, use_tqdm=False):
        (output,) = answer.outputs
        ids = [*answer.prompt_token_ids, *output.token_ids]
        steps = [*answer.prompt_logprobs[1:], *output.logprobs]
        values = [step[token].logprob for step, token in zip(steps, ids[1:], strict=True)]
        made.append((ids, torch.tensor(values)))
    return made


def check(made):
    model = reference()
    for ids, values in made:
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        ours = wanted[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (values - ours).abs().max() < 1e-4
        answer = wanted[-ANSWER - 1 : -1].argmax(-1).tolist()
        assert ids[-ANSWER:] == answer


@pytest.mark.parametrize("length", LENGTHS)
def test_alone(llm, length):
    check(logprobs(llm, [prompt(length)]))


def test_batched(llm):
    check(logprobs(llm, [prompt(length, 1) for length in LENGTHS]))


@pytest.mark.parametrize("shape", [(7, 3, 64), (7, 3 * 64)], ids=["heads", "rows"])
def test_queries_are_rotated_alike_whatever_form_they_come_in(llm, shape):
    """While a plug-in is on; the engine's own configuration makes the embedding."""
    from vllm.config import set_current_vllm_config

    config = models.worker_of(llm).model_runner.vllm_config
    with set_current_vllm_config(config):
        rope = get_rope(HEAD_SIZE, 128, dtype=torch.float32)
        query, key = torch.randn(shape), torch.randn(shape)
        positions = torch.tensor([3, 0, 9, 100, 5, 5, 64])
        wanted = rope.forward_native(positions, query.clone(), key.clone())
        for got, right in zip(rope(positions, query, key), wanted, strict=True):
            assert got.shape == right.shape
            torch.testing.assert_close(got, right)


def test_the_kernel_is_stood_in_for_once(llm):
    assert not repair_rotary_embedding()

"""KVShare under tensor parallelism: two real workers that hold different heads.

All ranks must recompute the same tokens: otherwise their collectives would not fit together. A
rank chooses from the sum of all ranks' deviations, so the answers are those of one worker.
"""

import pytest

from tests.models import make_engine, tiny_llama
from tests.serve.test_serve_kvshare import PROMPTS, counter
from tests.serving import served

pytestmark = pytest.mark.serve

ARGUMENTS = ("--block-size", "32", "--max-num-seqs", "64", "--max-num-batched-tokens", "256")
BLEND = "kvshare:recompute_min=0.1,recompute_max=0.2,decode_interval=4,decode_k=8,decode_budget=0.2"
NEUTRAL = "kvshare:recompute_min=1,recompute_max=1,fix_tokens_per_step=128"
COUNTS = ("recomputed_tokens_total", "refreshed_tokens_total", "gap_tokens_total", "stored_tokens")


@pytest.fixture(scope="module")
def scope(tmp_path_factory):
    """One key for all servers: with random ones, texts would be cut into other segments in each."""
    path = tmp_path_factory.mktemp("keys") / "tenants"
    path.write_text("0123456789abcdef" * 4)
    path.chmod(0o600)
    return f"sharing_scope=tenant,tenant_header=X-Tenant,tenant_secret_file={path}"


def answer(server, prompt):
    completion = server.openai.completions.create(
        model=server.model,
        prompt=prompt,
        max_tokens=24,
        temperature=0,
        extra_headers={"X-Tenant": "one"},
        extra_body={"ignore_eos": True},
    )
    return completion.choices[0].text


def answers_and_counts(plugin, ranks):
    # One core each: on this few cores vLLM's own binding finds no place for two workers.
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    words = (*ARGUMENTS, "--tensor-parallel-size", str(ranks), "--plugin", plugin)
    with served(tiny_llama(layers=4), *words, environment=environment) as server:
        answers = [answer(server, prompt) for prompt in PROMPTS]
        counts = {name: counter(server, name) for name in COUNTS}
    return answers, counts


@pytest.fixture(scope="module")
def stock():
    """Stock vLLM's greedy answers on one rank, from an engine in this process."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    with make_engine(tiny_llama(layers=4)) as llm:
        inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        outputs = [llm.generate([one], params, use_tqdm=False)[0] for one in inputs]
    return [output.outputs[0].text for output in outputs]


def test_everything_recomputed_equals_stock_on_two_ranks(stock, scope):
    answers, counts = answers_and_counts(f"{NEUTRAL},{scope}", 2)
    assert answers == stock
    assert counts["recomputed_tokens_total"] > 0


def test_two_ranks_recompute_the_same_tokens_as_one(scope):
    one, two = (answers_and_counts(f"{BLEND},{scope}", ranks) for ranks in (1, 2))
    assert two == one
    assert two[1]["refreshed_tokens_total"] > 0
    assert two[1]["recomputed_tokens_total"] > two[1]["refreshed_tokens_total"]

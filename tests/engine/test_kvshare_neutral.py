"""KVShare's neutral setting is stock vLLM, whatever happens to requests and to stored KV."""

import pytest

from tests.engine.kvshare_engine import (
    LOGPROBS,
    NEUTRAL,
    PROMPTS,
    assert_stock,
    logprob_error,
    prompt,
    served,
    stock_outputs,
    tokens_of,
)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def neutral(stock):
    with served(NEUTRAL) as engine:
        yield engine


def test_everything_recomputed_equals_stock(neutral, stock):
    """One after the other, so that later prompts reuse the earlier ones' documents."""
    neutral.forget()
    outputs = [neutral.greedy([p], logprobs=LOGPROBS)[0] for p in PROMPTS]
    assert_stock(outputs, stock)
    assert logprob_error(outputs, stock_outputs()) < 1e-3
    cached = [output.num_cached_tokens for output in outputs]
    assert cached[0] == 0
    # (2, 0, 1) is made of what (0, 1, 2) stored, in another order.
    assert cached[1] > 0.8 * len(PROMPTS[1])
    neutral.assert_idle()


def test_everything_recomputed_equals_stock_in_a_batch(neutral, stock):
    neutral.forget()
    neutral.greedy([prompt(0, 1, 2, 3, 4)])
    assert_stock(neutral.greedy(PROMPTS), stock)
    neutral.assert_idle()


def test_a_prefix_hit_goes_before_reuse(neutral, stock):
    neutral.forget()
    neutral.greedy([prompt(0, 1)])
    [output] = neutral.greedy([PROMPTS[0]])
    assert_stock([output], stock[:1])
    neutral.assert_idle()


def test_decodes_go_on_while_a_prompt_is_blended(neutral, stock):
    """The slices are 100 tokens; the running request gets a token in each step between them."""
    neutral.forget()
    neutral.greedy([prompt(0, 1, 2)])
    first = neutral.add(PROMPTS[5], tokens=24)
    while not neutral.engine.step() and not neutral.scheduler.running:
        pass
    second = neutral.add(PROMPTS[1])
    seen, done = 0, {}
    while neutral.engine.has_unfinished_requests():
        seen += bool(neutral.worker._blends)
        for output in neutral.engine.step():
            done[output.request_id] = output.outputs[0].token_ids
    assert seen >= 3
    answers = {key.split("-")[0]: value for key, value in done.items()}
    assert answers[first.split("-")[0]] == stock[5][:24]
    assert answers[second.split("-")[0]] == stock[1][:6]
    neutral.assert_idle()


def test_an_abort_while_blending_leaks_nothing(neutral, stock):
    neutral.forget()
    neutral.greedy([prompt(0, 1, 2)])
    for steps in (0, 1, 2, 3):
        name = neutral.add(PROMPTS[1])
        for _ in range(steps):
            neutral.engine.step()
        neutral.engine.abort_request([name], internal=True)
        while neutral.engine.has_unfinished_requests():
            neutral.engine.step()
        neutral.assert_idle()
    assert_stock(neutral.greedy([PROMPTS[1]]), stock[1:2])


@pytest.mark.parametrize("mode", ["abort", "keep"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_pause_while_blending_leaks_nothing(neutral, stock, steps, mode):
    """What a server's `/pause` does: requests are aborted by the scheduler, or kept for later."""
    neutral.forget()
    neutral.greedy([prompt(0, 1, 2)])
    name = neutral.add(PROMPTS[1])
    for _ in range(steps):
        neutral.engine.step()
    assert neutral.worker._blends
    neutral.llm.sleep(level=0, mode=mode)
    neutral.engine.step()
    assert bool(neutral.worker._blends) is (mode == "keep")
    neutral.llm.wake_up(tags=["scheduling"])
    if mode == "abort":
        # An engine in this process does not tell its front about it, as a server's does.
        neutral.engine.abort_request([name], internal=True)
    answers = []
    while neutral.engine.has_unfinished_requests():
        answers += [output for output in neutral.engine.step() if output.finished]
    assert tokens_of(answers) == ([] if mode == "abort" else [stock[1][:6]])
    neutral.assert_idle()
    assert_stock(neutral.greedy([PROMPTS[1]]), stock[1:2])


@pytest.mark.parametrize("fault", ["lost", "truncated", "other dtype"])
def test_damaged_kv_is_computed_again(neutral, stock, fault):
    neutral.forget()
    neutral.greedy([prompt(0, 1, 2)])
    stored = neutral.worker.kitchen.payloads._stored
    # Where the cuts fall depends on the server's key; there may be one segment only.
    key = max(stored)
    if fault == "lost":
        neutral.worker.kitchen.payloads.forget(key)
    elif fault == "truncated":
        neutral.worker.kitchen.payloads.bytes -= stored[key][:, :, 5:].nbytes
        stored[key] = stored[key][:, :, :5]
    else:
        neutral.worker.kitchen.payloads.bytes += stored[key].nbytes
        stored[key] = stored[key].double()
    assert_stock(neutral.greedy([PROMPTS[1]]), stock[1:2])
    assert key not in neutral.side.index
    assert_stock(neutral.greedy([PROMPTS[3]]), stock[3:4])
    neutral.assert_idle()


def test_kv_that_is_lost_between_slices_is_computed_again(neutral, stock):
    neutral.forget()
    neutral.greedy([prompt(0, 1, 2)])
    neutral.add(PROMPTS[1])
    neutral.engine.step()
    assert neutral.worker._blends
    neutral.worker.kitchen.payloads.forget(sorted(neutral.worker.kitchen.payloads._stored)[0])
    answers = []
    while neutral.engine.has_unfinished_requests():
        answers += [o for o in neutral.engine.step() if o.finished]
    assert_stock(answers, stock[1:2])
    neutral.assert_idle()


def test_a_loss_changes_nothing_for_who_had_read_the_segment(neutral, stock):
    neutral.forget()
    neutral.greedy([prompt(0, 1, 2)])
    neutral.add(PROMPTS[1], tokens=24)
    while not neutral.scheduler.running:
        neutral.engine.step()
    [reader] = neutral.side._states.values()
    for key in sorted(neutral.worker.kitchen.payloads._stored):
        neutral.worker.kitchen.payloads.forget(key)
    neutral.add(PROMPTS[3])
    answers = {}
    while neutral.engine.has_unfinished_requests():
        for output in neutral.engine.step():
            if output.finished:
                answers[len(output.prompt_token_ids)] = output.outputs[0].token_ids
        others = [s for s in neutral.side._states.values() if s is not reader]
        if any(state.declined for state in others):
            # Its KV is blended, whatever became of the sources: it must not pass for exact.
            assert reader.used is not None and not reader.declined
    assert answers[len(PROMPTS[1])] == stock[1][:24]
    assert answers[len(PROMPTS[3])] == stock[3][:6]
    # The index still names what was lost and not asked for again.
    neutral.forget()


def test_requests_can_opt_out(neutral):
    neutral.forget()
    params = {"kv_transfer_params": {"kvshare": {"store": False}}}
    neutral.greedy([prompt(0, 1)], extra=params)
    neutral.step_once()
    assert len(neutral.side.index) == 0
    neutral.greedy([prompt(0, 1)], extra=None)
    [output] = neutral.greedy(
        [prompt(1, 0)], extra={"kv_transfer_params": {"kvshare": {"reuse": False}}}
    )
    assert output.num_cached_tokens == 0


def test_another_salt_finds_nothing(neutral):
    neutral.forget()
    neutral.greedy([prompt(0, 1, 2)], salt="alice")
    assert neutral.greedy([prompt(2, 0, 1)], salt="bob")[0].num_cached_tokens == 0
    assert neutral.greedy([prompt(2, 0, 1)])[0].num_cached_tokens == 0
    assert neutral.greedy([prompt(1, 2, 0)], salt="alice")[0].num_cached_tokens > 0
    neutral.assert_idle()

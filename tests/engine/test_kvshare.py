"""KVShare on the real engine: its neutral setting is stock, and nothing is lost or leaked."""

from contextlib import contextmanager

import numpy as np
import pytest

import vllm_plugins
from tests.models import make_engine, scheduler_of, tiny_llama

pytestmark = pytest.mark.engine

BLOCK = 32
ENGINE = {"block_size": BLOCK, "max_num_batched_tokens": 256, "max_num_seqs": 8}
NEUTRAL = "kvshare:recompute_min=1,recompute_max=1,fix_tokens_per_step=100"


def documents(count, length=150, seed=0):
    """Texts of about equal length without anything in common."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 500, length + 7 * i).tolist() for i in range(count)]


DOCS = documents(5)


def prompt(*order, question=7):
    return [token for i in order for token in DOCS[i]] + [question, question + 1, question + 2]


ORDERS = [(0, 1, 2), (2, 0, 1), (3, 1), (1, 3, 0), (4, 2, 3, 0), (0,), (2, 4)]
PROMPTS = [prompt(*order, question=9 * i + 2) for i, order in enumerate(ORDERS)]


class Served:
    """An engine with access to what KVShare keeps in it."""

    def __init__(self, llm) -> None:
        self.llm, self.engine = llm, llm.llm_engine
        self.scheduler = scheduler_of(llm)
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.free = self.pool.get_num_free_blocks()
        self.ids = 0

    @property
    def side(self):
        return self.scheduler.connector.scheduler

    @property
    def worker(self):
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        return get_kv_transfer_group().worker

    def greedy(self, prompts, salt=None, tokens=6, extra=None):
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)
        inputs = [{"prompt_token_ids": p} | ({"cache_salt": salt} if salt else {}) for p in prompts]
        return self.llm.generate(inputs, params, use_tqdm=False)

    def add(self, prompt_ids, tokens=6):
        from vllm import SamplingParams

        self.ids += 1
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return self.engine.add_request(f"r{self.ids}", {"prompt_token_ids": prompt_ids}, params)

    def forget(self):
        """Empty the prefix cache and the store."""
        assert self.llm.reset_prefix_cache(reset_connector=True)
        self.step_once()
        assert len(self.side.index) == len(self.worker.kitchen.payloads) == 0

    def step_once(self):
        # Orders travel with a step, and a step needs a request.
        self.greedy([[1, 2, 3]], tokens=1)

    def assert_idle(self):
        """Nothing is held for anybody, and scheduler and worker agree on what is stored."""
        self.step_once()
        assert self.pool.get_num_free_blocks() == self.free
        assert not self.side._states
        assert not self.worker._blends
        index, payloads = self.side.index, self.worker.kitchen.payloads
        assert all(index.get(key).references == 0 for key in index)
        assert set(index) == set(payloads._stored)
        assert payloads.bytes == sum(p.nbytes for p in payloads._stored.values())
        per_token = self.worker.kitchen.pages.bytes_per_token
        assert payloads.bytes == index.used * per_token


@contextmanager
def served(spec, **arguments):
    extra = vllm_plugins.engine_args(spec) if spec else {}
    with make_engine(tiny_llama(layers=4), **ENGINE | arguments, **extra) as llm:
        yield Served(llm) if spec else llm


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def stock():
    """Stock vLLM's greedy answers to `PROMPTS`."""
    from vllm import SamplingParams

    with served(None) as llm:
        params = SamplingParams(temperature=0, max_tokens=96, ignore_eos=True)
        inputs = [{"prompt_token_ids": p} for p in PROMPTS]
        outputs = [llm.generate([i], params, use_tqdm=False)[0] for i in inputs]
    return tokens_of(outputs)


@pytest.fixture(scope="module")
def neutral(stock):
    with served(NEUTRAL) as engine:
        yield engine


def assert_stock(outputs, stock, tokens=6):
    assert tokens_of(outputs) == [answer[:tokens] for answer in stock]


def test_everything_recomputed_equals_stock(neutral, stock):
    """One after the other, so that later prompts reuse the earlier ones' documents."""
    neutral.forget()
    outputs = [neutral.greedy([p])[0] for p in PROMPTS]
    assert_stock(outputs, stock)
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
        neutral.engine.abort_request([name])
        while neutral.engine.has_unfinished_requests():
            neutral.engine.step()
        neutral.assert_idle()
    assert_stock(neutral.greedy([PROMPTS[1]]), stock[1:2])


@pytest.mark.parametrize("fault", ["lost", "truncated", "other dtype"])
def test_damaged_kv_is_computed_again(neutral, stock, fault):
    neutral.forget()
    neutral.greedy([prompt(0, 1, 2)])
    stored = neutral.worker.kitchen.payloads._stored
    key = sorted(stored)[1]
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


def test_preempted_requests_are_planned_again_and_lose_no_block(stock):
    """Room for two prompts, but not for their answers too."""
    with served(NEUTRAL, num_gpu_blocks_override=35, max_model_len=800) as engine:
        engine.greedy([prompt(0, 1, 2)])
        preempted = 0
        for p in PROMPTS[:4]:
            engine.add(p, tokens=96)
        answers = {}
        while engine.engine.has_unfinished_requests():
            for output in engine.engine.step():
                if output.finished:
                    answers[output.request_id.split("-")[0]] = output.outputs[0].token_ids
            preempted += sum(r.num_preemptions > 0 for r in engine.scheduler.requests.values())
        assert preempted
        assert [answers[f"r{i}"] for i in range(1, 5)] == stock[:4]
        engine.assert_idle()


@pytest.fixture(scope="module")
def blend():
    with served("kvshare:fix_tokens_per_step=256") as engine:
        yield engine


def test_what_is_not_shared_is_answered_as_by_stock(blend, stock):
    blend.forget()
    outputs = blend.greedy([PROMPTS[0]])
    assert_stock(outputs, stock[:1])
    assert outputs[0].num_cached_tokens == 0


def test_approximate_blocks_never_enter_the_exact_prefix_cache(blend, stock):
    blend.forget()
    blend.greedy([prompt(0, 1, 2)])
    [mixed] = blend.greedy([PROMPTS[1]])
    assert mixed.num_cached_tokens > 0
    # The same prompt again, without reuse: only the prefix cache could help it, and must not.
    off = {"kv_transfer_params": {"kvshare": {"reuse": False}}}
    [plain] = blend.greedy([PROMPTS[1]], extra=off)
    assert plain.num_cached_tokens == 0
    assert_stock([plain], stock[1:2])
    blend.assert_idle()


def test_the_exact_head_of_a_blended_prompt_stays_shared(blend):
    blend.forget()
    blend.greedy([prompt(0, 1, 2)])
    head = len(DOCS[0]) // BLOCK * BLOCK
    blend.greedy([prompt(0, 2, 1)])
    off = {"kv_transfer_params": {"kvshare": {"reuse": False}}}
    [again] = blend.greedy([prompt(0, 2, 1)], extra=off)
    assert again.num_cached_tokens == head


def test_only_the_budget_is_recomputed(blend):
    blend.forget()
    blend.greedy([prompt(0, 1, 2)])
    counts = []
    worker = blend.worker
    finish = worker._finish
    worker._finish = lambda b: (counts.append((b.recomputed, len(b.chosen))), finish(b))
    try:
        blend.greedy([PROMPTS[1]])
    finally:
        del worker._finish
    [(recomputed, reused)] = counts
    assert 0.05 * reused <= recomputed <= 0.15 * reused + 1


def test_identical_context_is_exact_without_recomputation(stock):
    with served("kvshare:mode=exact_only") as engine:
        engine.greedy([prompt(0, 1, 2)])
        engine.llm.reset_prefix_cache()
        outputs = engine.greedy([PROMPTS[0]])
        assert outputs[0].num_cached_tokens >= len(PROMPTS[0]) - 2 * BLOCK
        assert_stock(outputs, stock[:1])
        # Other orders share nothing but the prefix.
        [other] = engine.greedy([PROMPTS[1]])
        assert other.num_cached_tokens == 0
        assert_stock([other], stock[1:2])
        engine.assert_idle()


def test_the_store_is_bounded_and_evicts(stock):
    """Room for about 200 tokens, asked to hold many times that."""
    gib = 200 * 4 * 2 * 2 * 32 * 4 / 2**30
    with served(f"kvshare:recompute_min=1,recompute_max=1,host_gib={gib:.9f}") as engine:
        assert engine.side.index.capacity == pytest.approx(200, abs=1)
        for p, answer in zip(PROMPTS, stock, strict=True):
            assert_stock(engine.greedy([p]), [answer])
            assert engine.side.index.used <= 200
        engine.assert_idle()

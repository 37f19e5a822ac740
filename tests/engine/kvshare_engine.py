"""The real engine with KVShare on, and access to what it keeps there."""

from contextlib import contextmanager
from functools import cache

import numpy as np

import vllm_plugins
from tests.models import make_engine, scheduler_of, tiny_llama

BLOCK = 32
ENGINE = {"block_size": BLOCK, "max_num_batched_tokens": 256, "max_num_seqs": 64}
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

# Takes nothing that is stored, and what is exact of the prefix cache.
EXACT = {"kv_transfer_params": {"kvshare": {"reuse": False}}}

# Likeliest tokens at each place whose log-probabilities are compared.
LOGPROBS = 20


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

    def greedy(self, prompts, salt=None, tokens=6, extra=None, logprobs=None):
        from vllm import SamplingParams

        params = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            extra_args=extra,
            logprobs=logprobs,
        )
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
        assert not self.side._chains._blending
        assert len(self.side._chains._roots) <= self.pool.num_gpu_blocks
        assert not self.worker._blends
        assert not self.worker._stale
        index, payloads = self.side.index, self.worker.kitchen.payloads
        assert all(index.get(key).references == 0 for key in index)
        assert set(index) == set(payloads._stored)
        assert payloads.bytes == sum(p.nbytes for p in payloads._stored.values())
        per_token = self.worker.kitchen.pages.bytes_per_token
        assert payloads.bytes == index.used * per_token


@contextmanager
def served(spec, model=None, **arguments):
    """An engine with plug-ins, named as behind `--plugin` on a command line."""
    extra = vllm_plugins.engine_args(*spec.split()) if spec else {}
    with make_engine(model or tiny_llama(layers=4), **ENGINE | arguments, **extra) as llm:
        yield Served(llm) if spec else llm


def whole(length):
    """Tokens of full blocks that a prompt can find, whose last token is computed."""
    return (length - 1) // BLOCK * BLOCK


@contextmanager
def plans(engine):
    """The requests whose KV is put together meanwhile, with the tokens that were promised last."""
    found, admitted = {}, engine.side.admitted

    def note(request, promised):
        if promised:
            found[request.request_id] = promised
        admitted(request, promised)

    engine.side.admitted = note
    try:
        yield found
    finally:
        del engine.side.admitted


@contextmanager
def after_a_blend(engine):
    """The engine, which has computed one prompt and blended another; and who is blended next."""
    engine.forget()
    engine.greedy([prompt(0, 1, 2)])
    assert engine.greedy([PROMPTS[1]])[0].num_cached_tokens > 0
    with plans(engine) as put_together:
        yield engine, put_together
    engine.assert_idle()


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@cache
def stock_outputs():
    """Stock vLLM's greedy answers to `PROMPTS`, with the log-probabilities of some tokens.

    No other engine may be up at the first call.
    """
    from vllm import SamplingParams

    with served(None) as llm:
        params = SamplingParams(temperature=0, max_tokens=96, ignore_eos=True, logprobs=LOGPROBS)
        inputs = [{"prompt_token_ids": p} for p in PROMPTS]
        return [llm.generate([i], params, use_tqdm=False)[0] for i in inputs]


def stock_answers():
    """The token ids of `stock_outputs`."""
    return tokens_of(stock_outputs())


def assert_stock(outputs, stock, tokens=6):
    assert tokens_of(outputs) == [answer[:tokens] for answer in stock]


def logprob_error(outputs, references):
    """Largest difference of a log-probability, over tokens that are likely in both."""
    worst = 0.0
    for output, reference in zip(outputs, references, strict=True):
        for ours, theirs in zip(
            output.outputs[0].logprobs, reference.outputs[0].logprobs, strict=False
        ):
            common = ours.keys() & theirs.keys()
            # The last of them may be as likely as the first that is left out.
            assert len(common) > LOGPROBS / 2
            worst = max(worst, *(abs(ours[t].logprob - theirs[t].logprob) for t in common))
    return worst

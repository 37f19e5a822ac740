"""Which chain of block hashes a request is on, with vLLM's own requests and blocks."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    make_block_hash_with_group_id,
)
from vllm.v1.request import Request

from vllm_plugins.kv_connectors.kvshare.tainted import Root, TaintedChains

BLOCK, BLOCKS, FAR = 16, 8, 10**6


class Engine:
    """Block hashes as the engine computes them, and a pool in which some are cached."""

    def __init__(self):
        init_none_hash(sha256)
        self.pool = BlockPool(BLOCKS, True, BLOCK)
        self.chains = TaintedChains(self.pool)
        self.names = 0

    def request(self, tokens, salt=None):
        self.names += 1
        hasher = get_request_block_hasher(BLOCK, sha256)
        return Request(
            f"r{self.names}", tokens, SamplingParams(), None, block_hasher=hasher, cache_salt=salt
        )

    def redirected(self, request, cached, reach=FAR, root=None):
        """Return whether a request is looked up again, and the root that it has by then."""
        state = SimpleNamespace(request=request, cached=cached, root=root)
        return self.chains.redirects(state, reach), state.root

    def cache(self, digest):
        """Let the prefix cache hold a block."""
        [block] = self.pool.get_new_blocks(1)
        name = make_block_hash_with_group_id(digest, 0)
        self.pool.cached_block_hash_to_block.insert(name, block)


@pytest.fixture
def engine():
    return Engine()


PROMPT = list(range(5 * BLOCK + 3))


def test_a_request_that_is_blended_leaves_the_exact_chain(engine):
    exact = engine.request(PROMPT).block_hashes
    blended = engine.request(PROMPT)
    engine.chains.leave(blended, 2 * BLOCK + 5, 5 * BLOCK, 0)
    assert blended.block_hashes[:2] == exact[:2]
    assert len(blended.block_hashes) == len(exact) == 5
    assert not set(blended.block_hashes[2:]) & set(exact)


def test_a_later_one_goes_the_same_way_while_the_block_is_cached(engine):
    blended = engine.request(PROMPT)
    engine.chains.leave(blended, 2 * BLOCK, 5 * BLOCK, 3)
    later = engine.request([*PROMPT, *range(40)])
    exact = list(later.block_hashes)
    # Its block is not complete yet; then it has been given to others.
    assert engine.redirected(later, 2 * BLOCK) == (True, None)
    engine.chains.settle([blended.request_id])
    assert engine.redirected(later, 2 * BLOCK) == (False, None)
    engine.cache(blended.block_hashes[2])
    for elsewhere in (0, BLOCK, 3 * BLOCK, len(exact) * BLOCK):
        assert engine.redirected(later, elsewhere) == (False, None)
    assert later.block_hashes == exact
    again, root = engine.redirected(later, 2 * BLOCK)
    assert again
    assert root == Root(blended.block_hashes[2], 2 * BLOCK, 5 * BLOCK, 3, blended.request_id)
    assert later.block_hashes[: len(blended.block_hashes)] == blended.block_hashes
    assert len(later.block_hashes) == len(exact)
    # It is looked up once more, with what the prefix cache holds for it now.
    assert engine.redirected(later, 5 * BLOCK) == (False, None)


def test_a_chain_may_be_left_again_further_on(engine):
    first = engine.request(PROMPT)
    engine.chains.leave(first, BLOCK, 5 * BLOCK, 1)
    longer = [*PROMPT, *range(200, 300)]
    second = engine.request(longer)
    engine.cache(first.block_hashes[1])
    assert engine.redirected(second, BLOCK)[0]
    engine.chains.leave(second, 6 * BLOCK, 9 * BLOCK, 0)
    engine.cache(second.block_hashes[6])
    third = engine.request(longer)
    root = engine.redirected(third, BLOCK)[1]
    again, root = engine.redirected(third, 6 * BLOCK, root=root)
    # Of what it has by then, the first block is the first root's, and so is the generation.
    assert again and (root.position, root.generation) == (BLOCK, 1)
    assert third.block_hashes == second.block_hashes


def test_who_shares_little_of_what_is_being_blended_does_not_wait(engine):
    blended = engine.request(PROMPT)
    engine.chains.leave(blended, BLOCK, 5 * BLOCK, 0)
    waits = [engine.redirected(engine.request(PROMPT), BLOCK, n * BLOCK)[0] for n in (0, 2, 3, 5)]
    assert waits == [False, False, True, True]
    # What is there is taken, unless the request is not to be blended at all.
    engine.cache(blended.block_hashes[1])
    waits = [engine.redirected(engine.request(PROMPT), BLOCK, n * BLOCK)[0] for n in (0, 2)]
    assert waits == [False, True]


def test_another_salt_or_another_text_finds_nothing(engine):
    blended = engine.request(PROMPT, salt="alice")
    engine.chains.leave(blended, 2 * BLOCK, 5 * BLOCK, 0)
    engine.cache(blended.block_hashes[2])
    for other in (engine.request(PROMPT), engine.request(PROMPT, salt="bob"),
                  engine.request([9, *PROMPT[1:]], salt="alice")):  # fmt: skip
        assert engine.redirected(other, 2 * BLOCK) == (False, None)
    assert engine.redirected(engine.request(PROMPT, salt="alice"), 2 * BLOCK)[0]


def test_no_more_roots_are_remembered_than_there_are_blocks(engine):
    requests = [engine.request([i] * 3 * BLOCK) for i in range(BLOCKS + 2)]
    for request in requests:
        engine.chains.leave(request, BLOCK, 3 * BLOCK, 0)
    assert len(engine.chains._roots) == BLOCKS
    for i, request in ((0, requests[0]), (BLOCKS + 1, requests[-1])):
        engine.cache(request.block_hashes[1])
        assert engine.redirected(engine.request([i] * 3 * BLOCK), BLOCK)[0] == (i > 0)
    engine.chains.forget()
    assert not engine.redirected(engine.request([BLOCKS + 1] * 3 * BLOCK), BLOCK)[0]


def test_what_ends_before_its_first_block_is_full_has_no_chain(engine):
    short = engine.request(PROMPT[: BLOCK + 3])
    engine.chains.leave(short, BLOCK + 1, 2 * BLOCK, 0)
    assert not engine.chains._roots
    assert not engine.redirected(short, BLOCK)[0]

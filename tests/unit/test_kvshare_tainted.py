"""Which chain of block hashes a request is on, with vLLM's own requests and blocks."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    get_request_block_hasher,
    init_none_hash,
    make_block_hash_with_group_id,
)
from vllm.v1.request import Request

from tests.unit.test_kvshare_scheduler_side import Server
from vllm_plugins.kv_connectors.kvshare.request_state import RequestState, text_of
from vllm_plugins.kv_connectors.kvshare.tainted import Root, TaintedChains

BLOCK, BLOCKS, FAR = 16, 8, 10**6


class Engine:
    """Block hashes as the engine computes them, and a pool in which some are cached."""

    def __init__(self):
        init_none_hash(sha256)
        self.pool = BlockPool(BLOCKS, True, BLOCK)
        self.chains = TaintedChains(self.pool)
        self.states = {}

    def request(self, tokens, salt=None):
        name = f"r{len(self.states)}"
        hasher = get_request_block_hasher(BLOCK, sha256)
        request = Request(
            name, tokens, SamplingParams(), None, block_hasher=hasher, cache_salt=salt
        )
        self.states[name] = RequestState(request, text_of(request), b"domain")
        return request

    def state(self, request):
        return self.states[request.request_id]

    def leave(self, request, *where):
        self.chains.leave(self.state(request), *where)

    def redirected(self, request, cached, reach=FAR):
        """Return whether a request is looked up again, and the root that it has by then."""
        state = self.state(request)
        state.cached = cached
        return self.chains.redirects(state, reach), state.root

    def cache(self, digest):
        """Let the prefix cache hold a block."""
        [block] = self.pool.get_new_blocks(1)
        name = make_block_hash_with_group_id(digest, 0)
        self.pool.cached_block_hash_to_block.insert(name, block)
        return block


@pytest.fixture
def engine():
    return Engine()


PROMPT = list(range(5 * BLOCK + 3))


def test_a_request_that_is_blended_leaves_the_exact_chain(engine):
    exact = engine.request(PROMPT).block_hashes
    blended = engine.request(PROMPT)
    engine.leave(blended, 2 * BLOCK + 5, 5 * BLOCK, 0)
    assert blended.block_hashes[:2] == exact[:2]
    assert len(blended.block_hashes) == len(exact) == 5
    assert not set(blended.block_hashes[2:]) & set(exact)


def test_a_later_one_goes_the_same_way_while_the_block_is_cached(engine):
    blended = engine.request(PROMPT)
    engine.leave(blended, 2 * BLOCK, 5 * BLOCK, 3)
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
    assert root == Root(blended.block_hashes[2], 2 * BLOCK, 5 * BLOCK, 3)
    assert later.block_hashes[: len(blended.block_hashes)] == blended.block_hashes
    assert len(later.block_hashes) == len(exact)
    # It is looked up once more, with what the prefix cache holds for it now.
    assert engine.redirected(later, 5 * BLOCK) == (False, root)


def test_a_chain_may_be_left_again_further_on(engine):
    first = engine.request(PROMPT)
    engine.leave(first, BLOCK, 5 * BLOCK, 1)
    longer = [*PROMPT, *range(200, 300)]
    second = engine.request(longer)
    engine.cache(first.block_hashes[1])
    assert engine.redirected(second, BLOCK)[0]
    engine.leave(second, 6 * BLOCK, 9 * BLOCK, 0)
    engine.cache(second.block_hashes[6])
    third = engine.request(longer)
    assert engine.redirected(third, BLOCK)[0]
    again, root = engine.redirected(third, 6 * BLOCK)
    # Of what it has by then, the first block is the first root's, and so is the generation.
    assert again and (root.position, root.generation) == (BLOCK, 1)
    assert third.block_hashes == second.block_hashes


def test_who_shares_little_of_what_is_being_blended_does_not_wait(engine):
    blended = engine.request(PROMPT)
    engine.leave(blended, BLOCK, 5 * BLOCK, 0)
    waits = [engine.redirected(engine.request(PROMPT), BLOCK, n * BLOCK)[0] for n in (0, 2, 3, 5)]
    assert waits == [False, False, True, True]
    # What is there is taken, unless the request is not to be blended at all.
    engine.cache(blended.block_hashes[1])
    waits = [engine.redirected(engine.request(PROMPT), BLOCK, n * BLOCK)[0] for n in (0, 2)]
    assert waits == [False, True]


def test_another_salt_or_another_text_finds_nothing(engine):
    blended = engine.request(PROMPT, salt="alice")
    engine.leave(blended, 2 * BLOCK, 5 * BLOCK, 0)
    engine.cache(blended.block_hashes[2])
    for other in (engine.request(PROMPT), engine.request(PROMPT, salt="bob"),
                  engine.request([9, *PROMPT[1:]], salt="alice")):  # fmt: skip
        assert engine.redirected(other, 2 * BLOCK) == (False, None)
    assert engine.redirected(engine.request(PROMPT, salt="alice"), 2 * BLOCK)[0]


def test_no_more_roots_are_remembered_than_there_are_blocks(engine):
    requests = [engine.request([i] * 3 * BLOCK) for i in range(BLOCKS + 2)]
    for request in requests:
        engine.leave(request, BLOCK, 3 * BLOCK, 0)
    engine.chains.settle(engine.states)
    assert len(engine.chains._roots) == BLOCKS
    for i, request in ((0, requests[0]), (BLOCKS + 1, requests[-1])):
        engine.cache(request.block_hashes[1])
        assert engine.redirected(engine.request([i] * 3 * BLOCK), BLOCK)[0] == (i > 0)
    engine.chains.forget([])
    assert not engine.redirected(engine.request([BLOCKS + 1] * 3 * BLOCK), BLOCK)[0]


def test_what_ends_before_its_first_block_is_full_has_no_chain(engine):
    short = engine.request(PROMPT[: BLOCK + 3])
    engine.leave(short, BLOCK + 1, 2 * BLOCK, 0)
    assert not engine.chains._roots
    assert not engine.redirected(short, BLOCK)[0]


def test_who_waits_for_what_begins_with_exact_kv_from_the_store(engine):
    """Its root is behind the hit of who comes meanwhile, on the same chain."""
    engine.leave(engine.request(PROMPT), 2 * BLOCK, 5 * BLOCK, 0)
    assert engine.redirected(engine.request(PROMPT), 0) == (True, None)
    assert engine.redirected(engine.request(PROMPT), BLOCK) == (True, None)
    # It has more than the root is to give, or less than half of that, or another text.
    for tokens, cached, reach in (
        (PROMPT, 3 * BLOCK, FAR),
        (PROMPT, 0, 2 * BLOCK),
        ([*PROMPT[: 2 * BLOCK], 999, *PROMPT[2 * BLOCK + 1 :]], 0, FAR),
        (PROMPT[: 2 * BLOCK + 3], 0, FAR),
    ):
        assert engine.redirected(engine.request(tokens), cached, reach) == (False, None)


def test_who_finds_nothing_where_it_has_turned_turns_back(engine):
    first, second = engine.request(PROMPT), engine.request(PROMPT)
    exact = list(second.block_hashes)
    engine.leave(first, BLOCK, 5 * BLOCK, 0)
    block = engine.cache(first.block_hashes[1])
    engine.chains.settle([first.request_id])
    assert engine.redirected(second, BLOCK)[0]
    assert second.block_hashes == first.block_hashes
    engine.pool.cached_block_hash_to_block.pop(
        make_block_hash_with_group_id(first.block_hashes[1], 0), block.block_id
    )
    assert engine.redirected(second, BLOCK) == (False, None)
    assert second.block_hashes == exact
    # It is blended in its turn, and others find that where the exact chain is left.
    engine.leave(second, BLOCK, 5 * BLOCK, 0)
    engine.cache(second.block_hashes[1])
    third = engine.request(PROMPT)
    assert engine.redirected(third, BLOCK)[0]
    assert third.block_hashes == second.block_hashes


def test_of_two_turns_only_that_is_undone_of_which_nothing_is_left(engine):
    longer = [*PROMPT, *range(200, 300)]
    first, second, third = (engine.request(longer) for _ in range(3))
    engine.leave(first, BLOCK, 5 * BLOCK, 1)
    engine.cache(first.block_hashes[1])
    assert engine.redirected(second, BLOCK)[0]
    engine.leave(second, 6 * BLOCK, 9 * BLOCK, 0)
    engine.cache(second.block_hashes[6])
    assert engine.redirected(third, BLOCK)[0]
    assert engine.redirected(third, 6 * BLOCK)[0]
    engine.chains.forget([])
    assert not engine.redirected(third, 6 * BLOCK)[0]
    assert third.block_hashes == first.block_hashes
    assert engine.state(third).root is not None
    assert engine.redirected(third, BLOCK) == (False, None)
    assert third.block_hashes == engine.request(longer).block_hashes


def test_who_is_not_blended_after_all_is_exact_again(engine):
    owner, other = engine.request(PROMPT), engine.request(PROMPT)
    engine.state(owner).cached = BLOCK
    engine.leave(owner, 2 * BLOCK, 5 * BLOCK, 0)
    assert engine.redirected(other, BLOCK)[0]
    engine.chains.fail(engine.state(owner))
    assert owner.block_hashes == other.block_hashes
    assert not engine.redirected(other, BLOCK)[0]


def test_when_all_is_forgotten_who_has_turned_and_has_no_blocks_turns_back(engine):
    owner, waits, runs = (engine.request(PROMPT) for _ in range(3))
    exact = list(waits.block_hashes)
    engine.leave(owner, BLOCK, 5 * BLOCK, 0)
    engine.cache(owner.block_hashes[1])
    assert all(engine.redirected(later, BLOCK)[0] for later in (waits, runs))
    owner.num_computed_tokens = runs.num_computed_tokens = len(PROMPT)
    engine.chains.forget(engine.states.values())
    assert waits.block_hashes == exact and engine.state(waits).root is None
    assert runs.block_hashes == owner.block_hashes != exact
    assert engine.state(runs).root is not None
    assert engine.redirected(waits, BLOCK) == (False, None)


def test_who_differs_soon_behind_the_root_does_not_wait(engine):
    engine.leave(engine.request(PROMPT), BLOCK, 5 * BLOCK, 0)
    alike = {at: [*PROMPT[:at], 999, *PROMPT[at + 1 :]] for at in (2 * BLOCK, 3 * BLOCK)}
    waits = {at: engine.redirected(engine.request(other), BLOCK)[0] for at, other in alike.items()}
    assert waits == {2 * BLOCK: False, 3 * BLOCK: True}


def test_who_turns_back_takes_what_is_exact_there_by_now(engine):
    owner, turned = engine.request(PROMPT), engine.request(PROMPT)
    exact = list(turned.block_hashes)
    engine.leave(owner, BLOCK, 5 * BLOCK, 0)
    engine.cache(owner.block_hashes[1])
    assert engine.redirected(turned, BLOCK)[0]
    engine.chains.forget([engine.state(owner)])
    engine.cache(exact[1])
    assert engine.redirected(turned, BLOCK) == (True, None)
    assert turned.block_hashes == exact
    # The look-up may find no more, as where that block ends the prompt.
    assert engine.redirected(turned, BLOCK) == (False, None)


def test_without_a_prefix_cache_nobody_waits_for_what_is_never_there(engine):
    engine.pool.enable_caching = False
    engine.leave(engine.request(PROMPT), BLOCK, 5 * BLOCK, 0)
    assert engine.redirected(engine.request(PROMPT), BLOCK) == (False, None)


def test_a_plan_is_of_the_hit_that_there_is_by_now():
    """As long as before, but found where blended blocks are."""
    server = Server()
    document = server.text(400)
    server.serve(server.request(document))
    waits = server.request([*server.text(64), *document, 1, 2, 3])
    promised = server.side.promise(waits, 32)
    state = server.side._states[waits.request_id]
    assert promised > 300 and state.planned.behind == -1
    state.root = Root(BlockHash(b"root"), 16, 32, 2)
    assert server.side.promise(waits, 32) == promised
    assert state.planned.behind == 2

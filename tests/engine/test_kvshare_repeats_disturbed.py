"""Who follows a blended prompt when something comes between: a loss, a preemption, an eviction."""

import secrets

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from tests.engine.kvshare_engine import (
    EXACT,
    NEUTRAL,
    PROMPTS,
    after_a_blend,
    assert_stock,
    served,
    tokens_of,
    whole,
)
from vllm_plugins.kv_connectors.kvshare.tenancy import OperatorOrders, canonical_salt

pytestmark = pytest.mark.engine

KEY = secrets.token_bytes(32).hex()
# Long enough to be decoding when the others come.
TOKENS = 24


@pytest.fixture(scope="module")
def neutral(stock, tmp_path_factory):
    key = tmp_path_factory.mktemp("keys") / "operator"
    key.write_text(KEY + "\n")
    key.chmod(0o600)
    with served(f"{NEUTRAL},operator_key_file={key}") as engine:
        yield engine


@pytest.fixture
def blended(neutral):
    with after_a_blend(neutral) as found:
        yield found


def step_until(engine, happened):
    """Step until something has happened; it has to."""
    for _ in range(50):
        if happened():
            return
        engine.engine.step()
    pytest.fail("it did not happen")


def answers(engine):
    """Serve all requests to the end and return their answers, the earliest first."""
    done = {}
    while engine.engine.has_unfinished_requests():
        for output in engine.engine.step():
            if output.finished:
                done[int(output.request_id.split("-")[0].removeprefix("r"))] = output
    return [done[number] for number in sorted(done)]


def state_of(engine, name):
    return engine.side._states[name]


def assert_exact(engine, text):
    """All of a prompt's KV is where exact requests look for it."""
    [output] = engine.greedy([text], extra=EXACT)
    assert output.num_cached_tokens == whole(len(text))


def assert_found_again(engine, put_together, number, stock):
    """Who repeats a prompt that was blended finds all of it."""
    put_together.clear()
    [output] = engine.greedy([PROMPTS[number]])
    assert not put_together
    assert output.num_cached_tokens == whole(len(PROMPTS[number]))
    assert_stock([output], stock[number : number + 1])


# --- A load that fails ---


@pytest.mark.parametrize("fault", ["truncated", "one lost", "all lost"])
def test_who_waits_for_a_load_that_fails_has_what_is_computed_instead(blended, stock, fault):
    engine, put_together = blended
    payloads = engine.worker.kitchen.payloads
    if fault == "truncated":
        for key, stored in payloads._stored.items():
            payloads.bytes -= stored[:, :, 5:].nbytes
            payloads._stored[key] = stored[:, :, :5]
    owner, *_ = (engine.add(PROMPTS[4], tokens=TOKENS) for _ in range(3))
    step_until(engine, lambda: put_together)
    if fault != "truncated":
        # Some of its slices are done by now, and none of the others has blocks.
        assert set(engine.side._chains._blending) == {owner}
        keys = sorted(segment.key for segment in state_of(engine, owner).pinned)
        for key in keys[:1] if fault == "one lost" else keys:
            payloads.forget(key)
    step_until(engine, lambda: state_of(engine, owner).declined)
    assert not engine.side._chains._blending
    done = answers(engine)
    assert tokens_of(done) == [stock[4][:TOKENS]] * 3
    # It fills the steps until its prompt is computed, and that is exact.
    assert set(put_together) == {owner}
    assert [one.num_cached_tokens for one in done[1:]] == [whole(len(PROMPTS[4]))] * 2
    assert_exact(engine, PROMPTS[4])
    # The index still names what was lost and not asked for again.
    engine.forget()


# --- Preemption ---


def preempt(engine, *, keep_blocks):
    """Preempt all that run; what they have computed stays in the prefix cache, or does not."""
    with pytest.MonkeyPatch.context() as patch:
        if keep_blocks:
            manager = engine.scheduler.kv_cache_manager
            patch.setattr(manager, "reset_prefix_cache", lambda: True)
        engine.scheduler.reset_prefix_cache(reset_running_requests=True)


def test_who_is_being_blended_is_not_preempted_with_the_others(blended, stock):
    """vLLM says so, having preempted the others."""
    engine, put_together = blended
    running = engine.add(PROMPTS[5], tokens=TOKENS)
    step_until(engine, lambda: engine.scheduler.running)
    owner, _ = (engine.add(PROMPTS[4], tokens=TOKENS) for _ in range(2))
    step_until(engine, lambda: owner in put_together)
    with pytest.raises(RuntimeError, match="waiting for remote KV transfer"):
        preempt(engine, keep_blocks=False)
    assert owner in engine.side._chains._blending
    done = tokens_of(answers(engine))
    assert done == [stock[5][:TOKENS], stock[4][:TOKENS], stock[4][:TOKENS]]
    assert set(put_together) <= {running, owner}
    assert_found_again(engine, put_together, 4, stock)


@pytest.mark.parametrize("keep_blocks", [True, False], ids=["blocks-stay", "blocks-go"])
@pytest.mark.parametrize("decoding", [False, True], ids=["turned", "decoding"])
def test_owner_and_follower_are_preempted(blended, stock, decoding, keep_blocks):
    """The follower just after it has turned to the owner's blocks, or when both decode."""
    engine, put_together = blended
    owner, follower = (engine.add(PROMPTS[4], tokens=TOKENS) for _ in range(2))
    step_until(engine, lambda: owner in put_together)
    step_until(engine, lambda: state_of(engine, follower).root is not None)
    if decoding:
        step_until(engine, lambda: state_of(engine, follower).request.num_output_tokens > 2)
    put_together.clear()
    assert len(engine.scheduler.running) == 1 + decoding
    preempt(engine, keep_blocks=keep_blocks)
    done = answers(engine)
    assert tokens_of(done) == [stock[4][:TOKENS]] * 2
    # Whose blocks are gone is blended again, and the other follows.
    assert len(put_together) == (0 if keep_blocks else 1)
    assert_found_again(engine, put_together, 4, stock)


def test_a_follower_alone_is_preempted_and_its_blocks_go(blended, stock):
    engine, put_together = blended
    follower = engine.add(PROMPTS[1], tokens=TOKENS)
    step_until(engine, lambda: follower in engine.scheduler.requests and engine.scheduler.running)
    assert state_of(engine, follower).root is not None
    assert not put_together
    preempt(engine, keep_blocks=False)
    assert tokens_of(answers(engine)) == [stock[1][:TOKENS]]
    assert set(put_together) == {follower}
    assert_found_again(engine, put_together, 1, stock)


# --- Between the turn and the look-up ---


@pytest.fixture
def turned(blended):
    """A request that has turned to the blocks of the prompt that was blended, and has none yet."""
    engine, put_together = blended
    engine.add(PROMPTS[1], tokens=TOKENS)
    engine.engine.step()
    [state] = engine.side._states.values()
    assert state.root is not None and not engine.scheduler.running
    return engine, put_together, state


def test_the_prefix_cache_is_reset(turned, stock):
    engine, put_together, state = turned
    assert engine.llm.reset_prefix_cache()
    done = answers(engine)
    assert tokens_of(done) == [stock[1][:TOKENS]]
    assert set(put_together) == {state.request.request_id}
    assert_found_again(engine, put_together, 1, stock)


def test_all_that_is_stored_is_reset(turned, stock):
    engine, put_together, _ = turned
    assert engine.llm.reset_prefix_cache(reset_connector=True)
    [done] = answers(engine)
    assert tokens_of([done]) == [stock[1][:TOKENS]]
    assert done.num_cached_tokens == 0 and not put_together
    assert_exact(engine, PROMPTS[1])


@pytest.mark.parametrize("first", [True, False])
def test_the_blocks_are_given_to_others(turned, stock, first):
    """All of them, as the first is gone, or what is behind the first three."""
    engine, put_together, state = turned
    hashes = state.request.block_hashes[0 if first else 3 :]
    found = [engine.pool.get_cached_block(one, [0]) for one in hashes]
    engine.pool.evict_blocks({block[0].block_id for block in found if block})
    done = answers(engine)
    assert tokens_of(done) == [stock[1][:TOKENS]]
    assert len(put_together) == 1
    assert_found_again(engine, put_together, 1, stock)


def evict_all(engine):
    """Have the operator evict all that is stored; the order is carried out when a request ends."""
    from vllm import SamplingParams

    salt = canonical_salt()
    order = OperatorOrders(KEY.encode()).sign({"do": "evict", "what": "all", "salt": salt})
    params = {"kv_transfer_params": {"kvshare": {"operator": order}}}
    prompt_ids = {"prompt_token_ids": [1], "cache_salt": salt}
    engine.ids += 1
    name = f"r{engine.ids}"
    engine.engine.add_request(name, prompt_ids, SamplingParams(max_tokens=1, extra_args=params))


def test_the_operator_evicts_what_a_request_has_turned_to(blended, stock):
    """In the step in which it turns: it would find the blocks in the next one."""
    engine, put_together = blended
    evict_all(engine)
    follower = engine.add(PROMPTS[1], tokens=TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        turns, redirects = [], engine.side._chains.redirects
        patch.setattr(
            engine.side._chains,
            "redirects",
            lambda *asked: turns.append(redirects(*asked)) or turns[-1],
        )
        engine.engine.step()
        assert turns == [False, True]
    assert not engine.side.index.used
    assert state_of(engine, follower).root is None
    [done] = answers(engine)
    assert tokens_of([done]) == [stock[1][:TOKENS]]
    assert done.num_cached_tokens == 0 and not put_together
    assert_exact(engine, PROMPTS[1])


def test_the_operator_evicts_while_somebody_is_blended(blended, stock):
    """Who is blended has its segments for as long; who has waited for it gets none of that."""
    engine, put_together = blended
    owner, follower = (engine.add(PROMPTS[4], tokens=TOKENS) for _ in range(2))
    step_until(engine, lambda: put_together)
    evict_all(engine)
    step_until(engine, lambda: follower in {r.request_id for r in engine.scheduler.running})
    assert state_of(engine, follower).root is None
    done = answers(engine)
    assert tokens_of(done)[:2] == [stock[4][:TOKENS]] * 2
    assert set(put_together) == {owner}
    assert done[1].num_cached_tokens == 0
    assert_exact(engine, PROMPTS[4])

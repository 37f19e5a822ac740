"""What is stored of a computed prompt: everything new, nothing twice, no document's seam lost."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kvshare_texts import DOMAIN, OTHER, Server, check_plan, joined, random_text
from vllm_plugins.kv_connectors.kvshare.segments import content_digest, context_digests

SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SEEDS, st.sampled_from([16, 32, 64]), st.integers(0, 3))
def test_drafts_are_the_fresh_ranges_that_are_long_enough(seed, min_run, rounds):
    rng = np.random.default_rng(seed)
    server = Server(min_run=min_run)
    documents = [random_text(rng, int(rng.integers(20, 700))) for _ in range(4)]
    for _ in range(rounds):
        order = rng.permutation(4)[:3]
        server.serve(joined(*(documents[i] for i in order)))
    text = joined(random_text(rng, 25), *documents, random_text(rng, 60))
    plan = server.plan(text)
    drafts = server.planner.new_segments(DOMAIN, text, plan, 0, len(text))
    spans = [(d.position, d.position + len(d.tokens)) for d in drafts]
    fresh = [gap for gap in plan.gaps if gap[1] - gap[0] >= min_run]
    assert merged(spans) == fresh
    for draft, (low, high) in zip(drafts, spans, strict=True):
        assert min_run <= len(draft.tokens) < 512 + 2 * min_run
        assert np.array_equal(draft.tokens, text[low:high])
        assert draft.content == content_digest(draft.tokens)
        assert draft.context == context_digests(DOMAIN, text, [low])[low]
        assert draft.continues == (low not in [start for start, _ in fresh])


def merged(spans):
    """Join spans that touch."""
    result = []
    for low, high in spans:
        if result and result[-1][1] == low:
            result[-1] = (result[-1][0], high)
        else:
            result.append((low, high))
    return result


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS, st.integers(100, 900))
def test_documents_in_new_surroundings_are_found_but_for_nothing(seed, length):
    rng = np.random.default_rng(seed)
    server = Server()
    documents = [random_text(rng, length) for _ in range(4)]
    server.serve(joined(random_text(rng, 40), *documents))
    prompt = joined(*(x for i in rng.permutation(4) for x in (documents[i], random_text(rng, 7))))
    plan = server.plan(prompt)
    check_plan(plan, prompt)
    assert plan.reused == 4 * length


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS)
def test_a_document_that_came_apart_is_found_but_for_its_edges(seed):
    # Its parts were stored from different prompts, of which each reused what the others had.
    rng = np.random.default_rng(seed)
    server = Server()
    document = random_text(rng, 900)
    for _ in range(6):
        low = int(rng.integers(0, 600))
        part = document[low : low + int(rng.integers(100, 300))]
        server.serve(joined(random_text(rng, 50), part, random_text(rng, 50)))
    server.serve(joined(random_text(rng, 30), document, random_text(rng, 30)))
    plan = server.plan(joined(random_text(rng, 11), document, random_text(rng, 12)))
    # Fresh ranges below `min_run` are not stored: at most one before and after each earlier part.
    inside = [(max(low, 11), min(high, 911)) for low, high in plan.gaps]
    assert all(high - low < 32 for low, high in inside)
    assert plan.reused >= 900 - 12 * 31


def test_nothing_is_stored_twice():
    rng = np.random.default_rng(0)
    server = Server()
    documents = [random_text(rng, 500) for _ in range(5)]
    for _ in range(30):
        server.serve(joined(*(documents[i] for i in rng.permutation(5)[:3])))
    assert server.index.used <= 5 * 500
    # Served at the same time: each was planned before any of them was stored.
    twice = Server()
    prompts = [joined(random_text(rng, 40), documents[0], random_text(rng, 40)) for _ in range(8)]
    plans = [twice.plan(prompt) for prompt in prompts]
    for prompt, plan in zip(prompts, plans, strict=True):
        drafts = twice.planner.new_segments(DOMAIN, prompt, plan, 0, len(prompt))
        twice.index.store(DOMAIN, drafts)
    assert twice.index.used == 500 + 8 * 80


def test_another_domain_stores_its_own():
    server = Server()
    text = random_text(np.random.default_rng(1), 500)
    server.serve(text)
    server.serve(text, OTHER)
    assert server.index.domain_used(DOMAIN) == server.index.domain_used(OTHER) == 500


def test_a_copy_of_a_lower_generation_is_stored_beside_one_of_a_higher():
    rng = np.random.default_rng(2)
    first, second = random_text(rng, 300), random_text(rng, 300)
    server = Server(max_generation=1)
    server.serve(first)
    server.serve(joined(random_text(rng, 9), first, second))
    assert {s.generation for s in server.plan(second).segments} == {1}
    drafts = server.planner.new_segments(DOMAIN, second, None, 0, 300)
    assert {d.generation for d in drafts} == {0}
    server.index.store(DOMAIN, drafts)
    assert {s.generation for s in server.plan(second).segments} == {0}
    assert server.planner.new_segments(DOMAIN, second, None, 0, 300) == []


@pytest.mark.parametrize(("exact", "generations"), [(False, {1}), (True, {0})])
def test_what_was_wholly_recomputed_is_exact(exact, generations):
    rng = np.random.default_rng(3)
    first = random_text(rng, 300)
    server = Server()
    server.serve(first)
    text = joined(random_text(rng, 9), first, random_text(rng, 300))
    plan = server.plan(text)
    drafts = server.planner.new_segments(DOMAIN, text, plan, 0, len(text), exact=exact)
    assert {draft.generation for draft in drafts} == generations


def test_only_what_is_at_hand_is_stored():
    text = random_text(np.random.default_rng(4), 1000)
    server = Server()
    drafts = server.planner.new_segments(DOMAIN, text, None, 200, 900)
    assert merged([(d.position, d.position + len(d.tokens)) for d in drafts]) == [(200, 900)]
    assert server.planner.new_segments(DOMAIN, text, None, 200, 231) == []
    assert server.planner.new_segments(DOMAIN, text, None, 200, 200) == []


def test_drafts_keep_no_reference_to_the_prompt():
    text = random_text(np.random.default_rng(5), 1000)
    for draft in Server().planner.new_segments(DOMAIN, text, None, 0, 1000):
        assert draft.tokens.base is None
        assert draft.anchors.hashes.base is None
        assert draft.anchors.offsets.base is None


@pytest.mark.parametrize("exact_only", [False, True])
def test_where_only_exact_reuse_counts_a_text_is_stored_behind_each_context(exact_only):
    server = Server()
    server.planner._exact_only = exact_only
    rng = np.random.default_rng(8)
    document, first, second = (random_text(rng, size) for size in (300, 40, 50))
    server.serve(joined(first, document))
    text = joined(second, document)
    # As the scheduler does: what no exact plan serves is computed without one.
    drafts = server.planner.new_segments(DOMAIN, text, None, 0, len(text))
    assert (sum(len(d.tokens) for d in drafts) == len(text)) == exact_only
    server.index.store(DOMAIN, drafts)
    assert (server.plan(text).exact_prefix_end == len(text)) == exact_only

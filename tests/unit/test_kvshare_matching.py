"""Plans against brute force: nothing wrong is reused, nothing long enough is missed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kvshare_texts import (
    DOMAIN,
    OTHER,
    Server,
    check_plan,
    common_windows,
    joined,
    random_text,
    stored_texts,
)
from vllm_plugins.kv_connectors.kvshare.planner import Planner
from vllm_plugins.kv_connectors.kvshare.segments import context_digests

SEEDS = st.integers(0, 2**32 - 1)


def edited(rng, text, edits, vocabulary):
    """Insert, delete and replace random stretches."""
    parts = list(text)
    for _ in range(edits):
        at = int(rng.integers(0, len(parts) + 1))
        removed = int(rng.integers(0, 6))
        parts[at : at + removed] = random_text(rng, int(rng.integers(0, 6)), vocabulary)
    return np.array(parts, dtype=np.int32)


def missed(plan, text, texts, min_run):
    """Common runs of `min_run` tokens that lie wholly in gaps."""
    covered = np.zeros(len(text) + 1, dtype=np.int64)
    for run in plan.runs:
        covered[run.start : run.end] = 1
    before = np.concatenate(([0], np.cumsum(covered)))
    common = common_windows(text, texts, min_run)
    return [i for i in common if i >= plan.start and before[i + min_run] == before[i]]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SEEDS, st.sampled_from([3, 50, 50_000]), st.sampled_from([16, 32, 50]), st.integers(0, 12))
def test_plans_are_sound_and_complete(seed, vocabulary, min_run, edits):
    rng = np.random.default_rng(seed)
    server = Server(min_run=min_run)
    documents = [random_text(rng, int(rng.integers(20, 400)), vocabulary) for _ in range(4)]
    for _ in range(3):
        picked = [documents[i] for i in rng.permutation(4)[:2]]
        prompt = edited(rng, joined(*picked, random_text(rng, 30, vocabulary)), edits, vocabulary)
        check_plan(server.serve(prompt), prompt, min_run)
    prompt = edited(rng, joined(*(documents[i] for i in rng.permutation(4))), edits, vocabulary)
    start = int(rng.integers(0, 64))
    plan = server.plan(prompt, start=start)
    check_plan(plan, prompt, min_run)
    assert missed(plan, prompt, stored_texts(server.index), min_run) == []


@settings(max_examples=40, deadline=None, derandomize=True)
@given(SEEDS, st.integers(0, 400), st.integers(32, 200))
def test_a_run_of_any_text_is_found_to_its_ends(seed, at, length):
    rng = np.random.default_rng(seed)
    server = Server()
    source = random_text(rng, 700)
    server.serve(source)
    before = random_text(rng, int(rng.integers(1, 100)))
    quoted = source[at : at + length]
    prompt = joined(before, quoted, random_text(rng, 50))
    plan = server.plan(prompt)
    check_plan(plan, prompt)
    assert plan.gaps == [(0, len(before)), (len(before) + len(quoted), len(prompt))]


def test_a_run_below_the_least_length_is_not_used():
    rng = np.random.default_rng(0)
    server = Server()
    source = random_text(rng, 700)
    server.serve(source)
    for length, reused in ((31, 0), (32, 32)):
        quoted = joined(random_text(rng, 9), source[300 : 300 + length], random_text(rng, 9))
        assert server.plan(quoted).reused == reused


def test_a_run_across_a_seam_is_found_where_neither_part_is_long_enough():
    rng = np.random.default_rng(1)
    server = Server()
    source = random_text(rng, 900)
    server.serve(source)
    seam = server.index.get(0).following.position
    prompt = joined(random_text(rng, 40), source[seam - 17 : seam + 17], random_text(rng, 40))
    plan = server.plan(prompt)
    check_plan(plan, prompt)
    assert [run.length for run in plan.runs] == [17, 17]
    assert plan.runs[0].segment.following is plan.runs[1].segment


def test_no_token_that_differs_is_reused():
    rng = np.random.default_rng(2)
    server = Server()
    source = random_text(rng, 900)
    server.serve(source)
    prompt = source.copy()
    changed = np.arange(20, 900, 40)
    prompt[changed] += 1
    plan = server.plan(prompt)
    check_plan(plan, prompt)
    assert plan.gaps == [(0, 21)] + [(i, i + 1) for i in changed[1:]]


@pytest.mark.parametrize("period", [1, 3, 16, 40])
def test_periodic_text_is_reused_as_a_whole(period):
    rng = np.random.default_rng(period)
    pattern = random_text(rng, period)
    server = Server()
    server.serve(np.resize(pattern, 500))
    prompt = joined(random_text(rng, 77), np.resize(pattern, 2000))
    plan = server.plan(prompt)
    check_plan(plan, prompt)
    assert plan.reused >= 1900


def test_another_domain_sees_nothing():
    server = Server()
    text = random_text(np.random.default_rng(3), 600)
    server.serve(text)
    assert server.plan(text).reused == 600
    assert server.plan(text, OTHER).reused == 0
    assert server.plan(text, b"").reused == 0


def exact_share(server, prompt, start=0):
    plan = server.plan(prompt, start=start)
    return plan.exact_prefix_end, sum(run.length for run in plan.runs if run.exact)


def test_reuse_is_exact_where_the_left_context_is_the_same():
    rng = np.random.default_rng(4)
    head, tail = random_text(rng, 300), random_text(rng, 300)
    server = Server()
    server.serve(joined(head, tail))
    assert exact_share(server, joined(head, tail)) == (600, 600)
    assert exact_share(server, joined(head, tail), start=130) == (600, 470)
    assert exact_share(server, joined(head, random_text(rng, 50), tail)) == (300, 300)
    # The same length before it, so the shift is zero, but another text.
    assert exact_share(server, joined(random_text(rng, 300), tail)) == (0, 0)
    assert server.plan(joined(random_text(rng, 300), tail)).reused == 300
    changed = joined(head, tail)
    changed[0] += 1
    assert exact_share(server, changed) == (0, 0)


def test_a_whole_segment_at_its_own_position_is_not_exact_in_another_context():
    rng = np.random.default_rng(10)
    head, tail = random_text(rng, 300), random_text(rng, 300)
    server = Server()
    server.index.store(DOMAIN, drafts_at(joined(head, tail), 300))
    assert exact_share(server, joined(head, tail), start=300) == (600, 300)
    assert exact_share(server, joined(random_text(rng, 300), tail), start=300) == (300, 0)


def test_what_was_computed_upon_an_approximation_is_never_exact():
    rng = np.random.default_rng(9)
    first = random_text(rng, 300)
    server = Server()
    server.serve(first)
    text = joined(random_text(rng, 40), first, random_text(rng, 300))
    server.serve(text)
    # The same text again: position and left context are the same, but it is of generation 1.
    plan = server.plan(text)
    assert plan.reused == len(text)
    assert plan.exact_prefix_end == 40
    assert [run.exact for run in plan.runs] == [True] + [False] * (len(plan.runs) - 1)


def test_exact_reuse_goes_on_behind_a_gap_that_was_evicted():
    text = random_text(np.random.default_rng(5), 900)
    server = Server()
    server.serve(text)
    middle = server.index.get(0).following
    low, high = middle.position, middle.position + len(middle)
    server.index.remove(middle.key)
    plan = server.plan(text)
    assert plan.gaps == [(low, high)]
    assert plan.exact_prefix_end == low
    assert all(run.exact for run in plan.runs)


@pytest.mark.parametrize(("more", "exact", "reused"), [(3, 200, 200), (20, 188, 220)])
def test_an_exact_run_is_preferred_to_a_little_longer_one(more, exact, reused):
    rng = np.random.default_rng(6)
    server = Server()
    head, tail = random_text(rng, 200), random_text(rng, more)
    # First in another context and with more tokens, then as the beginning of a prompt. For twenty
    # tokens more, the twelve that a run of the least length takes from the exact one are given up.
    server.index.store(DOMAIN, drafts_at(joined(random_text(rng, 90), head, tail), 90))
    server.index.store(DOMAIN, drafts_at(head, 0))
    plan = server.plan(joined(head, tail))
    check_plan(plan, joined(head, tail))
    assert (plan.exact_prefix_end, plan.reused) == (exact, reused)


def drafts_at(text, start):
    """Drafts of `text[start:]` as a server makes them that has nothing stored."""
    empty = Planner(Server().index)
    return empty.new_segments(DOMAIN, text, None, start, len(text))


def test_generations_count_how_often_an_approximation_was_built_upon():
    rng = np.random.default_rng(7)
    server = Server(max_generation=1)
    texts = [random_text(rng, 300) for _ in range(4)]
    server.serve(texts[0])
    server.serve(joined(random_text(rng, 5), texts[0], texts[1]))
    assert {s.generation for s in server.plan(texts[1]).segments} == {1}
    plan = server.serve(joined(random_text(rng, 5), texts[1], texts[2]))
    assert plan.reused == 300
    assert server.plan(texts[2]).reused == 0
    # An exact run leads to no approximation: what follows it is of generation 0.
    server.serve(joined(texts[0], texts[3]))
    assert {s.generation for s in server.plan(texts[3]).segments} == {0}
    strict = Planner(server.index, max_generation=0)
    assert strict.plan(DOMAIN, texts[1], 0, 300).reused == 0
    assert strict.plan(DOMAIN, texts[3], 0, 300).reused == 300


def test_context_digests_are_those_of_the_text_before():
    rng = np.random.default_rng(8)
    text = random_text(rng, 50)
    digests = context_digests(DOMAIN, text, [50, 0, 17, 17])
    assert sorted(digests) == [0, 17, 50]
    assert len(set(digests.values())) == 3
    assert digests[17] == context_digests(DOMAIN, text[:17], [17])[17]
    assert digests[17] != context_digests(DOMAIN, text[1:18], [17])[17]
    assert digests[0] != context_digests(OTHER, text, [0])[0]
    # The domain's end and the text's beginning do not run into each other.
    first = text[:1].tobytes()
    assert context_digests(DOMAIN + first, text[1:], [5])[5] != digests_at(DOMAIN, text, 6)


def digests_at(domain, text, position):
    return context_digests(domain, text, [position])[position]


def test_a_least_length_below_a_window_is_refused():
    with pytest.raises(ValueError, match="min_run=15 is below 16"):
        Planner(Server().index, min_run=15)

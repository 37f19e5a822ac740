"""The benchmark of KVShare over HTTP: what it asks, and about which documents."""

import json
import math
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reader import load
from reader_data import ASK, CATEGORIES, DOC, VOCABULARY

from vllm_plugins.bench.errors import BenchError

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import kvshare_served_requests as bench  # noqa: E402
from kvshare_served import READER  # noqa: E402
from kvshare_served_requests import Asked, HangUp, Request, Shape  # noqa: E402

SHAPE = Shape(requests=40, tenants=3, documents=7, per_prompt=3)
CATEGORY_OF = {word: name for name, words in CATEGORIES.items() for word in words.split()}


class FakeCorpus:
    """Pools whose prompts say which pool and which documents they are made of."""

    def __init__(self):
        self.pools = 0

    def __call__(self, rng, count):
        pool = self.pools
        self.pools += 1
        return SimpleNamespace(ask=lambda rng, chosen: Asked([(pool, i, count) for i in chosen]))


def made(seed=1, **changes):
    shape = Shape(**{**vars(SHAPE), **changes})
    return bench.make_requests(shape, FakeCorpus(), Random(seed))


def test_requests_come_from_the_seed_alone():
    assert made() == made()
    assert made() != made(seed=2)


def test_every_document_is_sent_once_before_what_is_measured():
    priming, _ = made()
    assert all(request.max_tokens == 1 and not request.hang_up for request in priming)
    for tenant in range(3):
        own = [r.asked.prompt for r in priming if r.tenant == tenant]
        sent = Counter(i for prompt in own[:-1] for _, i, _ in prompt)
        assert sent == dict.fromkeys(range(7), 1)
        assert len(own[-1]) == 3
        assert {pool for prompt in own for pool, _, _ in prompt} == {tenant}


def test_tenants_ask_about_their_own_documents_and_novel_ones_are_nobodys():
    _, measured = made(novel_share=0.3)
    assert Counter(r.tenant for r in measured) == {0: 14, 1: 13, 2: 13}
    pools = [{pool for pool, _, _ in r.asked.prompt} for r in measured]
    assert all(p == {r.tenant} for p, r in zip(pools, measured, strict=True) if not r.novel)
    novel = [pool for p, r in zip(pools, measured, strict=True) if r.novel for pool in p]
    assert len(novel) == len(set(novel)) == 12
    assert min(novel) >= 3
    assert all(len({i for _, i, _ in r.asked.prompt}) == 3 for r in measured)


def test_documents_stand_in_another_order_each_time():
    _, measured = made(novel_share=0.0)
    firsts = Counter(r.asked.prompt[0] < r.asked.prompt[1] for r in measured)
    assert min(firsts[True], firsts[False]) > 8


def test_who_hangs_up_does_so_before_the_first_token_or_after_a_few():
    _, measured = made(abort_share=0.25)
    left = [r.hang_up for r in measured if r.hang_up]
    early, late = [h for h in left if h.tokens == 1], [h for h in left if h.tokens > 1]
    assert (len(early), len(late)) == (5, 5)
    assert all(1e-3 <= h.seconds <= 1 for h in early)
    assert all(h.tokens <= 8 and h.seconds == math.inf for h in late)
    assert all(r.max_tokens == (64 if r.hang_up else 16) for r in measured)


@pytest.mark.parametrize(("novel", "aborted"), [(0.0, 0.0), (1.0, 1.0)])
def test_shares_may_be_nothing_and_all(novel, aborted):
    _, measured = made(novel_share=novel, abort_share=aborted)
    assert {r.novel for r in measured} == {bool(novel)}
    assert {r.hang_up is not None for r in measured} == {bool(aborted)}


def test_a_request_carries_its_tenants_salt_and_lets_the_reader_end_its_answer():
    body = Request(2, Asked([4, 5], answer=6), 16).body("m")
    expected = {"model": "m", "prompt": [4, 5], "temperature": 0, "cache_salt": "tenant-2"}
    assert expected.items() <= body.items()
    assert body["stream"]
    assert not body["ignore_eos"]
    assert Request(0, Asked([4]), 16).body("m")["ignore_eos"]
    assert Request(0, Asked([4], answer=6), 64, hang_up=HangUp(2, 1.0)).body("m")["ignore_eos"]


@given(st.integers(1, 30), st.data(), st.floats(0, 3), st.integers())
def test_drawn_documents_are_different_ones(count, data, zipf, seed):
    chosen = data.draw(st.integers(1, count))
    drawn = bench.popular(Random(seed), Shape(documents=count, per_prompt=chosen, zipf=zipf))
    assert len(drawn) == len(set(drawn)) == chosen
    assert set(drawn) <= set(range(count))


@pytest.mark.parametrize(("zipf", "weights"), [(1.0, (12, 6, 4, 3)), (0.0, (1, 1, 1, 1))])
def test_documents_are_as_popular_as_zipf_says(zipf, weights):
    rng, draws = Random(5), 4000
    shape = Shape(documents=4, per_prompt=1, zipf=zipf)
    seen = Counter(bench.popular(rng, shape)[0] for _ in range(draws))
    for i, weight in enumerate(weights):
        share = weight / sum(weights)
        assert abs(seen[i] - draws * share) < 4 * math.sqrt(draws * share * (1 - share))


def test_arrivals_are_a_poisson_process_of_the_rate():
    times = bench.arrivals(4000, 5.0, Random(3))
    gaps = [late - early for early, late in pairwise(times)]
    assert times[0] == 0 and len(times) == 4000 and min(gaps) >= 0
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 5, rel=0.06)
    # Of an exponential distribution the spread is the mean.
    assert math.sqrt(sum((g - mean) ** 2 for g in gaps) / len(gaps)) == pytest.approx(mean, rel=0.1)


def reading(prompt):
    """Answer as a person would: what the key at the end of the prompt says, and where from."""
    words = [VOCABULARY[token] for token in prompt]
    notes = {CATEGORY_OF[w]: w for before, w in pairwise(words) if before == "note"}
    [said] = [w for before, w in pairwise(words[:-2]) if before == words[-1]]
    refers = said.startswith("the-")
    return (notes[said.removeprefix("the-")], 2) if refers else (said, 1)


def documents_in(prompt):
    starts = [i for i, token in enumerate(prompt) if token == DOC] + [len(prompt) - 2]
    return [tuple(prompt[a:b]) for a, b in pairwise(starts)]


@pytest.fixture(scope="module")
def reader_prompts():
    rng = Random(11)
    pool = bench.ReaderPool(rng, 12)
    return [pool.ask(rng, rng.sample(range(12), 8)) for _ in range(60)]


def test_the_readers_answers_are_those_of_a_reader_of_the_text(reader_prompts):
    for asked in reader_prompts:
        assert asked.prompt[-2] == ASK
        assert (VOCABULARY[asked.answer], asked.hops) == reading(asked.prompt)
    assert {asked.hops for asked in reader_prompts} == {1, 2}


def test_documents_come_back_and_what_others_refer_to_changes(reader_prompts):
    split = [documents_in(asked.prompt) for asked in reader_prompts]
    assert all(len(documents) == 1 + bench.SOURCES + 8 for documents in split)
    assert len({documents[0] for documents in split}) == 1
    plain = {d for documents in split for d in documents[1:] if not mentions_note(d)}
    sources = {d for documents in split for d in documents if mentions_note(d)}
    assert len(plain) == 12
    assert bench.SOURCES < len(sources) <= bench.SOURCES * bench.EDITIONS
    answers = {}
    for asked in reader_prompts:
        answers.setdefault((asked.prompt[-1], asked.hops), set()).add(asked.answer)
    assert all(len(found) == 1 for (_, hops), found in answers.items() if hops == 1)
    assert any(len(found) > 1 for (_, hops), found in answers.items() if hops == 2)


def mentions_note(document):
    return any(VOCABULARY[token] == "note" for token in document)


def test_too_many_documents_for_the_readers_vocabulary_are_refused():
    bench.ReaderPool(Random(1), 30)
    with pytest.raises(BenchError, match="at most 30 documents"):
        bench.ReaderPool(Random(1), 31)


@torch.no_grad()
def test_a_full_prefill_by_the_reader_answers_them(reader_prompts):
    torch.set_num_threads(1)
    reader = load(READER)
    right = [
        reader(torch.tensor([asked.prompt])).logits[0, -1].argmax() == asked.answer
        for asked in reader_prompts
    ]
    assert sum(right) / len(right) >= 0.95


def encode(text):
    return list(text.encode())


def test_passages_are_handed_out_once_and_prompts_are_made_of_them():
    corpus, rng = bench.TextCorpus(encode, [1, 2], 300, seed=4), Random(4)
    pools = [corpus(rng, 200), corpus(rng, 200)]
    passages = [tuple(ids) for pool in pools for _, ids in pool.passages]
    titles = [title for pool in pools for title, _ in pool.passages]
    assert len(set(passages)) == len(set(titles)) == 400
    assert {len(ids) for ids in passages} == {300}
    asked = pools[0].ask(rng, [5, 3])
    assert asked.prompt[:2] == [1, 2]
    both = pools[0].passages[5][1] + pools[0].passages[3][1]
    head = len(pools[0].head)
    assert asked.prompt[head : head + 600] == both
    question = bytes(asked.prompt[head + 600 :]).decode()
    assert any(f"what is {pools[0].passages[i][0]} for?" in question for i in (3, 5))
    assert pools[0].ask(rng, [5, 3]).prompt[head + 600 :] != asked.prompt[head + 600 :]
    assert pools[0].head != pools[1].head


def test_passages_are_the_librarys_text():
    title, ids = bench.TextCorpus(encode, [], 2000, seed=4)(Random(4), 1).passages[0]
    path = Path(json.__file__).parent.parent / title.split()[-1]
    heading = f"\n\n# {title}\n"
    text = bytes(ids).decode(errors="ignore")
    assert text.startswith(heading)
    assert path.read_text().startswith(text.removeprefix(heading))


def test_a_library_that_is_too_short_is_said_to_be(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text("x" * 1000)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    corpus = bench.TextCorpus(encode, [], 100, seed=0)
    assert len(corpus(Random(0), 7).passages) == 7
    with pytest.raises(BenchError, match="too short"):
        corpus(Random(0), 7)


def test_prompts_have_about_the_length_that_is_wanted():
    corpus = bench.text_corpus(READER, 600, 4, seed=0)
    _, measured = bench.make_requests(Shape(requests=10), corpus, Random(0))
    assert all(570 <= len(r.asked.prompt) <= 600 for r in measured)

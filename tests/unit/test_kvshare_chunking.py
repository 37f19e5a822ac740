"""Window hashes, chunks and anchors: what they depend on, and against naive oracles."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.kvshare_texts import DOMAIN, OTHER, Server, joined, random_text
from vllm_plugins.kv_connectors.kvshare.anchors import winnow
from vllm_plugins.kv_connectors.kvshare.chunking import WINDOW, ChunkSizes, WindowHash
from vllm_plugins.kv_connectors.kvshare.segments import content_digest

SEEDS = st.integers(0, 2**32 - 1)


SIZES = ChunkSizes()


def chunks(text, sizes=SIZES, domain=DOMAIN):
    bounds = sizes.bounds(WindowHash(domain)(text), len(text))
    return [text[low:high] for low, high in itertools.pairwise(bounds)]


def test_a_hash_depends_on_its_window_alone():
    rng = np.random.default_rng(0)
    text = random_text(rng, 200)
    hashes = WindowHash(DOMAIN)(text)
    assert hashes.shape == (200 - WINDOW + 1,)
    alone = [WindowHash(DOMAIN)(text[i : i + WINDOW])[0] for i in range(len(hashes))]
    assert hashes.tolist() == alone
    for changed in range(100, 100 + WINDOW):
        other = text.copy()
        other[changed] += 1
        assert WindowHash(DOMAIN)(other)[100] != hashes[100]


@pytest.mark.parametrize("length", range(WINDOW))
def test_a_text_below_a_window_has_no_hash(length):
    assert len(WindowHash(DOMAIN)(np.zeros(length, dtype=np.int32))) == 0


def test_hashes_are_well_mixed_and_do_not_collide():
    # Small token ids in order: what a weak hash would leave a pattern in.
    hashes = WindowHash(DOMAIN)(np.arange(100_000, dtype=np.int32))
    assert len(np.unique(hashes)) == len(hashes)
    bits = np.unpackbits(hashes.view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 0.01


def test_another_domain_has_other_hashes_and_other_cuts():
    text = random_text(np.random.default_rng(1), 5000)
    assert not np.isin(WindowHash(DOMAIN)(text), WindowHash(OTHER)(text)).any()
    ends = np.cumsum([len(c) for c in chunks(text)])
    others = np.cumsum([len(c) for c in chunks(text, domain=OTHER)])
    assert np.isin(ends, others).sum() <= 3


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SEEDS, st.integers(0, 3000), st.sampled_from([1, 2, 50_000]),
       st.sampled_from([(16, 16), (16, 40), (64, 512)]))  # fmt: skip
def test_chunks_make_up_the_text_and_keep_to_their_bounds(seed, length, vocabulary, bounds):
    text = random_text(np.random.default_rng(seed), length, vocabulary)
    parts = chunks(text, ChunkSizes(*bounds))
    assert np.array_equal(np.concatenate([text[:0], *parts]), text)
    assert all(bounds[0] <= len(part) <= bounds[1] for part in parts[:-1])
    assert all(0 < len(part) <= bounds[1] for part in parts[-1:])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SEEDS, st.integers(1, 2000))
def test_moved_text_is_cut_at_the_same_places(seed, shift):
    rng = np.random.default_rng(seed)
    text = random_text(rng, 6000)
    before = {part.tobytes() for part in chunks(text)}
    moved = chunks(joined(random_text(rng, shift), text, random_text(rng, 500)))
    kept = sum(len(part) for part in moved if part.tobytes() in before)
    # The walks meet after some chunks; how many is chance, and 2,000 tokens are 10 chunks.
    assert kept >= 4000


def test_an_edit_changes_the_chunks_around_it_alone():
    rng = np.random.default_rng(2)
    text = random_text(rng, 20_000)
    before = {part.tobytes() for part in chunks(text)}
    changed = joined(text[:9000], random_text(rng, 3), text[9001:])
    after = chunks(changed)
    kept = [part.tobytes() in before for part in after]
    assert sum(kept) >= len(kept) - 5
    assert all(kept[:20])
    assert all(kept[-20:])


def test_cuts_without_a_small_hash_are_the_same_anywhere():
    # Chunks of at most 70 tokens nearly never meet a hash that is small enough.
    sizes = ChunkSizes(64, 70)
    rng = np.random.default_rng(3)
    text = random_text(rng, 30_000)
    before = {part.tobytes() for part in chunks(text, sizes)}
    after = chunks(joined(random_text(rng, 30), text), sizes)
    assert np.mean([part.tobytes() in before for part in after]) > 0.5


@pytest.mark.parametrize(("least", "most"), [(15, 100), (64, 63)])
def test_impossible_chunk_sizes_are_refused(least, most):
    with pytest.raises(ValueError, match="16 <= least <= most"):
        ChunkSizes(least, most)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(SEEDS, st.integers(0, 120), st.sampled_from([1, 2, 50_000]), st.integers(16, 50))
def test_anchors_are_the_rightmost_least_of_every_window(seed, length, vocabulary, min_run):
    text = random_text(np.random.default_rng(seed), length, vocabulary)
    hashes = WindowHash(DOMAIN)(text)
    width = min_run - WINDOW + 1
    expected = set()
    for i in range(len(hashes) - width + 1):
        window = (hashes[i : i + width] >> np.uint64(32)).tolist()
        expected.add(i + max(j for j in range(width) if window[j] == min(window)))
    anchors = winnow(hashes, min_run)
    assert anchors.offsets.tolist() == sorted(expected)
    assert anchors.hashes.tolist() == hashes[anchors.offsets].tolist()


def test_anchors_are_few():
    hashes = WindowHash(DOMAIN)(random_text(np.random.default_rng(4), 50_000))
    for min_run in (32, 64, 128):
        expected = 2 / (min_run - WINDOW + 2) * len(hashes)
        assert len(winnow(hashes, min_run)) == pytest.approx(expected, rel=0.05)


def test_anchors_between_count_from_the_beginning():
    anchors = winnow(WindowHash(DOMAIN)(random_text(np.random.default_rng(5), 500)), 32)
    part = anchors.between(100, 300)
    inside = (anchors.offsets >= 100) & (anchors.offsets < 300)
    assert part.offsets.tolist() == (anchors.offsets[inside] - 100).tolist()
    assert part.hashes.tolist() == anchors.hashes[inside].tolist()


def test_a_least_run_below_a_window_is_refused():
    with pytest.raises(ValueError, match="min_run=15 is below 16"):
        winnow(np.empty(0, dtype=np.uint64), 15)


def fingerprint():
    """Everything that must be the same in every process, for one text."""
    text = random_text(np.random.default_rng(6), 3000)
    server = Server()
    plan = server.serve(text)
    drafts = server.planner.new_segments(DOMAIN, text[::-1].copy(), None, 0, 3000)
    return {
        "content": content_digest(text).hex(),
        "hashes": content_digest(WindowHash(DOMAIN)(text).view(np.int32)).hex(),
        "gaps": plan.gaps,
        "drafts": [(d.position, d.context.hex(), d.anchors.offsets.tolist()) for d in drafts],
    }


def test_everything_is_the_same_in_another_process():
    code = (
        "import json; from tests.unit.test_kvshare_chunking import fingerprint; "
        "print(json.dumps(fingerprint()))"
    )
    for seed in ("1", "2"):
        printed = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert json.loads(printed) == json.loads(json.dumps(fingerprint()))
    # A store that is shared between versions would find nothing after a change of these.
    assert fingerprint()["content"].startswith("5d8c6e0d814860dc")
    assert fingerprint()["hashes"].startswith("b46622ed5862a2d2")
    assert fingerprint()["drafts"][0][1].startswith("4f836df5732f4006")

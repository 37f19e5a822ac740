"""Texts, and a store that is filled the way a server fills it, for the tests of KVShare."""

import numpy as np

from vllm_plugins.kv_connectors.kvshare.index import SegmentIndex
from vllm_plugins.kv_connectors.kvshare.planner import Planner
from vllm_plugins.kv_connectors.kvshare.segments import as_tokens

DOMAIN = b"tenant one"
OTHER = b"tenant two"


def random_text(rng, length, vocabulary=50_000):
    return rng.integers(0, vocabulary, length).astype(np.int32)


def joined(*texts):
    return as_tokens(np.concatenate(texts))


class Server:
    """An index and a planner; `serve` plans a prompt, "computes" it and stores what is new."""

    def __init__(self, capacity=1_000_000, min_run=32, max_generation=1_000, **options):
        self.index = SegmentIndex(capacity, **options)
        self.planner = Planner(self.index, min_run, max_generation)
        self.evicted = []

    def plan(self, text, domain=DOMAIN, start=0):
        return self.planner.plan(domain, text, start, len(text))

    def serve(self, text, domain=DOMAIN):
        plan = self.plan(text, domain)
        self.index.pin(plan.segments)
        drafts = self.planner.new_segments(domain, text, plan, 0, len(text))
        self.evicted += self.index.store(domain, drafts).evicted
        assert self.index.used <= self.index.capacity
        self.index.unpin(plan.segments)
        return plan


def check_plan(plan, text, min_run=32):
    """What must hold for every plan: it is the prompt, in order, once, of the same tokens."""
    spans = sorted([(r.start, r.end) for r in plan.runs] + plan.gaps)
    assert [low for low, _ in spans] + [plan.end] == [plan.start] + [high for _, high in spans]
    for run in plan.runs:
        stored = run.segment.tokens[run.offset : run.offset + run.length]
        assert len(stored) == run.length > 0
        assert np.array_equal(text[run.start : run.end], stored)
        assert run.segment.position + run.offset + run.shift == run.start
    for chain in chains(plan.runs):
        assert sum(run.length for run in chain) >= min_run


def chains(runs):
    """Group runs that continue each other in the prompt and in the stored text."""
    groups = []
    for run in runs:
        last = groups[-1][-1] if groups else None
        if last and last.end == run.start and last.segment.following is run.segment and (
            last.offset + last.length == len(last.segment) and run.offset == 0
        ):  # fmt: skip
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def stored_texts(index):
    """Return every maximal text that the index holds without a hole."""
    texts = []
    for segment in map(index.get, index):
        if segment.previous is None:
            chain = [segment]
            while chain[-1].following is not None:
                chain.append(chain[-1].following)
            texts.append(joined(*(part.tokens for part in chain)))
    return texts


def common_windows(text, others, length):
    """Positions in `text` at which `length` tokens stand somewhere in `others`, by brute force."""
    known = {
        other[i : i + length].tobytes() for other in others for i in range(len(other) - length + 1)
    }
    return [i for i in range(len(text) - length + 1) if text[i : i + length].tobytes() in known]

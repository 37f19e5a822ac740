"""A long run of KVShare in a process of its own, which `test_kvshare_soak.py` starts.

Preemption is forced by a small KV cache, and clients hang up at random. Half of the requests are
served to the end before the second half begins, and what is alive is counted at both ends.

Memory is that of the whole process. oneDNN keeps a compiled matrix product for every number of rows
that it has seen, 1,024 of them by default, so that with or without a plug-in memory grows for as
long as new numbers come up; `ENVIRONMENT` bounds that cache, and what is left is the engine's own.
"""

import gc
import json
import os
import random
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from tests.engine.kvshare_engine import NEUTRAL, served
from tests.models import make_engine, plugin_samples, tiny_llama

ENVIRONMENT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
# Room for about two prompts and their answers.
SMALL = {"num_gpu_blocks_override": 30, "max_model_len": 800}
KEPT, TOKENS, HANG_UP = 6, 40, 0.02
STORED_TOKENS = 900


@dataclass
class Idle:
    """What is left once every request has ended.

    Attributes:
        blocks_leaked: KV blocks that nobody gave back.
        references: Stored segments' reference counts, summed.
        segments: Segments that are stored.
        objects: Live objects of the package's own classes, by class.
        remembered: What scheduling policies keep of requests, in entries.
    """

    blocks_leaked: int
    references: int
    segments: int
    objects: dict[str, int]
    remembered: int


@dataclass
class Soak:
    """The whole run; memory in MiB, as (requests so far, resident memory)."""

    spec: str
    requests: int
    preempted: int = 0
    aborted: int = 0
    answered: int = 0
    overtaken: int = 0
    memory: list[tuple[int, float]] = field(default_factory=list)
    idle: list[Idle] = field(default_factory=list)
    checked: int = 0
    wrong: list[int] = field(default_factory=list)
    environment: dict[str, str] = field(
        default_factory=lambda: {name: os.environ.get(name, "") for name in ENVIRONMENT}
    )


def texts(rng, count):
    """Prompts of some of eight documents in random order, and something of their own."""
    documents = [np.array([rng.randrange(500) for _ in range(120)]) for _ in range(8)]

    def draw():
        parts = rng.sample(documents, rng.randint(1, 4))
        unique = [rng.randrange(500) for _ in range(rng.randint(3, 40))]
        return [int(token) for part in parts for token in part] + unique

    return [draw() for _ in range(count)]


def answers_of_stock(prompts):
    """Stock vLLM's greedy answers, one prompt at a time."""
    from vllm import SamplingParams

    with make_engine(tiny_llama(layers=4), block_size=32) as llm:
        inputs = [{"prompt_token_ids": p} for p in prompts]
        params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
        outputs = [llm.generate([i], params, use_tqdm=False)[0] for i in inputs]
    return [list(output.outputs[0].token_ids) for output in outputs]


def overtakings():
    """How often a request went before an earlier one because more of it was stored."""
    name = "vllm_plugins:kvshare_bypasses_total"
    return int(sum(sample.value for sample in plugin_samples() if sample.name == name))


def remembered(scheduler):
    """Entries of all that the scheduler's policies, if it has any, keep by request."""
    policies = getattr(scheduler, "plugin_policies", ())
    kept = (item for policy in policies for item in vars(policy).values())
    return sum(len(item) for item in kept if isinstance(item, (dict, set, list)))


def resident_mib():
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Run:
    """Serves prompts, some of which are given up; those in `kept` never are."""

    def __init__(self, engine, prompts, kept, result):
        self.engine, self.prompts, self.kept, self.result = engine, prompts, kept, result
        self.rng = random.Random(2)
        self.alive, self.answers, self.preempted = {}, {}, set()
        self.submitted, self.every = 0, max(5, len(prompts) // 20)

    def until(self, limit):
        """Serve so many prompts to the end, and note what is left then."""
        while self.submitted < limit or self.engine.engine.has_unfinished_requests():
            while self.submitted < limit and len(self.alive) < KEPT:
                self.submit()
            self.step()
            if self.alive and self.rng.random() < HANG_UP:
                self.hang_up()
        self.engine.assert_idle()
        self.result.preempted = len(self.preempted)
        self.result.overtaken = overtakings()
        self.result.idle.append(self.idle())

    def submit(self):
        name = self.engine.add(self.prompts[self.submitted], tokens=TOKENS).split("-")[0]
        self.alive[name] = self.submitted
        self.submitted += 1
        if self.submitted % self.every == 0:
            self.result.memory.append((self.submitted, resident_mib()))

    def step(self):
        for output in self.engine.engine.step():
            if output.finished:
                number = self.alive.pop(output.request_id.split("-")[0])
                self.result.answered += len(output.outputs[0].token_ids) == TOKENS
                if number in self.kept:
                    self.answers[number] = list(output.outputs[0].token_ids)
        requests = self.engine.scheduler.requests
        self.preempted |= {name for name, r in requests.items() if r.num_preemptions}

    def hang_up(self):
        name = self.rng.choice(list(self.alive))
        if self.alive[name] not in self.kept:
            internal = next(k for k in self.engine.scheduler.requests if k.split("-")[0] == name)
            self.engine.engine.abort_request([internal], internal=True)
            del self.alive[name]
            self.result.aborted += 1

    def idle(self):
        index, pool = self.engine.side.index, self.engine.pool
        gc.collect()
        kinds = (type(item) for item in gc.get_objects())
        own = (k.__qualname__ for k in kinds if str(k.__module__).startswith("vllm_plugins."))
        return Idle(
            self.engine.free - pool.get_num_free_blocks(),
            sum(index.get(key).references for key in index),
            len(index),
            dict(sorted(Counter(own).items())),
            remembered(self.engine.scheduler),
        )


def soak(spec, requests):
    """Run so many requests under a setting: plug-ins as on a command line, kvshare last."""
    result = Soak(spec, requests)
    prompts = texts(random.Random(1), requests)
    checked = range(0, requests, max(1, requests // 20)) if spec == NEUTRAL else ()
    expected = dict(zip(checked, answers_of_stock([prompts[i] for i in checked]), strict=True))
    gib = STORED_TOKENS * 4 * 2 * 2 * 32 * 4 / 2**30
    with served(f"{spec},host_gib={gib:.9f}", **SMALL) as engine:
        run = Run(engine, prompts, frozenset(checked), result)
        run.until(requests // 2)
        run.until(requests)
        assert engine.side.index.used <= engine.side.index.capacity
    result.checked = len(expected)
    result.wrong = [i for i, answer in expected.items() if run.answers[i] != answer]
    return result


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(asdict(soak(sys.argv[1], int(sys.argv[2])))))

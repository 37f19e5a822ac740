"""vLLM's own schedulers on both sides of a hand-over, in virtual time, with full pools.

    VLLM_PLUGINS_SOAK_S=1800 VLLM_PLUGINS_SOAK_OUT=FILE.json \\
        pytest tests/engine/test_pd_schedulers.py -k soak_with

runs the soak for as long as one likes, and writes what was found; by default it is short.
"""

import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import KVConnectorOutput

from tests.pd_virtual import BLOCK, BLOCKS, LEASE_S, POLL_S, Handover, requests, step_seconds
from vllm_plugins.bench.machine import describe_machine
from vllm_plugins.kv_connectors.pd.reference import KEY
from vllm_plugins.simulator.config import make_config, write_model_config
from vllm_plugins.simulator.engine import VirtualEngine

# Wall-clock time of the soak.
SOAK_S = float(os.environ.get("VLLM_PLUGINS_SOAK_S", "6"))
SOAK_OUT = os.environ.get("VLLM_PLUGINS_SOAK_OUT")


@pytest.fixture
def tokens():
    """Return what one engine alone generates for a request."""

    def generate(request) -> list[int]:
        first = sum(request.prompt[:4])
        return [1 + (7 * i + 13 * first) % 500 for i in range(request.output_tokens)]

    return generate


@pytest.mark.parametrize("threshold", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("pull_s", [0.0, 0.05])
def test_a_slow_decoder_is_fed_in_order_and_never_more_than_it_runs_soon(
    tmp_path, tokens, threshold, pull_s
):
    handover = Handover(tmp_path, pull_s=pull_s, threshold=threshold)
    wanted = requests(120, seed=1)
    for request in wanted:
        handover.add(request)
    handover.run()
    handover.check_empty()
    longest = 400 // BLOCK
    assert handover.most_accepted <= threshold * BLOCKS + longest
    pulled = [name for name in handover.arrived if name in set(handover.accepted)]
    assert handover.accepted == pulled
    for request in wanted:
        assert handover.decode.records[request.request_id].tokens == tokens(request)


def test_what_is_not_pulled_stops_new_prompts(tmp_path):
    """With a slow decoder the prefill instance fills up to its cap, and then waits."""
    held = {}
    for fraction in (0.2, 0.8):
        handover = Handover(tmp_path, pull_s=0.1, threshold=0.05, held=fraction)
        for request in requests(40, seed=2, rate=1000.0):
            handover.add(request)
        handover.run()
        handover.check_empty()
        held[fraction] = handover.most_held
        # A prompt that exceeds the cap by itself starts when there is no other.
        assert held[fraction] <= max(fraction * BLOCKS, 400 // BLOCK)
        assert all(len(r.admissions) == 1 for r in handover.prefill.records.values())
    assert held[0.2] < held[0.8]


def test_leases_end_while_the_decoder_is_stuck(tmp_path, tokens):
    handover = Handover(tmp_path, pull_s=2 * LEASE_S, threshold=1.0)
    wanted = requests(12, seed=3)
    for request in wanted:
        handover.add(request)
    handover.run()
    handover.check_empty()
    assert handover.recomputed
    for request in wanted:
        assert handover.decode.records[request.request_id].tokens == tokens(request)


def keep(found: dict[str, float]) -> None:
    """Write what a soak found to the file that was asked for."""
    if SOAK_OUT is None:
        return
    command = (f"VLLM_PLUGINS_SOAK_S={SOAK_S:g} pytest tests/engine/test_pd_schedulers.py "
               "-k soak_with")  # fmt: skip
    whole = {"command": command, "machine": describe_machine(), "result": found}
    Path(SOAK_OUT).write_text(json.dumps(whole, indent=1) + "\n")


@pytest.mark.timeout(SOAK_S + 600)
def test_soak_with_aborts_at_every_state(tmp_path, tokens):
    """Full pools, aborts on both sides at random times, pulls of all durations."""
    draw, start, round_ = random.Random(7), time.monotonic(), 0
    found = dict.fromkeys(("requests", "aborted", "checked", "recomputed", "most_held"), 0)
    while not round_ or time.monotonic() - start < SOAK_S:
        round_ += 1
        handover = Handover(
            tmp_path, pull_s=draw.choice([0.0, 0.02, 0.5]), threshold=draw.choice([0.05, 0.5, 1.0]),
            held=draw.choice([0.3, 0.8, 1.0]),
        )  # fmt: skip
        wanted = requests(80, seed=100 + round_, rate=draw.choice([50.0, 500.0]))
        aborted = set(draw.sample([r.request_id for r in wanted], 30))
        for request in wanted:
            handover.add(request)
            if request.request_id in aborted:
                side = draw.choice(handover.sides)
                side.abort(request.request_id, request.arrival_s + draw.expovariate(5.0))
        handover.run()
        handover.check_empty()
        for request in wanted:
            if request.request_id not in aborted:
                assert handover.decode.records[request.request_id].tokens == tokens(request)
        found["requests"] += len(wanted)
        found["aborted"] += len(aborted)
        found["checked"] += len(wanted) - len(aborted)
        found["recomputed"] += handover.recomputed
        found["most_held"] = max(found["most_held"], handover.most_held)
    keep(found | {"rounds": round_, "seconds": time.monotonic() - start, "blocks": BLOCKS})


class NixlSide(VirtualEngine):
    """A decode instance whose blocks NixlConnector fills, after a time that a stub takes."""

    def __init__(self, folder, threshold: float, pull_s: float) -> None:
        options = f"transport=nixl,waiting_block_prop_threshold={threshold}"
        config = make_config(
            write_model_config(folder), f"pd:role=decode,{options}", block_size=BLOCK,
            max_model_len=1024, max_num_batched_tokens=256, max_num_seqs=16,
        )  # fmt: skip
        super().__init__(config, Scheduler, step_seconds, BLOCKS)
        self.pull_s = pull_s
        self.loading: dict[str, float] = {}
        self.accepted: list[str] = []

    def _sample(self, output):
        result = super()._sample(output)
        for name in output.kv_connector_metadata.reqs_to_recv:
            self.accepted.append(name)
            self.loading[name] = self.now + self.pull_s
        done = {name for name, at in self.loading.items() if at <= self.now}
        self.loading = {name: at for name, at in self.loading.items() if name not in done}
        result.kv_connector_output = KVConnectorOutput(finished_recving=done or None)
        return result


def test_nixl_pulls_by_the_same_rule(tmp_path, tokens, monkeypatch):
    # The scheduler's side of NixlConnector runs without the package that moves the bytes.
    monkeypatch.setattr("vllm_plugins.kv_connectors.pd.plugin.find_spec", lambda name: name)
    side = NixlSide(tmp_path, threshold=0.1, pull_s=0.05)
    free, most, wanted = side.free_blocks, 0, requests(40, seed=4)
    remote = {"do_remote_prefill": True, "remote_engine_id": "p", "remote_request_id": "r",
              "remote_host": "127.0.0.1", "remote_port": 9, "tp_size": 1}  # fmt: skip
    for request in wanted:
        blocks = [list(range(1, 2 + len(request.prompt) // BLOCK))]
        params = remote | {"remote_block_ids": blocks}
        side.add([replace(request, extra_args={"kv_transfer_params": params})])
    while side._events or side._busy():
        side._deliver()
        if side._busy():
            side.step()
        side.now += POLL_S
        most = max(most, side.scheduler.connector.admission.accepted_blocks)
    assert side.accepted == [request.request_id for request in wanted]
    assert 0 < most <= 0.1 * BLOCKS + 400 // BLOCK
    assert (side.free_blocks, side.scheduler.connector.admission.accepted_blocks) == (free, 0)
    for request in wanted:
        assert side.records[request.request_id].tokens == tokens(request)


def test_a_transfers_name_is_one_requests(tmp_path):
    """The router chooses it; a second one of the same name is answered without a reference."""
    handover = Handover(tmp_path, pull_s=0.0, threshold=1.0)
    params = {"do_remote_decode": True, KEY: {"transfer_id": "mine"}}
    first, second = requests(2, seed=5, rate=1e6)
    for request in (first, second):
        handover.requests[request.request_id] = request
        asked = replace(request, output_tokens=1, extra_args={"kv_transfer_params": params})
        handover.prefill.add([asked])
    handover.run()
    handover.check_empty()
    assert handover.arrived == [first.request_id]
    assert handover.prefill.records[second.request_id].tokens

"""vLLM's own schedulers on both sides of a hand-over, in virtual time, with stubs of workers."""

import random

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import KVConnectorOutput

from vllm_plugins.engine.cost_model import StepWork
from vllm_plugins.engine.scheduler_host import create_scheduler
from vllm_plugins.kv_connectors.pd.outbox import GoneError, Outbox
from vllm_plugins.kv_connectors.pd.reference import KEY, Reference
from vllm_plugins.simulator.config import make_config, write_model_config
from vllm_plugins.simulator.engine import VirtualEngine
from vllm_plugins.simulator.records import SimulatedRequest

BLOCK, BLOCKS = 16, 65
LEASE_S, POLL_S = 5.0, 0.004
PEER = {"address": {"host": "127.0.0.1", "port": 9}, "generation": "0" * 16}


def step_seconds(work: StepWork) -> float:
    return 0.002 + 1e-5 * work.rows


class Side(VirtualEngine):
    """One instance: vLLM's scheduler, our connector's scheduler side, and a stub of its worker."""

    def __init__(self, folder, plugin: str, handover: "Handover", scheduler=Scheduler) -> None:
        config = make_config(
            write_model_config(folder), plugin, block_size=BLOCK, max_model_len=1024,
            max_num_batched_tokens=256, max_num_seqs=16,
        )  # fmt: skip
        super().__init__(config, scheduler, step_seconds, BLOCKS)
        self.handover = handover
        self.connector = self.scheduler.connector
        self.reported: list[str] = []
        self.uncached: set[str] = set()

    def _arrive(self, request: SimulatedRequest) -> None:
        super()._arrive(request)
        if request.request_id in self.uncached:
            # What `prompt_logprobs` makes of a request.
            self.scheduler.requests[request.request_id].skip_reading_prefix_cache = True

    def _sample(self, output):
        result = super()._sample(output)
        result.kv_connector_output = self.handover.work(self, output.kv_connector_metadata)
        return result

    def _hand_out(self, item) -> None:
        super()._hand_out(item)
        self.handover.finished(self, item)


class Keeper:
    """Keeps the leases of queued prompts without a network."""

    def __init__(self, handover: "Handover") -> None:
        self.handover = handover
        self.watched: dict[str, Reference] = {}

    def watch(self, request_id: str, reference: Reference) -> None:
        self.watched[request_id] = reference

    def unwatch(self, request_id: str) -> None:
        self.watched.pop(request_id, None)

    def release(self, request_id: str) -> None:
        if request_id in self.watched:
            self.handover.outbox.release([self.watched.pop(request_id).transfer_id])

    def lost(self, request_id: str) -> bool:
        name = self.watched[request_id].transfer_id
        return not self.handover.outbox.renew([name])

    def close(self) -> None:
        pass


class Handover:
    """A prefill and a decode instance whose workers take their time."""

    def __init__(
        self, tmp_path, *, pull_s: float, threshold: float, held: float = 0.8, batch: int = 0
    ) -> None:
        self.pull_s, self.threshold = pull_s, threshold
        self.now = 0.0
        self.outbox = Outbox({"layer": 0}, LEASE_S, clock=lambda: self.now, announce_s=0.0)
        limits = f"waiting_block_prop_threshold={threshold},min_pull_tokens=1"
        batches = f",saturating_tokens={batch}" if batch else ""
        scheduler = create_scheduler if batch else Scheduler
        prefill = f"pd:role=prefill,max_held_fraction={held}{batches}"
        self.prefill = Side(tmp_path, prefill, self, scheduler)
        role = "both" if batch else "decode"
        self.decode = Side(tmp_path, f"pd:role={role},{limits}{batches}", self, scheduler)
        self.sides = (self.prefill, self.decode)
        self.keeper = Keeper(self)
        self.decode.connector._decode._keeper = self.keeper
        self.loading: dict[str, tuple[float, object]] = {}
        self.requests: dict[str, SimulatedRequest] = {}
        self.arrived: list[str] = []
        self.accepted: list[str] = []
        self.recomputed = 0
        self.most_accepted = self.most_held = 0
        self.free = [side.free_blocks for side in self.sides]

    def add(self, request: SimulatedRequest) -> None:
        self.requests[request.request_id] = request
        args = {"kv_transfer_params": {"do_remote_decode": True}}
        asked = SimulatedRequest(
            request.request_id, request.arrival_s, request.prompt, 1, extra_args=args
        )
        self.prefill.add([asked])

    def work(self, side: Side, orders) -> KVConnectorOutput:
        output = KVConnectorOutput()
        if side is self.prefill:
            self.outbox.cancel(orders.cancelled)
            for hold in orders.holds:
                self.outbox.hold(hold.transfer_id, hold.request_id, hold.digest, hold.blocks)
            output.finished_sending = self.outbox.take_freed() or None
        else:
            for load in orders.loads:
                self.accepted.append(load.request_id)
                self.loading[load.request_id] = (side.now + self.pull_s, load)
            output.finished_recving, output.failed_recving = self._pulled(side.now)
        side.reported += output.finished_sending or ()
        side.reported += output.finished_recving or ()
        return output

    def _pulled(self, now: float) -> tuple[set[str], set[str]]:
        done, failed = set(), set()
        for request_id, (ready_s, load) in list(self.loading.items()):
            if ready_s <= now:
                del self.loading[request_id]
                done.add(request_id)
                try:
                    with self.outbox.reading(load.reference.transfer_id, load.digest) as reading:
                        while reading.next(["layer"], load.spans):
                            pass
                        reading.finish(0, 1)
                except GoneError:
                    failed.add(request_id)
        self.recomputed += len(failed)
        return done, failed

    def finished(self, side: Side, item) -> None:
        if side is self.prefill and item.finish_reason is not None and item.kv_transfer_params:
            request = self.requests[item.request_id]
            # Nobody connects, but a reference without peers is malformed.
            item.kv_transfer_params[KEY]["peers"] = [PEER]
            asked = SimulatedRequest(
                request.request_id, side.now, request.prompt, request.output_tokens,
                extra_args={"kv_transfer_params": item.kv_transfer_params},
            )  # fmt: skip
            self.decode.add([asked])
            self.arrived.append(request.request_id)

    def turn(self) -> bool:
        """Let the side whose clock is behind do one step; False when nothing is left."""
        side = min(self.sides, key=lambda side: side.now)
        other = self.decode if side is self.prefill else self.prefill
        before = side.now
        side._deliver()
        if side._busy():
            side.step()
        elif not (side._events or other._events or other._busy()):
            return False
        side.now = max(side.now, before + POLL_S)
        self.now = min(s.now for s in self.sides)
        decode = self.decode.connector._decode.admission
        self.most_accepted = max(self.most_accepted, decode.accepted_blocks)
        self.most_held = max(self.most_held, self.prefill.connector._prefill.held_blocks)
        return True

    def run(self, turns: int = 200_000) -> None:
        for _ in range(turns):
            if not self.turn():
                return
        raise AssertionError("it never comes to an end")

    def check_empty(self) -> None:
        assert [side.free_blocks for side in self.sides] == self.free
        assert len(self.outbox) == 0
        assert self.prefill.connector._prefill.held_blocks == 0
        admission = self.decode.connector._decode.admission
        assert (admission.queued, admission.accepted, admission.accepted_blocks) == ([], [], 0)
        assert not self.keeper.watched
        for side in self.sides:
            assert len(side.reported) == len(set(side.reported))


def requests(count: int, seed: int, rate: float = 200.0) -> list[SimulatedRequest]:
    draw, at = random.Random(seed), 0.0
    made = []
    for i in range(count):
        at += draw.expovariate(rate)
        prompt = [draw.randrange(1, 400) for _ in range(draw.randrange(1, 400))]
        made.append(SimulatedRequest(f"r{seed}-{i}", at, prompt, draw.randrange(1, 40)))
    return made

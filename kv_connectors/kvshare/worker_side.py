"""KVShare in a worker: stores KV, and puts requests' KV together between steps."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from vllm_plugins.engine.kv_pages import KVPages
from vllm_plugins.engine.partial_forward import slot_mapping
from vllm_plugins.engine.worker_host import WorkerListener
from vllm_plugins.errors import PluginError
from vllm_plugins.kv_connectors.kvshare.blend import Blend, Kitchen, Recipe
from vllm_plugins.kv_connectors.kvshare.check_pass import CheckForward
from vllm_plugins.kv_connectors.kvshare.deviation import Budget
from vllm_plugins.kv_connectors.kvshare.device_tier import GIB, ArenaSize, DeviceTier
from vllm_plugins.kv_connectors.kvshare.disk import DiskTier, private_folder, rank_folder
from vllm_plugins.kv_connectors.kvshare.metrics import DEVIATION_BUCKETS
from vllm_plugins.kv_connectors.kvshare.payloads import Payloads, State
from vllm_plugins.kv_connectors.kvshare.refresh import Stale, refresh
from vllm_plugins.kv_connectors.kvshare.rope import PositionShift
from vllm_plugins.kv_connectors.kvshare.segment_file import KVShape
from vllm_plugins.kv_connectors.kvshare.transfer import Orders, Refresh, Results, Save

if TYPE_CHECKING:
    from pathlib import Path

    from vllm_plugins.engine.worker_host import RunnerView
    from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions

logger = init_logger("vllm.vllm_plugins.kvshare")


class WorkerSide:
    """What the connector does in one worker.

    Args:
        options: The plug-in's options, resolved.
        folder: The engine's folder in the disk tier, with a folder for each rank; None without one.
    """

    def __init__(self, options: KVShareOptions, folder: Path | None = None) -> None:
        assert options.fix_tokens_per_step is not None
        self._options = options
        self._slice = options.fix_tokens_per_step
        # One look costs no more than a slice either.
        self._refreshed_at_once = min(options.decode_k, self._slice)
        self._folder = folder
        self._kitchen: Kitchen | None = None
        self._blends: dict[str, Blend] = {}
        self._stale: dict[str, Stale] = {}
        self._ready: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._results = Results()

    def open(self, runner: RunnerView, device_tier: DeviceTier | None = None) -> None:
        """Take the model and the KV cache, once they exist.

        Args:
            runner: The worker's model and KV cache.
            device_tier: Memory that was taken for hot segments.

        Raises:
            PluginError: The model, its position embedding, its KV cache or the disk tier's folder
                cannot be served.
        """
        options = self._options
        forward = CheckForward(runner, self._slice)
        names = [forward.attention_name(layer) for layer in range(forward.num_layers)]
        pages = KVPages(runner, names)
        budget = Budget(
            options.recompute_min, options.recompute_max, options.skip_eps, options.theta
        )
        max_runs = runner.config.scheduler_config.max_num_seqs
        recipe = Recipe(
            options.check_layer, options.selector, budget, options.link_tokens, max_runs
        )
        shift = PositionShift(forward.rotary_embedding())
        payloads = self._payloads(pages, device_tier)
        self._kitchen = Kitchen(pages, forward, payloads, shift, recipe)

    def _payloads(self, pages: KVPages, device_tier: DeviceTier | None) -> Payloads:
        shape = KVShape(pages.num_layers, pages.num_heads, pages.head_size, pages.dtype)
        if device_tier is not None and device_tier.shape != shape:
            raise PluginError(
                "--plugin kvshare: device_gib",
                f"the KV cache is of another shape than the model's: {shape}",
                "drop it",
            )
        if self._folder is None:
            return Payloads(pages, device=device_tier)
        rank = rank_folder(private_folder(self._folder), get_tp_group().rank_in_group)
        disk = DiskTier(rank, shape, pages.device)
        return Payloads(pages, int(self._options.host_gib * GIB), disk, device_tier)

    def close(self) -> None:
        """Finish what is being stored; the worker ends."""
        if self._kitchen is not None:
            self._kitchen.payloads.close()

    @property
    def kitchen(self) -> Kitchen:
        """What blending works with; `open` has been called."""
        assert self._kitchen is not None
        return self._kitchen

    @torch.inference_mode()
    def between_steps(self, orders: Orders) -> None:
        """Begin what was ordered and go on with what is under way, for one slice."""
        payloads = self.kitchen.payloads
        if orders.known is not None:
            payloads.keep_only(orders.known)
        for key in orders.evicted:
            payloads.forget(key)
        payloads.poll()
        for reuse in orders.reuses:
            seed = zlib.crc32(reuse.request_id.encode())
            self._blends[reuse.request_id] = Blend(reuse, self.kitchen, seed)
        for request_id in orders.cancelled:
            # The scheduler keeps the blocks until it hears that nobody writes to them any more. It
            # may have cancelled what was complete by then, which it hears of already.
            if request_id in self._blends:
                self._end(self._blends[request_id])
        self._advance(float(self._slice - self._refresh(orders.refreshes)))

    def _refresh(self, orders: list[Refresh]) -> int:
        """Look at decoding requests, and return what that cost, in tokens.

        All of them now: until the next step, but not longer, their blocks are sure to be theirs.
        """
        looks: list[tuple[Refresh, Stale]] = []
        for order in orders:
            stale = self._stale.get(order.request_id)
            if stale is not None and stale.left > 0:
                looks.append((order, stale))
            else:
                self._stale.pop(order.request_id, None)
                self._results.refreshed[order.request_id] = 0
        if not looks:
            return 0
        kitchen = self.kitchen
        counts = refresh(looks, self._refreshed_at_once, kitchen.pages, kitchen.forward)
        for (order, _), count in zip(looks, counts, strict=True):
            self._results.refreshed[order.request_id] = count
        # A look itself is one token's work at most.
        return sum(counts) + len(looks)

    def _advance(self, budget: float) -> None:
        """Spend what is left of a step's budget on who can go on, first come first served."""
        blends = list(self._blends.values())
        states = agreed([blend.state() for blend in blends])
        failed = [b for b, state in zip(blends, states, strict=True) if state == State.FAILED]
        for blend in failed:
            self._fail(blend)
        if failed:
            # What they have lost, others may be about to read: look again first.
            return
        for blend, state in zip(blends, states, strict=True):
            if budget <= 0:
                return
            if state == State.READY:
                done, cost = blend.advance(budget)
                budget -= cost
                if done:
                    self._finish(blend)

    def _end(self, blend: Blend) -> None:
        blend.close()
        del self._blends[blend.reuse.request_id]
        self._ready.add(blend.reuse.request_id)

    def _finish(self, blend: Blend) -> None:
        self._end(blend)
        request_id = blend.reuse.request_id
        self._results.recomputed[request_id] = blend.recomputed
        if not blend.reuse.exact:
            self._results.deviations[request_id] = counted(blend.relative_deviation())
        if self._options.decode_interval and not blend.reuse.exact:
            self._stale[request_id] = blend.stale(self._options.decode_budget)

    def _fail(self, blend: Blend) -> None:
        """Let vLLM compute the whole span: what follows a hole has seen the hole."""
        reuse = blend.reuse
        logger.warning(
            "kvshare: KV is missing, damaged or not read in time; request %s computes it again",
            reuse.request_id,
        )
        self._end(blend)
        block = self.kitchen.pages.block_size
        self._failed_blocks.update(reuse.block_ids[reuse.start // block :].tolist())
        self._results.failed.add(reuse.request_id)

    @torch.inference_mode()
    def save(self, saves: list[Save]) -> None:
        """Store KV that this step completed."""
        if not saves:
            return
        block = self.kitchen.pages.block_size
        slots = [
            slot_mapping(s.block_ids, np.arange(s.position, s.position + s.length), block)
            for s in saves
        ]
        where = torch.from_numpy(np.concatenate(slots))
        where = where.to(self.kitchen.pages.device, non_blocking=True)
        self.kitchen.payloads.save(saves, where)

    def take_ready(self, ended: set[str]) -> set[str]:
        """Return the requests whose KV is complete or given up since the last call.

        Args:
            ended: Requests that ended, of which nothing need be kept.
        """
        for request_id in ended:
            self._stale.pop(request_id, None)
        ready, self._ready = self._ready, set()
        return ready

    def take_failed_blocks(self) -> set[int]:
        """Return the blocks that requests given up were to get."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_results(self) -> Results | None:
        """Return what the scheduler's part has to know, if anything."""
        results, self._results = self._results, Results()
        results.lost |= self.kitchen.payloads.take_lost()
        anything = results.lost or results.failed or results.recomputed or results.refreshed
        return results if anything else None


def counted(values: np.ndarray) -> tuple[list[int], float]:
    """Return how many values fall into each bucket of the deviation metric, and their sum."""
    buckets = np.searchsorted(DEVIATION_BUCKETS, values)
    counts = np.bincount(buckets, minlength=len(DEVIATION_BUCKETS) + 1)
    return counts.tolist(), float(values.sum())


def agreed(states: list[State]) -> list[State]:
    """Return the least of all ranks' states for each request in the making.

    What a rank has in its memory the others cannot know, and they run every slice together: one
    that went on alone would wait for the others for ever.
    """
    group = get_tp_group()
    if group.world_size == 1 or not states:
        return states
    values = torch.tensor(states, dtype=torch.int32)
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return [State(value) for value in values.tolist()]


class KVShareListener(WorkerListener):
    """Hands the model and the KV cache to the connector of this worker.

    Args:
        arena: Device memory to take for hot segments, if any.
    """

    def __init__(self, arena: ArenaSize | None = None) -> None:
        self._arena = arena
        self._tier: DeviceTier | None = None
        self._side: WorkerSide | None = None
        self._device = torch.device("cpu")

    def on_device_ready(self, device: torch.device) -> None:
        """Take note of the device."""
        self._device = device

    def on_model_loaded(self, model: torch.nn.Module) -> None:
        """Take the device tier's memory, so that the KV cache is made from what is left.

        Raises:
            PluginError: There is not enough.
        """
        if self._arena is None:
            return
        try:
            self._tier = DeviceTier(self._arena, self._device)
        except torch.OutOfMemoryError:
            raise PluginError(
                f"--plugin kvshare: device_gib={self._arena.nbytes / GIB:g}",
                "does not fit beside the weights",
                "lower it",
            ) from None

    def on_kv_cache_ready(self, runner: RunnerView) -> None:
        """Open the connector, which vLLM has made by now."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        from vllm_plugins.kv_connectors.kvshare.connector import KVShareConnector

        connector = get_kv_transfer_group()
        assert isinstance(connector, KVShareConnector)
        self._side = connector.worker
        self._side.open(runner, self._tier)

    def shutdown(self) -> None:
        """Close the connector's part of this worker."""
        if self._side is not None:
            self._side.close()

"""KVShare in a worker: stores KV, and puts requests' KV together between steps."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.logger import init_logger

from vllm_plugins.engine.kv_pages import KVPages
from vllm_plugins.engine.partial_forward import PartialForward, slot_mapping
from vllm_plugins.engine.worker_host import WorkerListener
from vllm_plugins.kv_connectors.kvshare.blend import Blend, Kitchen, Recipe
from vllm_plugins.kv_connectors.kvshare.deviation import Budget
from vllm_plugins.kv_connectors.kvshare.payloads import LostSegmentError, Payloads
from vllm_plugins.kv_connectors.kvshare.refresh import Stale, refresh
from vllm_plugins.kv_connectors.kvshare.rope import PositionShift
from vllm_plugins.kv_connectors.kvshare.transfer import Orders, Refresh, Results, Reuse, Save

if TYPE_CHECKING:
    from vllm_plugins.engine.worker_host import RunnerView
    from vllm_plugins.kv_connectors.kvshare.plugin import KVShareOptions

logger = init_logger("vllm.vllm_plugins.kvshare")


class WorkerSide:
    """What the connector does in one worker.

    Args:
        options: The plug-in's options.
    """

    def __init__(self, options: KVShareOptions) -> None:
        self._options = options
        self._kitchen: Kitchen | None = None
        self._blends: dict[str, Blend] = {}
        self._stale: dict[str, Stale] = {}
        self._ready: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._results = Results()

    def open(self, runner: RunnerView) -> None:
        """Take the model and the KV cache, once they exist.

        Raises:
            PluginError: The model, its position embedding or its KV cache cannot be served.
        """
        options = self._options
        forward = PartialForward(runner, options.fix_tokens_per_step)
        names = [forward.attention_name(layer) for layer in range(forward.num_layers)]
        pages = KVPages(runner, names)
        budget = Budget(
            options.recompute_min, options.recompute_max, options.skip_eps, options.theta
        )
        recipe = Recipe(options.check_layer, options.selector, budget, options.link_tokens)
        shift = PositionShift(forward.rotary_embedding())
        self._kitchen = Kitchen(pages, forward, Payloads(pages), shift, recipe)

    @property
    def kitchen(self) -> Kitchen:
        """What blending works with; `open` has been called."""
        assert self._kitchen is not None
        return self._kitchen

    @torch.inference_mode()
    def between_steps(self, orders: Orders) -> None:
        """Begin what was ordered and go on with what is under way, for one slice."""
        for key in orders.evicted:
            self.kitchen.payloads.forget(key)
        for reuse in orders.reuses:
            self._begin(reuse)
        for request_id in orders.cancelled:
            # The scheduler keeps the blocks until it hears that nobody writes to them any more. It
            # may have cancelled what was complete by then, which it hears of already.
            if self._blends.pop(request_id, None):
                self._ready.add(request_id)
        budget = float(self._options.fix_tokens_per_step)
        for refresh_order in orders.refreshes:
            budget -= self._refresh(refresh_order)
        self._advance(budget)

    def _refresh(self, order: Refresh) -> int:
        stale = self._stale.get(order.request_id)
        if stale is None:
            return 0
        kitchen = self.kitchen
        count = refresh(order, stale, self._options.decode_k, kitchen.pages, kitchen.forward)
        if count:
            self._results.refreshed[order.request_id] = count
        else:
            del self._stale[order.request_id]
        # The look itself is one token's work at most.
        return count + 1

    def _begin(self, reuse: Reuse) -> None:
        seed = zlib.crc32(reuse.request_id.encode())
        try:
            self._blends[reuse.request_id] = Blend(reuse, self.kitchen, seed)
        except LostSegmentError as error:
            self._fail(reuse, error)

    def _advance(self, budget: float) -> None:
        """Spend what is left of a step's budget on who waits, first come first served."""
        for blend in list(self._blends.values()):
            if budget <= 0:
                return
            try:
                done, cost = blend.advance(budget)
            except LostSegmentError as error:
                self._fail(blend.reuse, error)
                continue
            budget -= cost
            if done:
                self._finish(blend)

    def _finish(self, blend: Blend) -> None:
        request_id = blend.reuse.request_id
        del self._blends[request_id]
        self._ready.add(request_id)
        self._results.recomputed[request_id] = blend.recomputed
        if self._options.decode_interval and not blend.reuse.exact:
            self._stale[request_id] = blend.stale(self._options.decode_budget)

    def _fail(self, reuse: Reuse, error: LostSegmentError) -> None:
        """Let vLLM compute the whole span: what follows a hole has seen the hole."""
        logger.warning("kvshare: %s; request %s computes it again", error, reuse.request_id)
        self._blends.pop(reuse.request_id, None)
        self._ready.add(reuse.request_id)
        block = self.kitchen.pages.block_size
        self._failed_blocks.update(reuse.block_ids[reuse.start // block :].tolist())
        self.kitchen.payloads.forget(error.key)
        self._results.lost.add(error.key)
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
        where = torch.from_numpy(np.concatenate(slots)).to(self.kitchen.pages.device)
        self.kitchen.payloads.save({s.key: s.length for s in saves}, where)

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
        return results if results.lost or results.recomputed or results.refreshed else None


class KVShareListener(WorkerListener):
    """Hands the model and the KV cache to the connector of this worker."""

    def on_kv_cache_ready(self, runner: RunnerView) -> None:
        """Open the connector, which vLLM has made by now."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        from vllm_plugins.kv_connectors.kvshare.connector import KVShareConnector

        connector = get_kv_transfer_group()
        assert isinstance(connector, KVShareConnector)
        connector.worker.open(runner)

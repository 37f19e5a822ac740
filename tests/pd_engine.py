"""A prefill engine beside this process and a decode engine in it, with their KV's bytes at hand.

    python -m tests.pd_engine MODEL ENGINE_ARGUMENTS

is the prefill engine, driven by lines of JSON: a request, its answer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401 - the environment in which every test runs
from tests.json_process import JsonProcess, json_process
from tests.models import make_engine, plugin_samples, scheduler_of, worker_of

BLOCK = 32
# Chunks of two blocks, so that short prompts have several.
ENGINE: dict[str, Any] = {
    "block_size": BLOCK, "max_num_batched_tokens": 2 * BLOCK, "max_num_seqs": 4,
    "num_gpu_blocks_override": 64, "max_model_len": 512,
}  # fmt: skip


class Instance:
    """An engine in this process whose KV can be read.

    Attributes:
        kept: Digest by layer of the blocks of the request that ended last.
        pulled: Digest by layer of the blocks that were pulled last, as they came.
        rests: How often a step has rested because it had nothing to compute.
    """

    def __init__(self, llm: Any) -> None:
        from vllm.distributed.kv_transfer import get_kv_transfer_group

        self.llm, self.engine = llm, llm.llm_engine
        self.scheduler = scheduler_of(llm)
        self.connector = self.scheduler.connector
        self.kept: dict[str, str] = {}
        self.pulled: dict[str, str] = {}
        self._targets: list[int] = []
        for name in ("request_finished_all_groups", "update_state_after_alloc",
                     "update_connector_output"):  # fmt: skip
            setattr(self.connector, name, self._noting(name))
        self._number = 0
        self.rests = 0
        worker = get_kv_transfer_group()._worker
        self._rest, worker.rest = worker.rest, self._counted

    @property
    def has_v2(self) -> bool:
        """Whether it has model runner V2."""
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        return isinstance(worker_of(self.llm).model_runner, GPUModelRunner)

    def _counted(self) -> None:
        self.rests += 1
        self._rest()

    def _noting(self, name: str) -> Callable[..., Any]:
        """Return a method of the connector that leads through a note of the same name."""
        method, note = getattr(self.connector, name), getattr(self, f"_note_{name}")

        def noting(*args: Any) -> Any:
            note(*args)
            return method(*args)

        return noting

    def _note_request_finished_all_groups(self, request: Any, blocks: Any) -> None:
        self.kept = self._digests(*blocks)

    def _note_update_state_after_alloc(self, request: Any, blocks: Any, external: int) -> None:
        if external:
            (self._targets,) = blocks.get_block_ids()

    def _note_update_connector_output(self, output: Any) -> None:
        # No step has written behind what was pulled yet.
        if output.finished_recving:
            self.pulled = self._digests(self._targets)

    def _digests(self, blocks: list[int]) -> dict[str, str]:
        layers = self.engine.vllm_config.compilation_config.static_forward_context
        return {
            name: sha256(layer.kv_cache[blocks].numpy().tobytes()).hexdigest()
            for name, layer in layers.items()
        }

    def add(
        self, prompt: Sequence[int], tokens: int = 8, params: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:  # fmt: skip
        """Take a greedy request.

        Args:
            prompt: Token ids.
            tokens: How many to generate.
            params: ``kv_transfer_params``.
            **more: Further parts of the prompt.
        """
        from vllm import SamplingParams

        extra = {"kv_transfer_params": params} if params else None
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra
        )
        self._number += 1
        whole = {"prompt_token_ids": list(prompt), **more}
        self.engine.add_request(f"r{self._number}", whole, sampling)

    def run(self, until: Callable[[], bool] | None = None) -> Any:
        """Step until a request has ended, and return its output, or until something holds."""
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    return output
            if until is not None and until():
                return None
        raise AssertionError("there is no request")

    def answer(self) -> list[int]:
        """Step until a request has ended, and return what was generated."""
        return list(self.run().outputs[0].token_ids)

    def greedy(self, prompt: Sequence[int], *args: Any, **more: Any) -> list[int]:
        """Return what is generated for a prompt; the arguments are those of `add`."""
        self.add(prompt, *args, **more)
        return self.answer()

    def metric(self, name: str) -> float:
        """Return the sum of a metric of pd over its labels, of this process."""
        found = (one for one in plugin_samples() if one.name == f"vllm_plugins:pd_{name}")
        return sum(one.value for one in found)

    def drain(self) -> None:
        """Step until nothing is kept for anybody."""
        while self.connector._prefill.held_blocks or self.connector.has_pending_push_work():
            self.engine.step()


class PrefillEngine:
    """The prefill engine beside this process."""

    def __init__(self, process: JsonProcess) -> None:
        self._process = process
        self.has_v2 = self.answer()["v2"]

    def order(self, prompt: Sequence[int], **params: Any) -> None:
        """Have a prompt prefilled and kept."""
        params = {"do_remote_decode": True} | params
        self._process.send({"prompt": list(prompt), "params": params})

    def answer(self) -> dict[str, Any]:
        """Return the answer to the oldest order that has none."""
        return self._process.read()


@contextmanager
def prefill_engine(model: Path, plugin: str) -> Iterator[PrefillEngine]:
    """Run a prefill engine in a process of its own."""
    with json_process("tests.pd_engine", str(model), plugin) as process:
        yield PrefillEngine(process)


@contextmanager
def instance(model: Path, plugin: str) -> Iterator[Instance]:
    """Run an engine in this process."""
    import vllm_plugins

    with make_engine(model, **ENGINE, **vllm_plugins.engine_args(plugin)) as llm:
        yield Instance(llm)


def main() -> None:
    """Prefill until standard input ends, and keep each prompt until it is pulled."""
    model, plugin = Path(sys.argv[1]), sys.argv[2]
    # Python and what it loads print to standard output, which is for answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with instance(model, plugin) as mine:
        print(json.dumps({"v2": mine.has_v2}), file=answers, flush=True)
        for line in sys.stdin:
            order = json.loads(line)
            mine.add(order["prompt"], 1, order["params"])
            params = mine.run().kv_transfer_params
            found = {"params": params, "digests": mine.kept}
            print(json.dumps(found), file=answers, flush=True)
            mine.drain()


if __name__ == "__main__":
    main()

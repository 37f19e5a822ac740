"""An encode engine beside this process and a prefill engine in it, and how they are driven."""

import json
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from vision import IMAGE_TOKEN, tiny_llava

import vllm_plugins
from tests.epd_encode_server import EncoderCounter
from tests.json_process import JsonProcess, json_process
from tests.models import make_engine, scheduler_of, worker_of

ENGINE: dict[str, Any] = {
    "max_model_len": 512,
    "block_size": 32,
    "limit_mm_per_prompt": {"image": 8},
    # What one test has computed must not spare another its work.
    "enable_prefix_caching": False,
}
ARENA = 1 << 20
END = [9, 10, 11]


def image(seed: int, size: int = 56) -> Any:
    """Return a random picture."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompt_of(
    images: list[int], size: int = 56, start: list[int] | None = None, ids: list[str] | None = None
) -> dict[str, Any]:
    """Return a prompt with text before, between and after images, each before token 20 + i.

    Args:
        images: Seeds.
        size: Of the pictures, in pixels.
        start: Tokens before the first image.
        ids: Media ids of the images.
    """
    tokens = [1, 7] if start is None else list(start)
    for i in range(len(images)):
        tokens += [IMAGE_TOKEN, 20 + i]
    prompt: dict[str, Any] = {"prompt_token_ids": tokens + END}
    if images:
        prompt["multi_modal_data"] = {"image": [image(seed, size) for seed in images]}
    if ids:
        prompt["multi_modal_uuids"] = {"image": ids}
    return prompt


class Encoder:
    """The encode engine beside this process."""

    def __init__(self, process: JsonProcess) -> None:
        self._process = process
        self.answer = process.read()

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Send an order and return the answer."""
        self._process.send({"do": do, **order})
        self.answer = self._process.read()
        return self.answer

    def await_params(self, ids: list[str], known: dict[str, Any]) -> dict[str, Any]:
        """Return parameters of items that are yet to be encoded.

        Args:
            ids: Of the items.
            known: Parameters of an item that was encoded before.
        """
        where = next(iter(known.values()))["vllm_plugins_epd"]
        awaited = {name: where[name] for name in ("address", "generation")} | {"awaited": True}
        return {name: {"vllm_plugins_epd": awaited} for name in ids}

    def encode(self, images: list[int], **kwargs: Any) -> dict[str, Any]:
        """Have images encoded; return their parameters by media id."""
        return self.ask("encode", images=images, **kwargs)["params"] or {}


@contextmanager
def encode_engine(
    model: Path | None = None, plugin: str = "", **arguments: Any
) -> Iterator[Encoder]:
    """Run an encode engine in a process of its own.

    Args:
        model: Folder; the tiny LLaVA by default.
        plugin: Further options of the plug-in.
        **arguments: Further engine arguments.
    """
    spec = f"epd:role=encode,arena_bytes={ARENA}" + (f",{plugin}" if plugin else "")
    options = json.dumps(ENGINE | arguments | {"plugin": spec})
    folder = str(model or tiny_llava())
    with json_process("tests.epd_encode_server", folder, options) as process:
        yield Encoder(process)


class HeldFetches:
    """Stands before a fetcher and holds every fetch until it is let go, in any order."""

    def __init__(self, fetcher: Any) -> None:
        self.fetcher = fetcher
        self.held: dict[str, Callable[[], None]] = {}
        self.done: deque[str] = deque()

    def fetch(
        self, entry: Any, source: Any, deadline: float, done: Callable[[str, str], None]
    ) -> None:
        def go() -> None:
            self.fetcher.fetch(entry, source, deadline, done)

        self.held[entry.media] = go

    def let_go(self, media: str) -> None:
        """Let one fetch begin."""
        self.held.pop(media)()

    def release(self, source: Any, media: str) -> None:
        self.fetcher.release(source, media)

    def renew(self, source: Any) -> None:
        self.fetcher.renew(source)


class Prefill:
    """A prefill engine in this process, with access to what the plug-in keeps there."""

    def __init__(self, llm: Any) -> None:
        self.llm, self.engine = llm, llm.llm_engine
        self.scheduler = scheduler_of(llm)
        self.counter = None
        if llm.llm_engine.vllm_config.parallel_config.distributed_executor_backend == "uni":
            self.counter = EncoderCounter(worker_of(llm).model_runner)
        self.free_blocks = self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        self.steps: list[dict[str, int]] = []
        self._schedule = self.scheduler.schedule
        self.scheduler.schedule = self._traced
        self._number = 0

    @property
    def side(self) -> Any:
        """The scheduler's side of the plug-in."""
        return self.scheduler.ec_connector.scheduler

    def _traced(self, *args: Any, **kwargs: Any) -> Any:
        output = self._schedule(*args, **kwargs)
        if output.num_scheduled_tokens:
            names = {name.rsplit("-", 1)[0]: n for name, n in output.num_scheduled_tokens.items()}
            self.steps.append(names)
        return output

    def add(
        self,
        images: list[int],
        params: dict[str, Any] | None,
        tokens: int = 8,
        start: list[int] | None = None,
        ids: list[str] | None = None,
    ) -> str:
        """Send a request and return its name."""
        from vllm import SamplingParams

        extra = {"ec_transfer_params": params} if params else None
        sampling = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra
        )
        self._number += 1
        name = f"r{self._number}"
        prompt = prompt_of(images, start=start, ids=ids)
        self.engine.add_request(name, prompt, sampling)
        return name

    def finish(self, until: Callable[[dict[str, Any]], bool] | None = None) -> dict[str, Any]:
        """Step until all requests have ended, or something holds; return the outputs by name."""
        ended: dict[str, Any] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if output.finished:
                    ended[output.request_id] = output.outputs[0]
            if until is not None and until(ended):
                break
        return ended

    def greedy(self, images: list[int], params: dict[str, Any] | None, **kwargs: Any) -> list[int]:
        """Serve one request and return its tokens."""
        name = self.add(images, params, **kwargs)
        return list(self.finish()[name].token_ids)

    def publish(self, images: list[int]) -> dict[str, Any]:
        """Have a colocated engine publish what it encodes; return the parameters by media id."""
        from vllm import SamplingParams

        extra = {"ec_transfer_params": {"vllm_plugins_epd": {"publish": True}}}
        sampling = SamplingParams(temperature=0, max_tokens=1, extra_args=extra)
        [output] = self.llm.generate([prompt_of(images)], sampling, use_tqdm=False)
        return output.ec_transfer_params

    def forget(self) -> None:
        """Drop what is cached, as when the weights change."""
        self.llm.llm_engine.reset_encoder_cache()

    def empty_encoder_cache(self) -> None:
        """Drop what is in vLLM's encoder cache, and nothing of the arena."""
        from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

        EncoderCacheManager.reset(self.scheduler.encoder_cache_manager)
        worker_of(self.llm).model_runner.reset_encoder_cache()

    def assert_idle(self) -> None:
        """Nothing is held for anybody."""
        self.greedy([], None, tokens=1)
        self.side.arena.check()
        assert self.side.arena.available_blocks == self.side.arena.num_blocks
        assert not self.side.prefill._requests
        assert not self.side.prefill._fetching
        assert not self.side.prefill._failed
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == self.free_blocks


@contextmanager
def prefill_engine(
    model: Path | None = None, plugin: str = "", role: str = "prefill", **arguments: Any
) -> Iterator[Prefill]:
    """Run a prefill engine in this process.

    Args:
        model: Folder; the tiny LLaVA by default.
        plugin: Further options of the plug-in.
        role: Its role.
        **arguments: Further engine arguments.
    """
    spec = f"epd:role={role},arena_bytes={ARENA}" + (f",{plugin}" if plugin else "")
    options = ENGINE | arguments | vllm_plugins.engine_args(spec)
    with make_engine(model or tiny_llava(), **options) as llm:
        yield Prefill(llm)

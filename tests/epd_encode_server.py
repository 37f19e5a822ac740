"""An encode engine in a process of its own, driven by lines of JSON: one request, one answer.

    python -m tests.epd_encode_server MODEL ENGINE_ARGUMENTS

Requests: ``{"do": "encode", "images": [seed, ...]}``, ``{"do": "rows", "media": id}``,
``{"do": "damage", "media": id}``, ``{"do": "arena"}``.
"""

import json
import sys
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401 - the environment in which every test runs


def main() -> None:
    """Serve until standard input ends."""
    import vllm_plugins
    from tests.models import make_engine, scheduler_of, worker_of

    model, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    # vLLM prints to standard output, which is for answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    plugin = vllm_plugins.engine_args(options.pop("plugin"))
    with make_engine(model, **options, **plugin) as llm:
        counter = EncoderCounter(worker_of(llm).model_runner)
        answers.write(json.dumps({"ready": True}) + "\n")
        answers.flush()
        for line in sys.stdin:
            order = json.loads(line)
            answer = globals()[f"do_{order.pop('do')}"](llm, scheduler_of(llm), **order)
            answers.write(json.dumps(answer | {"encoded": counter.items}) + "\n")
            answers.flush()


class EncoderCounter:
    """Counts the items that an engine's encoder is given."""

    def __init__(self, runner: Any) -> None:
        self.items = 0
        self._encode = runner.model.embed_multimodal
        runner.model.embed_multimodal = self._counted

    def _counted(self, **kwargs: Any) -> Any:
        output = self._encode(**kwargs)
        self.items += len(output)
        return output


def do_encode(
    llm: Any, scheduler: Any, images: list[int], ids: list[str] | None = None
) -> dict[str, Any]:
    """Encode images; the answer has the server's ``ec_transfer_params``."""
    from vllm import SamplingParams

    from tests.epd_engine import prompt_of

    prompt = prompt_of(images, ids=ids)
    output = llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)[0]
    return {
        "params": output.ec_transfer_params,
        "tokens": len(output.outputs[0].token_ids),
        "reason": output.outputs[0].finish_reason,
    }


def do_rows(llm: Any, scheduler: Any, media: str) -> dict[str, Any]:
    """Return what the encoder gave for an item, in hexadecimal."""
    from tests.models import worker_of

    tensor = worker_of(llm).model_runner.encoder_cache[media]
    return {"rows": tensor.contiguous().numpy().tobytes().hex()}


def do_damage(llm: Any, scheduler: Any, media: str) -> dict[str, Any]:
    """Flip a bit of an item in the arena."""
    side = scheduler.ec_connector.scheduler
    entry = side.arena.find(media)
    side.memory.rows(entry.blocks, entry.shape, 0, 1)[0][5] ^= 1
    return {}


def do_arena(llm: Any, scheduler: Any) -> dict[str, Any]:
    """Check the arena and say how much of it is available."""
    arena = scheduler.ec_connector.scheduler.arena
    arena.check()
    return {"available": arena.available_blocks, "blocks": arena.num_blocks}


if __name__ == "__main__":
    main()

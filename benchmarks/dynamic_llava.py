"""What Dynamic-LLaVA saves and what it costs: first tokens, cache pages, and right answers.

    python benchmarks/dynamic_llava.py ttft [--layers 16] [--width 512] [--rounds 5] [--out F.json]
    python benchmarks/dynamic_llava.py memory [--requests 8] [--answer 256] [--out F.json]
    python benchmarks/dynamic_llava.py accuracy [--images 50] [--out F.json]

`ttft` times the first token of a prompt that is one image of 576 tokens and a short question, on a
random LLaVA, stock and at several keep rates, which take turns, each in an engine of its own.
`memory` counts the bytes of cache that requests hold where their answers begin and after so many
tokens, with answer tokens forgotten too, and what share of them was not. `accuracy` asks the
scenes models questions, at several keep rates and with every scorer, through the engine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "models"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from in_process import counted, engine, worker, write

RATES = (1.0, 0.5, 0.25, 0.1)
PIXELS, IMAGE_TOKENS = 336, 576
STOCK = "stock"
BLOCK = 32
WARM_UP = 2
PLAIN = "plain model, stock"
SCORERS = ("predictor", "attention", "norm", "random")
RESAMPLED = 10_000


def plugin(rate: float, scorer: str, **options: Any) -> str:
    """Return what is given to ``--plugin``."""
    words = {"image_keep_rate": rate, "image_scorer": scorer, **options}
    return "dynamic_llava:" + ",".join(f"{key}={value}" for key, value in words.items())


def asked(seed: int, words: int = 24) -> dict[str, Any]:
    """Return a prompt: an image of noise and some random text."""
    from PIL import Image
    from vision import IMAGE_TOKEN

    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)
    ids = [10, IMAGE_TOKEN, *rng.integers(10, 60, words).tolist()]
    return {"prompt_token_ids": ids, "multi_modal_data": {"image": Image.fromarray(noise)}}


def settings(**more: Any) -> dict[str, Any]:
    """Return engine arguments that stock and plug-in have in common."""
    return {"block_size": BLOCK, "max_model_len": 1024, "max_num_batched_tokens": 2048, **more}


def random_llava(args: argparse.Namespace) -> Path:
    """Return a random LLaVA of the size asked for."""
    from vision import tiny_llava

    return tiny_llava(width=args.width, layers=args.layers, positions=1024, pixels=PIXELS)


def with_predictors(args: argparse.Namespace, **values: Any) -> Path:
    """Return the random LLaVA with random predictors beside it.

    The predictors are to the model what the published ones are to a 7B model: 512 of 4,096 channels
    and two blocks, so that their share of the time is of the same kind.

    Args:
        args: Of the command line.
        **values: Of the checkpoint's ``sparse_config``, beside the sizes.
    """
    from build_once import CACHE, build_once

    plain = random_llava(args)
    width = args.width // 8
    values |= {"d_model": width, "nhead": max(1, width // 64), "dim_feedforward": 4 * width}
    stamp = json.loads((plain / "made_from.json").read_text())
    made_from = {"plain": stamp, "sparse_config": values, "format": 4}

    def build(folder: Path) -> None:
        import torch

        from vllm_plugins.visual_tokens.dynamic_llava.checkpoint import save_predictors
        from vllm_plugins.visual_tokens.dynamic_llava.predictors import Predictors
        from vllm_plugins.visual_tokens.dynamic_llava.sparse_config import KEY, SparseConfig

        shutil.copytree(plain, folder, dirs_exist_ok=True)
        sparse = SparseConfig.of(values, "benchmark")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {KEY: sparse.model_dump()}))
        torch.manual_seed(0)
        predictors = Predictors(args.width, sparse)
        if predictors.text_predictor is not None:
            make_undecided(predictors.text_predictor, plain, sparse.sparse_layer)
        save_predictors(folder, predictors, torch.float32)

    kind = "text" if values["text_keep_rate"] < 1 else "image"
    return build_once(CACHE / f"{plain.name}-{kind}-predictors", made_from, build)


def make_undecided(predictor: Any, plain: Path, layer: int) -> None:
    """Have a random text predictor keep half of a text of random words behind a noisy image."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from vllm_plugins.visual_tokens.dynamic_llava.decoder import Decoder
    from vllm_plugins.visual_tokens.dynamic_llava.reference import causal_mask

    length = 256
    with torch.no_grad():
        model = LlavaForConditionalGeneration.from_pretrained(plain, dtype=torch.float32)
        decoder, config = Decoder(model), model.config
        text = torch.randint(config.text_config.vocab_size, (1, length))
        text[text == config.image_token_id] += 1
        noise = asked(0)["multi_modal_data"]["image"]
        seen = AutoProcessor.from_pretrained(plain).image_processor(noise, return_tensors="np")
        pixels = torch.from_numpy(np.asarray(seen["pixel_values"]))
        image = torch.full((1, IMAGE_TOKENS), config.image_token_id)
        embedded = decoder.embed(torch.cat((image, text), 1), decoder.image_features(pixels))
        rows = embedded.shape[1]
        mask = causal_mask(rows, embedded)
        hidden = decoder.run(embedded, range(layer), torch.arange(rows)[None], mask)
        keep, drop = predictor(hidden)[0, -length:].unbind(-1)
        predictor.head[-1].bias[0] -= (keep - drop).median()


def seconds(llm: Any, prompts: list[dict[str, Any]]) -> list[float]:
    """Return the CPU time until each prompt's first token.

    The engine runs in this process, so that on one thread this is the time that it takes on an idle
    core. Decoding and scaling the image are part of it.
    """
    from vllm import SamplingParams

    found = []
    for prompt in prompts:
        began = time.process_time()
        llm.generate([prompt], SamplingParams(max_tokens=1), use_tqdm=False)
        found.append(time.process_time() - began)
    return found


def ttft(args: argparse.Namespace) -> dict[str, Any]:
    """Time first tokens, variant by variant and round by round."""
    predicts = args.scorer == "predictor"
    model = with_predictors(args, text_keep_rate=1.0) if predicts else random_llava(args)
    variants = {STOCK: None} | {f"keep {r:g}": plugin(r, args.scorer) for r in args.rates}
    rounds: list[dict[str, list[float]]] = []
    for number in range(args.rounds):
        row = {}
        # Each begins as often as it ends.
        for name in list(variants)[:: 1 if number % 2 == 0 else -1]:
            spec = variants[name]
            with engine(model, *([spec] if spec else []), **settings()) as llm:
                first = 1000 * number
                seconds(llm, [asked(first + i) for i in range(WARM_UP)])
                row[name] = seconds(llm, [asked(first + WARM_UP + i) for i in range(args.prompts)])
        rounds.append(row)
        print({name: statistics.median(times) for name, times in row.items()}, flush=True)
    shape = {"layers": args.layers, "width": args.width, "image_tokens": IMAGE_TOKENS}
    return {"shape": shape, "scorer": args.scorer, "summary": compared(rounds), "rounds": rounds}


def compared(rounds: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Return for each variant its time, and how many times faster than stock, prompt by prompt."""
    summary = {}
    for name in rounds[0]:
        ratios = [
            stock / ours
            for row in rounds
            for stock, ours in zip(row[STOCK], row[name], strict=True)
        ]
        low, median, high = np.quantile(ratios, (0.1, 0.5, 0.9)).tolist()
        times = [t for row in rounds for t in row[name]]
        summary[name] = {
            "ttft_cpu_s": statistics.median(times),
            "stock_over_this": {"median": median, "p10": low, "p90": high},
        }
        print(f"{name:10} {summary[name]}", flush=True)
    return summary


def held_bytes(llm: Any, requests: int, answer: int) -> tuple[int, int, float]:
    """Return what requests hold once all of them decode, and at the end.

    Args:
        llm: The engine.
        requests: Their number.
        answer: Tokens that each of them has generated by then.

    Returns:
        Bytes of cache at either time, and the share of the answers that upper layers hold last.
    """
    from vllm import SamplingParams

    core = llm.llm_engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    caches = {cache.data_ptr(): cache.nbytes for cache in worker(llm).model_runner.kv_caches}
    for i in range(requests):
        # None may end before the last of them is so far.
        params = SamplingParams(max_tokens=answer + requests, ignore_eos=True)
        llm.llm_engine.add_request(str(i), asked(i), params)

    def held_after(tokens: int) -> int:
        scheduler = core.scheduler
        while scheduler.waiting or any(r.num_output_tokens < tokens for r in scheduler.running):
            llm.llm_engine.step()
        assert len(scheduler.running) == requests
        used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        return int(used * sum(caches.values()) // pool.num_gpu_blocks)

    first, last = held_after(2), held_after(answer)
    kept = kept_of_answers(llm)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return first, last, kept


def kept_of_answers(llm: Any) -> float:
    """Return the share of the tokens of running requests' answers that upper layers hold."""
    view = getattr(worker(llm).model_runner.get_model(), "hole_view", None)
    counters = getattr(view, "forgotten", None)
    if counters is None:
        return 1.0
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    manager, running = scheduler.kv_cache_manager, scheduler.running
    # Of the upper layers' tables the first.
    firsts = [manager.get_block_ids(request.request_id)[1][0] for request in running]
    answered = sum(request.num_computed_tokens - request.num_prompt_tokens for request in running)
    return 1 - int(counters[firsts].sum()) / answered


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Count what requests hold, stock, with blocks given back, and with tokens forgotten."""
    plain = random_llava(args)
    halves = {"image_keep_rate": 1.0, "text_keep_rate": 0.5, "sparse_layer": args.prune_layer}
    forgetful = with_predictors(args, **halves)
    variants: dict[str, tuple[Path, list[str]]] = {STOCK: (plain, [])}
    for rate in (r for r in args.rates if r < 1):
        freeing = {"prune_layer": args.prune_layer, "free_hole_blocks": "true"}
        variants[f"keep {rate:g}"] = plain, [plugin(rate, args.scorer, **freeing)]
        spec = plugin(rate, args.scorer, **freeing, text_keep="true")
        variants[f"keep {rate:g} and forget"] = forgetful, [spec]
    more = {"max_num_seqs": args.requests, "enable_prefix_caching": False}
    first, last, kept = {}, {}, {}
    for name, (model, spec) in variants.items():
        with engine(model, *spec, **settings(**more)) as llm:
            first[name], last[name], kept[name] = held_bytes(llm, args.requests, args.answer)
        held = f"{first[name] / 2**20:.1f}, {last[name] / 2**20:.1f} MiB"
        print(f"{name:20} {held}, {kept[name]:.0%} of the answers kept", flush=True)
    return {
        "shape": {"layers": args.layers, "width": args.width, "prune_layer": args.prune_layer},
        "requests": args.requests,
        "held_bytes": first,
        "share_of_stock": shares(first),
        "answer_tokens": args.answer,
        "answer_tokens_kept": kept,
        "held_bytes_after_answers": last,
        "share_of_stock_after_answers": shares(last),
    }


def shares(held: dict[str, int]) -> dict[str, float]:
    """Return what is held as a share of what stock holds."""
    return {name: size / held[STOCK] for name, size in held.items()}


def accuracy(args: argparse.Namespace) -> dict[str, Any]:
    """Return shares of right answers to held-out scenes' questions."""
    from scenes import scenes
    from scenes_dynamic import scenes_dynamic
    from scenes_evaluate import held_out

    drawn = held_out(args.images, seed=args.seed)
    found: dict[str, Any] = {}
    # The plain model is what was there before; the other was trained to go without tokens.
    plain, trained = scenes(), scenes_dynamic()
    cases = [(PLAIN, plain, None), ("trained model, stock", trained, None)]
    for rate in (r for r in args.rates if r < 1):
        cases += [
            (f"trained model, {scorer} {rate:g}", trained, plugin(rate, scorer))
            for scorer in args.scorers
        ]
        cases.append((f"plain model, attention {rate:g}", plain, plugin(rate, "attention")))
    scene = np.repeat(np.arange(len(drawn)), [len(s.questions) for s in drawn])
    right: dict[str, np.ndarray] = {}
    for name, model, spec in cases:
        right[name], kept = right_answers(model, spec, drawn)
        share = float(right[name].mean())
        found[name] = {
            "right": share,
            "standard_error": (share * (1 - share) / len(scene)) ** 0.5,
            "questions": len(scene),
            "image_tokens_kept": kept,
            "of_plain": share_of(right[name], right[PLAIN], scene),
        }
        print(f"{name:32} {found[name]}", flush=True)
    return {"images": args.images, "seed": args.seed, "block_size": BLOCK, "answers": found}


def share_of(ours: np.ndarray, whole: np.ndarray, scene: np.ndarray) -> dict[str, float]:
    """Return how many times as many answers are right, with a 95 % interval.

    Scenes are drawn with replacement, each with all its questions, which both models were asked.

    Args:
        ours: Whether each question was answered rightly, bool, shape (questions,).
        whole: The same of the model that sees everything.
        scene: Which scene each question is about, int64, shape (questions,).
    """
    per_scene = np.stack([np.bincount(scene, weights=x) for x in (ours, whole)])
    count = per_scene.shape[1]
    drawn = np.random.default_rng(0).integers(0, count, (RESAMPLED, count))
    mine, all_seen = per_scene[:, drawn].sum(-1)
    low, high = np.quantile(mine / all_seen, (0.025, 0.975)).tolist()
    return {"share": float(ours.sum() / whole.sum()), "low": low, "high": high}


def right_answers(model: Path, spec: str | None, drawn: list[Any]) -> tuple[np.ndarray, float]:
    """Ask everything of a model; return which answers are right, and the share of tokens kept."""
    from scenes_data import ID, VOCABULARY
    from scenes_model import BOS, EOS, IMAGE_TOKEN
    from vllm import SamplingParams

    questions = [(scene, q) for scene in drawn for q in scene.questions]
    prompts = [
        {
            "prompt_token_ids": [BOS, IMAGE_TOKEN, *(ID[word] for word in q.text.split())],
            "multi_modal_data": {"image": scene.image},
        }
        for scene, q in questions
    ]
    name, labels = "dynamic_llava_image_tokens_total", ("kept", "dropped")
    # A hit of the prefix cache would leave the attention of the question unread.
    arguments = settings(enable_prefix_caching=False, limit_mm_per_prompt={"image": 1})
    with engine(model, *([spec] if spec else []), **arguments) as llm:
        before = {fate: counted(name, fate=fate) for fate in labels}
        outputs = llm.generate(
            prompts, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False
        )
        kept, dropped = (counted(name, fate=fate) - before[fate] for fate in labels)
    right = []
    for (_, question), output in zip(questions, outputs, strict=True):
        told = [VOCABULARY[t] for t in output.outputs[0].token_ids if t != EOS]
        right.append(" ".join(told) == question.answer)
    return np.array(right), kept / (kept + dropped) if kept + dropped else 1.0


def main() -> int:
    """Run one of the three and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("what", choices=("ttft", "memory", "accuracy"))
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--scorer", default="norm", help="where nothing is trained")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--prune-layer", type=int, default=2, help="of `memory`")
    parser.add_argument("--requests", type=int, default=8, help="of `memory`")
    parser.add_argument("--answer", type=int, default=256, help="tokens, of `memory`")
    parser.add_argument("--prompts", type=int, default=5, help="of `ttft`, in a round")
    parser.add_argument("--rounds", type=int, default=4, help="of `ttft`")
    parser.add_argument("--images", type=int, default=50, help="of `accuracy`")
    parser.add_argument("--scorers", nargs="+", default=SCORERS, help="of `accuracy`")
    parser.add_argument("--seed", type=int, default=0, help="of `accuracy`")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = {"ttft": ttft, "memory": memory, "accuracy": accuracy}[args.what](args)
    write(args.out, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

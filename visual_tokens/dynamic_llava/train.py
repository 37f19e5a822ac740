"""``vllm-plugins train dynamic_llava``: fine-tune a LLaVA together with its predictors.

The folder of the run becomes the checkpoint that ``--plugin dynamic_llava`` serves; see
`checkpoint`. Defaults are the paper's (appendix A.1), but for the limit of the gradient's norm, 1,
which it does not give [G].

Each process holds the whole model and 16 bytes for each trained parameter: weights, gradient and
two moments in float32; a 7B model wants 140 GB (the README counts them), and a 13B model sharding,
which there is not. ``--lr 0`` trains predictors alone, in any memory that serves the model in
float32; that is not the paper's method.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_plugins.errors import PluginError
from vllm_plugins.training import arguments
from vllm_plugins.visual_tokens.dynamic_llava.sparse_config import SparseConfig

if TYPE_CHECKING:
    from vllm_plugins.training.batches import Collator
    from vllm_plugins.training.data import Sample
    from vllm_plugins.training.loop import LoopOptions, Trainer
    from vllm_plugins.training.processes import Processes
    from vllm_plugins.visual_tokens.dynamic_llava.student import Student

WHERE = "train dynamic_llava"
# A run is resumed with the same. Sizes are told by the weights.
_LASTING = ("lr", "predictor_lr", "weight", "long_answer", "varied", "image_keep_rate",
            "text_keep_rate", "sparse_layer", "nhead")  # fmt: skip
_SIZES = {
    "sparse_layer": "decoder layer whose input the predictors read",
    "d_model": "width of the predictors",
    "nhead": "attention heads of the image predictor",
    "dim_feedforward": "width of its feed-forward parts",
    "num_layers": "its blocks",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", help="LLaVA to train: a folder or a name on the Hugging Face hub")
    arguments.add_arguments(
        parser, arguments.Defaults(batch=64, schedule="cosine", warmup=0.03, clip=1.0)
    )
    positive = arguments.at_least(0, float)
    add = parser.add_argument_group("dynamic_llava").add_argument
    add("--lr", type=positive, default=5e-6, help="of the model; 0 freezes it (default: 5e-06)")
    add("--predictor-lr", type=positive, default=2e-4, help="default: 0.0002")
    add("--lambda", type=positive, default=100.0, dest="weight", metavar="WEIGHT",
        help="weight of the keep rates' terms (default: 100)")  # fmt: skip
    add("--long-answer", type=arguments.at_least(1), default=50, metavar="TOKENS",
        help="answers from this length on lose tokens (default: 50)")  # fmt: skip
    add("--varied", type=arguments.share, default=0.0, metavar="SHARE",
        help="share of images seen in larger part than the keep rate, by the best tokens up to a "
        "random part, so that one model serves at all rates; not the paper's (default: 0)"
    )  # fmt: skip
    add("--recompute", action="store_true",
        help="compute layers again in the backward pass, which saves memory")  # fmt: skip
    fields = SparseConfig.model_fields
    for kind in ("image", "text"):
        name = f"{kind}_keep_rate"
        add(f"--{name.replace('_', '-')}", type=float, default=fields[name].default,
            metavar="SHARE", help=f"share of {kind} tokens to keep; 1 trains no predictor for "
            f"them (default: {fields[name].default})")  # fmt: skip
    for name, text in _SIZES.items():
        default = fields[name].default
        add(f"--{name.replace('_', '-')}", type=int, default=default,
            help=f"{text} (default: {default})")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Train, and write the checkpoint.

    Returns:
        0, or 130 when training was interrupted and can be resumed.

    Raises:
        PluginError: Model, data or an option cannot be used.
    """
    from vllm_plugins.training.processes import processes

    names = ("image_keep_rate", "text_keep_rate", *_SIZES)
    config = SparseConfig.of({name: getattr(args, name) for name in names}, WHERE)
    if args.varied and config.image_keep_rate == 1:
        reason = "image_keep_rate is 1, so that all images are seen whole"
        raise PluginError(f"{WHERE}: --varied", reason, "leave it out")
    arguments.check_folder(args)
    if not args.no_plot:
        from vllm_plugins.cli.pictures import pyplot

        # Rather now than after hours of training.
        pyplot()
    with processes(args.device) as ranks:
        return _train(args, config, ranks)


def _train(args: argparse.Namespace, config: SparseConfig, ranks: Processes) -> int:
    from vllm_plugins.training.data import read_samples, split_samples
    from vllm_plugins.training.pictures import check_pictures

    source = model_folder(args.model)
    samples = read_samples(args.data, args.images, images_only=True)
    trained, held_out = split_samples(samples, args.held_out, args.seed)
    options = replace(
        arguments.loop_options(args, len(trained), ranks.count),
        technique={name: getattr(args, name) for name in _LASTING},
    )
    check_pictures(samples, ranks, args.device)
    student = load_student(source, config, args, options)
    trainer = _trainer(student, trained, held_out, source, args, options, ranks)
    if args.resume:
        trainer.resume()
    if not trainer.run():
        return arguments.INTERRUPTED
    if ranks.first:
        _finish(args, student, source)
    ranks.wait()
    return 0


def model_folder(name: str) -> Path:
    """Return the folder of a model, which is downloaded if it is not one.

    Raises:
        PluginError: There is no such model.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = f"is no folder and was not downloaded ({type(error).__name__})"
        raise PluginError(name, reason, "name a LLaVA folder") from None


def load_student(
    source: Path, config: SparseConfig, args: argparse.Namespace, options: LoopOptions
) -> Student:
    """Return the model with fresh predictors: trained parts in float32, frozen ones as asked.

    Args:
        source: Folder of the model.
        config: Of the predictors, whose weights follow from the seed.
        args: Of the command.
        options: Device, precision and seed.

    Raises:
        PluginError: The model is none that can be trained.
    """
    import torch
    from transformers import AutoConfig, LlavaForConditionalGeneration

    from vllm_plugins.visual_tokens.dynamic_llava.decoder import check_model
    from vllm_plugins.visual_tokens.dynamic_llava.predictors import Predictors
    from vllm_plugins.visual_tokens.dynamic_llava.student import Student

    described = AutoConfig.from_pretrained(source)
    check_model(described, config.sparse_layer, args.model)
    model = LlavaForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    torch.manual_seed(options.seed)
    predictors = Predictors(described.text_config.hidden_size, config)
    student = Student(model, predictors, args.weight, args.long_answer, args.varied)
    if args.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.lr == 0:
        model.requires_grad_(False)
    for part in student.frozen():
        part.to(options.dtype)
    return student.to(options.device).train()


def _trainer(
    student: Student,
    trained: Sequence[Sample],
    held_out: Sequence[Sample],
    source: Path,
    args: argparse.Namespace,
    options: LoopOptions,
    ranks: Processes,
) -> Trainer:
    from transformers import AutoProcessor

    from vllm_plugins.training.batches import Collator
    from vllm_plugins.training.loop import Trainer

    processor = AutoProcessor.from_pretrained(source)
    collator = Collator(processor, student.model.config.image_token_id, args.max_tokens)
    rates = {student.model: args.lr, student.predictors: args.predictor_lr}
    groups = [
        {"params": parameters, "lr": rate, "weight_decay": 0.0}
        for part, rate in rates.items()
        if (parameters := [p for p in part.parameters() if p.requires_grad])
    ]

    def evaluate() -> Mapping[str, float]:
        return held_out_figures(student, held_out, collator, options)

    judge = evaluate if held_out else None
    return Trainer(student, groups, trained, collator, options, ranks, judge)


def held_out_figures(
    student: Student, samples: Sequence[Sample], collator: Collator, options: LoopOptions
) -> dict[str, float]:
    """Return how held-out answers come out, with all tokens and with tokens removed.

    Without figures of answers where all of them are beyond the limit of tokens.

    Args:
        student: The model in training.
        samples: Conversations, each with an image.
        collator: Makes batches of them.
        options: Device and precision.
    """
    from vllm_plugins.visual_tokens.dynamic_llava.evaluation import Dropping, answer, summary

    predictors = student.predictors
    config, long_answer = predictors.config, student.long_answer
    text = predictors.text_predictor is not None
    kinds = {
        "sparse": Dropping(config.image_keep_rate, text_keep=text, long_answer=long_answer),
        "dense": Dropping(long_answer=long_answer),
    }
    batches = [collator([sample]).to(options.device, options.dtype) for sample in samples]
    figures: dict[str, float] = {}
    for kind, dropping in kinds.items():
        found = summary(
            answer(student.model, predictors, config.sparse_layer, batch, dropping)
            for batch in batches
        )
        judged = {"cross_entropy", "right"} & found.keys()
        figures |= {f"{kind}_{name}": found[name] for name in sorted(judged)}
        if kind == "sparse" and text and "text_kept" in found:
            figures["text_kept"] = found["text_kept"]
    return figures


def _finish(args: argparse.Namespace, student: Student, source: Path) -> None:
    import torch
    from transformers import AutoConfig

    from vllm_plugins.training.curves import draw_curves
    from vllm_plugins.visual_tokens.dynamic_llava.checkpoint import save_checkpoint

    stored: Any = AutoConfig.from_pretrained(source).dtype
    dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    save_checkpoint(args.out, student.model, student.predictors, source, dtype)
    if not args.no_plot:
        draw_curves(args.out, f"Dynamic-LLaVA, {args.model}")

"""``vllm-plugins train specvlm``: distil a drafter for a target, from image-text samples."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from vllm_plugins.errors import PluginError
from vllm_plugins.spec_decode.specvlm.settings import (
    OPERATORS,
    Mode,
    SpecVLMSettings,
    read_settings,
)
from vllm_plugins.training import arguments
from vllm_plugins.training.arguments import INTERRUPTED, at_least

if TYPE_CHECKING:
    from vllm_plugins.spec_decode.specvlm.acceptance import AcceptanceEstimate
    from vllm_plugins.spec_decode.specvlm.drafter import EagleDrafter
    from vllm_plugins.spec_decode.specvlm.target import FrozenTarget
    from vllm_plugins.training.batches import Collator
    from vllm_plugins.training.data import Sample
    from vllm_plugins.training.loop import Trainer
    from vllm_plugins.training.processes import Processes

# The paper's, for a target of 7B; it names 5e-5 for 13B.
LEARNING_RATE, BETAS = 8e-5, (0.9, 0.95)
# A run is resumed with the same. Sizes are told by the weights.
_LASTING = ("lr", "lambda_logit", "lambda_feature", "lambda_balance", "unroll", "mode",
            "default_operator", "select_from", "prune_ratio", "pool_ratio", "conv_ratio",
            "block_size")  # fmt: skip
DEFAULTS = arguments.Defaults(batch=128, schedule="constant")
# Without convolution: whatever the gate picks gets as many rows as the operator that wants most,
# and convolution wants a third of the image where the paper finds it no better than the others.
SELECT_FROM = tuple(name for name in OPERATORS if name != "conv")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``train specvlm``."""
    parser.add_argument("target", help="LLaVA to draft for: name or folder")
    arguments.add_arguments(parser, DEFAULTS)
    _add_training(parser.add_argument_group("distillation"))
    _add_drafter(parser.add_argument_group("drafter"))


def _add_training(group: Any) -> None:
    add, rate = group.add_argument, at_least(0, float)
    add("--lr", type=rate, default=LEARNING_RATE, help=f"default: {LEARNING_RATE:g}")
    add("--lambda-logit", type=rate, default=0.1, help="weight of drafts (default: 0.1)")
    add("--lambda-feature", type=rate, default=1.0, help="weight of features (default: 1)")
    add(
        "--lambda-balance",
        type=rate,
        default=0.01,
        help="weight of the pull towards even picks, not the paper's (default: 0.01)",
    )
    add(
        "--unroll",
        type=at_least(1),
        default=1,
        metavar="STEPS",
        help="draft steps trained in a chain, as serving runs them; the paper's is 1 (default: 1)",
    )
    add(
        "--drafts",
        type=at_least(1),
        default=5,
        metavar="K",
        help="draft tokens of a round in the estimate of acceptance (default: 5)",
    )
    add(
        "--longest-answer",
        type=at_least(4),
        default=64,
        metavar="TOKENS",
        help="of the target to held-out samples (default: 64)",
    )


def _add_drafter(group: Any) -> None:
    add, settings = group.add_argument, SpecVLMSettings.model_fields
    add("--init", type=Path, metavar="DIR", help="begin with the weights of this drafter")
    add("--mode", choices=get_args(Mode), default="select", help="default: select")
    add("--default-operator", choices=OPERATORS, default="pool", help="default: pool")
    add(
        "--select-from",
        default=",".join(SELECT_FROM),
        metavar="A,B,...",
        help="operators of mode select; all get as many rows as the one that wants most "
        f"(default: {','.join(SELECT_FROM)})",
    )
    for name in ("prune_ratio", "pool_ratio", "conv_ratio"):
        default = settings[name].default
        add(f"--{name.replace('_', '-')}", type=float, default=default, help=f"default: {default}")
    add("--queries", type=int, default=2, help="rows of the resampler (default: 2)")
    add("--gate-width", type=int, default=256, help="hidden units of the gate (default: 256)")
    add(
        "--block-size",
        type=at_least(1),
        default=16,
        help="tokens of a KV block where the drafter will be served (default: 16)",
    )
    add(
        "--save-dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the written weights (default: --dtype)",
    )


def run(args: argparse.Namespace) -> int:
    """Train.

    Returns:
        0, or 130 when it was interrupted and can be resumed.
    """
    import torch

    from vllm_plugins.cli.pictures import pyplot
    from vllm_plugins.spec_decode.specvlm.checkpoint import save_drafter
    from vllm_plugins.training.processes import processes

    arguments.check_folder(args)
    if not args.no_plot:
        # Asked for before hours of training, not after.
        pyplot()
    with processes(args.device) as ranks:
        trainer, target, drafter = prepare(args, ranks)
        finished = trainer.run()
        if not finished:
            _say(ranks, f"stopped after step {trainer.step}; add --resume to go on")
            return INTERRUPTED
        if ranks.first:
            dtype = getattr(torch, args.save_dtype or args.dtype)
            save_drafter(args.out, drafter, target.text_config, dtype)
            if not args.no_plot:
                _draw(args)
        _say(ranks, f"drafter written to {args.out}")
    return 0


def _say(ranks: Processes, text: str) -> None:
    if ranks.first:
        print(text, flush=True)


def _draw(args: argparse.Namespace) -> None:
    from vllm_plugins.training.curves import draw_curves

    draw_curves(args.out, f"SpecVLM drafter for {Path(args.target).name}")


def prepare(
    args: argparse.Namespace, ranks: Processes
) -> tuple[Trainer, FrozenTarget, EagleDrafter]:
    """Load target and data, make the drafter, and continue a run where that is asked for.

    Raises:
        PluginError: Something does not fit together.
    """
    import torch

    from vllm_plugins.spec_decode.specvlm.distillation import Distillation, LossWeights
    from vllm_plugins.spec_decode.specvlm.target import load_target
    from vllm_plugins.training.data import read_samples, split_samples
    from vllm_plugins.training.loop import Trainer
    from vllm_plugins.training.pictures import check_pictures

    samples = read_samples(args.data, args.images)
    trained, held_out = split_samples(samples, args.held_out, args.seed)
    options = replace(
        arguments.loop_options(args, len(trained), ranks.count),
        technique={name: getattr(args, name) for name in _LASTING},
    )
    check_pictures(samples, ranks, args.device)
    target = load_target(args.target, args.device, options.dtype)
    collator = load_collator(args, target)
    torch.manual_seed(args.seed)
    drafter = make_drafter(args, target).to(args.device)
    weights = LossWeights(args.lambda_logit, args.lambda_feature, args.lambda_balance)
    module = Distillation(target, drafter, weights, args.unroll)
    group = {
        "params": list(drafter.parameters()),
        "lr": args.lr,
        "betas": BETAS,
        "weight_decay": 0.0,
    }
    evaluate = None
    if ranks.first and held_out:
        estimate = _estimate(args, target, collator, held_out)

        def evaluate() -> dict[str, float]:
            with torch.autocast(
                torch.device(args.device).type, options.dtype, options.dtype != torch.float32
            ):
                return estimate.figures(drafter)

    trainer = Trainer(module, [group], trained, collator, options, ranks, evaluate)
    if args.resume:
        trainer.resume()
    return trainer, target, drafter


def load_collator(args: argparse.Namespace, target: FrozenTarget) -> Collator:
    """Return what makes batches with the target's own processor."""
    from transformers import AutoProcessor

    from vllm_plugins.training.batches import Collator

    positions = target.text_config.max_position_embeddings
    tokens = min(args.max_tokens, positions)
    return Collator(AutoProcessor.from_pretrained(args.target), target.image_token, tokens)


def _estimate(
    args: argparse.Namespace, target: FrozenTarget, collator: Collator, samples: list[Sample]
) -> AcceptanceEstimate:
    import torch

    from vllm_plugins.spec_decode.specvlm.acceptance import AcceptanceEstimate, answer

    dtype = getattr(torch, args.dtype)
    answered = answer(target, collator, samples, args.device, dtype, args.longest_answer)
    return AcceptanceEstimate(target, answered, args.drafts)


def make_drafter(args: argparse.Namespace, target: FrozenTarget) -> EagleDrafter:
    """Return a new drafter for a target, or one that begins with another's weights.

    Raises:
        PluginError: The other's layer has another shape, or an option is out of range.
    """
    from vllm_plugins.spec_decode.specvlm.checkpoint import load_drafter
    from vllm_plugins.spec_decode.specvlm.drafter import DrafterShape, EagleDrafter

    shape, settings = DrafterShape.of_target(target.text_config), read_options(args, target)
    drafter = EagleDrafter(shape, settings)
    if args.init:
        other = load_drafter(args.init)
        check_shape(str(args.init), other.shape.to_dict(), shape.to_dict())
        weights, own = other.state_dict(), drafter.state_dict()
        wrong = [name for name in own if weights[name].shape != own[name].shape]
        if wrong:
            raise PluginError(
                "--init", f"{wrong[0]} has another shape", "use that drafter's ratios and queries"
            )
        drafter.load_state_dict(weights)
    return drafter


def check_shape(where: str, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse a drafter whose layer, width or vocabulary is not the target's.

    Raises:
        PluginError: They differ.
    """
    for name, value in here.items():
        if there[name] != value:
            raise PluginError(
                f"--init {where}",
                f"{name} is {there[name]} and the target's is {value}",
                "use a drafter of this target",
            )


def read_options(args: argparse.Namespace, target: FrozenTarget) -> SpecVLMSettings:
    """Return the drafter's settings of parsed arguments.

    Raises:
        PluginError: An option is out of range.
    """
    names = SpecVLMSettings.model_fields.keys() - {"format", "grid", "select_from"}
    block = {name: getattr(args, name) for name in names}
    chosen = tuple(args.select_from.split(","))
    return read_settings({**block, "select_from": chosen, "grid": patch_grid(target)}, "train")


def patch_grid(target: FrozenTarget) -> tuple[int, int]:
    """Return lines and columns of the patches of one image."""
    config: Any = target.model.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    return side, side

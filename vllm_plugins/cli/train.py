"""``vllm-plugins train TECHNIQUE``: train what a technique needs."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

HELP = "Train what a technique needs: a drafter, predictors of visual tokens, bases of keys."
TECHNIQUES = {
    "specvlm": (
        "vllm_plugins.spec_decode.specvlm.train",
        "Train a drafter that sees a compressed image, for --plugin specvlm.",
    ),
    "dynamic_llava": (
        "vllm_plugins.visual_tokens.dynamic_llava.train",
        "Train predictors that drop visual tokens, and the model with them.",
    ),
    "zipcache": (
        "vllm_plugins.attention_backends.zipcache.train",
        "Find bases in which a model's keys lose least by four bits, for --plugin zipcache.",
    ),
}
"""Modules with ``add_arguments(parser)`` and ``run(args)``, imported when they are chosen."""


class _Technique(argparse.ArgumentParser):
    """A technique's parser, which gets its arguments when it is chosen."""

    module = ""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.module:
            import_module(self.module).add_arguments(self)
            self.module = ""
        return super().parse_known_args(args, namespace)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand for each technique; none is imported for it."""
    commands = parser.add_subparsers(
        dest="technique", metavar="TECHNIQUE", required=True, parser_class=_Technique
    )
    for name, (module, text) in TECHNIQUES.items():
        commands.add_parser(name, help=text, description=text).module = module


def run(args: argparse.Namespace) -> int:
    """Train the chosen technique.

    Returns:
        0, or 130 when it was interrupted and can be resumed.
    """
    return int(import_module(TECHNIQUES[args.technique][0]).run(args))

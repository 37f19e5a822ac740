"""The ``vllm-plugins`` command.

A subcommand's module is imported only when it is called, so that ``--help`` and ``list`` import
neither torch nor vLLM and answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from vllm_plugins import __version__
from vllm_plugins.errors import PluginError

COMMANDS = {
    "list": "List the installed plug-ins.",
    "describe": "Show one plug-in: options, requirements, metrics and the stock spelling.",
    "doctor": "Check this installation, and say which plug-ins can run here and why not.",
    "bench": "Compare a plug-in with stock vLLM at its best static setting.",
    "profile": "Measure step times of a model here and fit the step cost model.",
    "simulate": "Run schedulers in virtual time on a workload, without a model.",
    "allocate": "Choose how many workers encode, prefill and decode, from profiled stage times "
    "and a trace.",
    "route": "Serve one OpenAI endpoint in front of prefill, decode and encode instances.",
    "deploy": "Run prefill, decode and encode instances and their router on a Ray cluster.",
    "train": "Train what a technique needs: a drafter, predictors of visual tokens, bases of keys.",
    "kvshare": "Show, fill and empty what a server with --plugin kvshare stores.",
}
"""Subcommands with the one-line help that ``--help`` shows without importing them."""

REFUSED, INTERRUPTED = 2, 130


def command_module(name: str) -> Any:
    """Import the module of one subcommand."""
    return import_module(f"vllm_plugins.cli.{name}")


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Return the parser, with the arguments of the chosen subcommand alone."""
    parser = argparse.ArgumentParser(
        prog="vllm-plugins",
        description="Look at, check and measure the plug-ins of `vllm serve --plugin NAME`.",
    )
    parser.add_argument("--version", action="version", version=f"vllm-plugins {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == chosen:
            command_module(name).add_arguments(command)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # The top level has no option that takes a value, so the first other word is the subcommand.
    chosen = next((word for word in words if not word.startswith("-")), None)
    args = build_parser(chosen).parse_args(words)
    try:
        return int(command_module(args.command).run(args))
    except PluginError as error:
        print(f"vllm-plugins: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (`| head`) has seen enough; a second failure at exit says nothing.
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Arguments of `vllm serve` and `vllm-plugins route`: which the deployment sets itself."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterable
from typing import NoReturn

from vllm_plugins.errors import PluginError

WHERE = "vllm-plugins deploy"
OWN_SERVE_ARGS = {
    "--host": "the deployment binds each instance; see network",
    "--port": "the deployment takes a free port for each instance",
    "--uds": "the router speaks to instances by TCP",
    "--ssl-keyfile": "the router speaks plain HTTP to instances; put TLS in front of it",
    "--api-key": "it would stand on the command line; use api_key_file",
    "--kv-transfer-config": "the pd plug-in sets it; use pd",
    "--ec-transfer-config": "the epd plug-in sets it; use epd",
    "--model": "name the model as model",
}
"""What an instance's operator does not choose, with what to do instead."""
OWN_ROUTER_ARGS = (
    "prefill", "decode", "encode", "host", "port", "secret_file", "admin_key_file", "lease_s",
    "drain_s", "start_timeout_s",
)  # fmt: skip
_SIZES = {
    "--tensor-parallel-size": "tensor", "-tp": "tensor",
    "--pipeline-parallel-size": "pipeline", "-pp": "pipeline",
    "--data-parallel-size": "data", "-dp": "data",
}  # fmt: skip


def world_size(arguments: Iterable[str]) -> int:
    """Return how many workers an instance has by its arguments.

    Raises:
        PluginError: A size is no number.
    """
    words, sizes = [word for text in arguments for word in text.split("=", 1)], dict[str, int]()
    for word, value in itertools.pairwise([*words, ""]):
        if word in _SIZES:
            if not re.fullmatch(r"[1-9]\d{0,5}", value):
                raise PluginError(f"{WHERE}: {word} {value}", "is no size", "write a number")
            sizes[_SIZES[word]] = int(value)
    product = 1
    for size in sizes.values():
        product *= size
    return product


def check_serve_args(arguments: Iterable[str]) -> None:
    """Refuse arguments of `vllm serve` that the deployment sets itself.

    Raises:
        PluginError: One of them is among these.
    """
    words = list(arguments)
    world_size(words)
    for word, following in itertools.pairwise([*words, ""]):
        name, _, value = word.partition("=")
        name = name.replace("_", "-")
        if name in OWN_SERVE_ARGS:
            raise PluginError(
                f"{WHERE}: {name}", "is not an instance's own choice", OWN_SERVE_ARGS[name]
            )
        if name == "--plugin":
            _check_plugin(value or following)


def _check_plugin(text: str) -> None:
    from vllm_plugins.spec import parse_specs

    for spec in parse_specs([text]):
        if spec.name in ("pd", "epd"):
            raise PluginError(
                f"{WHERE}: --plugin {spec.name}",
                "the deployment sets it, by each instance's role",
                f"give its options as {spec.name}",
            )


class _Parser(argparse.ArgumentParser):
    """A parser that refuses in the one line of a `PluginError`."""

    def error(self, message: str) -> NoReturn:
        raise PluginError(f"{WHERE}: router_args", message, "see `vllm-plugins route --help`")


def check_router_args(arguments: Iterable[str]) -> None:
    """Refuse arguments that `vllm-plugins route` does not know or the deployment sets itself.

    Raises:
        PluginError: One of them is among these.
    """
    from vllm_plugins.cli.route import add_arguments

    parser = _Parser(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    given = parser.parse_args(list(arguments))
    defaults = parser.parse_args([])
    for name in OWN_ROUTER_ARGS:
        if getattr(given, name) != getattr(defaults, name):
            option = "--" + name.replace("_", "-")
            raise PluginError(
                f"{WHERE}: router_args {option}",
                "the deployment sets it",
                f"use its own option, or leave {option} out",
            )

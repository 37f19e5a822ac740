"""``vllm-plugins route``: one OpenAI endpoint in front of prefill, decode and encode instances."""

from __future__ import annotations

import argparse
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_plugins.errors import PluginError
from vllm_plugins.router.settings import RouterSettings

HELP = "Serve one OpenAI endpoint in front of prefill, decode and encode instances."
_DEFAULTS = RouterSettings(prefill=(), decode=())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``route``."""
    _add_instances(parser.add_argument_group("instances"))
    _add_server(parser.add_argument_group("server"))
    _add_dispatch(parser.add_argument_group("dispatch and queue"))
    _add_faults(parser.add_argument_group("faults"))
    _add_encode(parser.add_argument_group("images"))
    _add_roles(parser.add_argument_group("change of roles"))


def _add_instances(group: Any) -> None:
    for role, text in (
        ("prefill", "they compute prompts; with --encode and no --decode they also answer"),
        ("decode", "they pull a prompt's KV and answer"),
        ("encode", "they compute embeddings of images"),
    ):
        group.add_argument(
            f"--{role}",
            nargs="+",
            default=[],
            metavar="URL",
            help=f"base addresses of the {role} instances (`vllm serve`), http://HOST:PORT: {text}",
        )
    group.add_argument(
        "--secret-file",
        type=Path,
        metavar="FILE",
        help="secret shared with instances that run --plugin pd, to release the KV that they hold "
        "for clients that have gone (default: the user's own secret on this machine)",
    )
    _number(
        group, "start-timeout-s", float, "seconds to wait for all instances at the start", above=0
    )


def _add_server(group: Any) -> None:
    group.add_argument(
        "--host",
        default=_DEFAULTS.host,
        help="address to listen on (default: %(default)s); another than loopback needs "
        "--admin-key-file",
    )
    _number(group, "port", int, "port to listen on", above=0, most=65535)
    group.add_argument(
        "--admin-key-file",
        type=Path,
        metavar="FILE",
        help="file with the key, of at least 16 characters, that opens /instances and the status "
        "page, sent in the header X-Router-Admin-Key; without it they are open to this machine",
    )
    _number(group, "max-body-mib", float, "longest request body, in MiB", above=0)
    _number(
        group, "max-connections", int, "most client connections; more are closed at once", least=1
    )


def _add_dispatch(group: Any) -> None:
    group.add_argument(
        "--dispatch",
        choices=("backlog", "round-robin"),
        default=_DEFAULTS.dispatch,
        help="who gets a request: backlog is the instance with the fewest queued prompt tokens "
        "(prefill), the smallest share of its KV cache in use and promised (decode) or the fewest "
        "queued encoder tokens (encode) (default: %(default)s)",
    )
    group.add_argument(
        "--first-token",
        choices=("decode", "prefill"),
        default=_DEFAULTS.first_token,
        help="who gives a stream's first token: decode recomputes the last prompt token and passes "
        "every stream on unchanged; prefill sends the token that the prefill instance computed "
        "anyway, sooner, where the rest of the answer is not changed by it (default: %(default)s)",
    )
    group.add_argument(
        "--stream-layers",
        action="store_true",
        help="ask prefill and decode at once where the prefill instance is idle, so that layers "
        "leave while later ones are computed; needs --plugin pd:stream_layers=true there",
    )
    _number(
        group, "max-queue", int, "most requests that wait for each role; more are refused with 503",
        least=0,
    )  # fmt: skip
    _number(group, "queue-timeout-s", float, "seconds that a request waits for room", above=0)
    _number(
        group, "max-prefill-tokens", int,
        "queued prompt tokens from which on a prefill instance gets no more; 0 for no limit",
        least=0,
    )  # fmt: skip
    _number(
        group, "decode-kv-fraction", float,
        "share of a decode instance's KV cache that may be in use and promised; above 1 where "
        "answers are mostly shorter than expected",
        above=0, most=10,
    )  # fmt: skip
    _number(
        group, "metrics-s", float,
        "seconds between two looks at the instances' /metrics, which show load from elsewhere",
        above=0,
    )  # fmt: skip


def _add_faults(group: Any) -> None:
    _number(
        group, "retries", int,
        "further instances that a request is sent to when one fails before the first byte of the "
        "answer, for prefill and for decode", least=0, most=16,
    )  # fmt: skip
    _number(group, "fail-threshold", int, "failures in a row that mark an instance down", least=1)
    _number(group, "probe-s", float, "seconds between two probes of /health", above=0)
    _number(group, "connect-timeout-s", float, "seconds to connect to an instance", above=0)
    _number(group, "request-timeout-s", float, "seconds for a whole request", above=0)
    _number(
        group, "stall-timeout-s", float,
        "seconds after which a stream ends in which the instance sends or the client takes nothing",
        above=0,
    )  # fmt: skip
    _number(
        group, "lease-s", float,
        "seconds for which a prefill instance surely holds a prompt's KV; as its connector's lease",
        above=0,
    )  # fmt: skip


def _add_encode(group: Any) -> None:
    group.add_argument(
        "--irp",
        choices=("image", "off"),
        default=_DEFAULTS.irp,
        help="image spreads the images of a request over the encode instances; off sends all to "
        "one (default: %(default)s)",
    )
    group.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=_DEFAULTS.overlap,
        help="ask prefill at once, so that it computes the text before an image while that is "
        "encoded, where the connector can; otherwise it waits for all images (default: on)",
    )
    _number(
        group, "max-encoder-tokens", int,
        "queued encoder tokens from which on an encode instance gets no more; 0 for no limit",
        least=0,
    )  # fmt: skip


def _add_roles(group: Any) -> None:
    group.add_argument(
        "--roles",
        choices=("static", "soft"),
        default=_DEFAULTS.roles,
        help="soft lets an instance change its role when one stage's queue is long and another's "
        "is short; every instance must have been started for all roles (kv_both, and ec_both with "
        "--encode) (default: %(default)s)",
    )
    _number(group, "interval-s", float, "seconds between two decisions", least=1)
    _number(group, "cooldown-s", float, "seconds without a change after one", above=0)
    _number(
        group, "min-gain", float,
        "share by which a change must shorten the longest queue per instance", least=0, most=1,
    )  # fmt: skip
    _number(group, "min-per-stage", int, "instances that every role keeps", least=1)
    _number(
        group, "drain-s", float,
        "seconds in which an instance ends its requests before it changes role, and the router "
        "before it stops", above=0,
    )  # fmt: skip


def _number(
    group: Any,
    name: str,
    kind: type[int] | type[float],
    text: str,
    above: float | None = None,
    least: float | None = None,
    most: float = math.inf,
) -> None:
    """Add an option with a number, its bounds and the default of `RouterSettings`."""
    default = getattr(_DEFAULTS, name.replace("-", "_"))
    group.add_argument(
        f"--{name}",
        type=_bounded(kind, above, least, most),
        default=default,
        metavar="N" if kind is int else "X",
        help=f"{text} (default: {default:g})",
    )


def _bounded(
    kind: type[int] | type[float], above: float | None, least: float | None, most: float
) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not math.isfinite(value) or value > most:
            raise argparse.ArgumentTypeError(f"{text} is above {most:g}")
        if above is not None and value <= above:
            raise argparse.ArgumentTypeError(f"{text} is not above {above:g}")
        if least is not None and value < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least:g}")
        return value

    # argparse names the type in its message about what is not a number.
    read.__name__ = kind.__name__
    return read


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        raise PluginError(
            "vllm-plugins route", "needs aiohttp, which comes with vLLM", "pip install aiohttp"
        ) from None
    from vllm_plugins.router.serve import run_router

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("vllm_plugins").setLevel(logging.INFO)
    run_router(read_settings(args))
    return 0


def read_settings(args: argparse.Namespace) -> RouterSettings:
    """Turn parsed arguments into settings."""
    values = {
        name: value
        for name, value in vars(args).items()
        if name in RouterSettings.__dataclass_fields__
    }
    for name in ("prefill", "decode", "encode"):
        values[name] = tuple(url.rstrip("/") for url in values[name])
    return RouterSettings(**values, api_key=os.environ.get("VLLM_API_KEY", ""))

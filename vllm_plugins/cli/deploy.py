"""``vllm-plugins deploy``: prefill, decode and encode instances and their router, on a cluster."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_plugins.errors import PluginError

HELP = "Run prefill, decode and encode instances and their router on a Ray cluster."
ROLES = ("prefill", "decode", "encode")
MAX_FILE_BYTES = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``deploy``."""
    parser.add_argument("--ray", action="store_true", required=True, help="on a Ray cluster")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="what `vllm serve` loads")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML or JSON file with settings; options of the command line win over it",
    )
    _add_cluster(parser.add_argument_group("cluster"))
    _add_instances(parser.add_argument_group("instances"))
    _add_router(parser.add_argument_group("router"))
    _add_security(parser.add_argument_group("security"))


def _add_cluster(group: Any) -> None:
    group.add_argument(
        "--address",
        default="auto",
        help="the Ray cluster: auto finds the one of this host, local starts one for this command "
        "(default: %(default)s)",
    )
    group.add_argument("--detach", action="store_true", help="return once it serves")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print the configuration for `serve deploy` and start nothing",
    )
    _option(group, "name", "name of the application in Ray Serve")
    _option(
        group,
        "network",
        "where instances listen: auto is loopback while the cluster has one node, else their "
        "node's address",
        choices=("auto", "loopback", "cluster"),
    )


def _add_instances(group: Any) -> None:
    for role in ROLES:
        group.add_argument(
            f"--{role}",
            default=argparse.SUPPRESS,
            metavar="N|LEAST:MOST",
            help=f"how many {role} instances; with bounds, as many as there are requests for",
        )
        group.add_argument(
            f"--{role}-args",
            type=shlex.split,
            default=argparse.SUPPRESS,
            metavar="'ARGS'",
            help=f"further arguments of `vllm serve` for {role} instances",
        )
    _option(group, "serve-args", "arguments of `vllm serve` for all instances", type=shlex.split)
    for plugin in ("pd", "epd"):
        _option(
            group,
            plugin,
            f"options of --plugin {plugin}, as key=value,... or a JSON object",
            type=_plugin_options,
        )
    _option(
        group,
        "device",
        "what instances run on; on cuda Ray sets aside a GPU for each of their workers "
        "(default: cuda)",
        choices=("cuda", "cpu"),
    )
    _option(group, "num-cpus", "CPUs that Ray sets aside for each instance (default: 1)")
    _option(group, "drain-s", "seconds in which an instance ends its requests before it ends")
    _option(group, "start-timeout-s", "seconds for an instance to load the model")


def _add_router(group: Any) -> None:
    _option(group, "host", "address on which the router listens (default: 127.0.0.1)")
    _option(group, "port", "port on which the router listens (default: 8000)")
    _option(group, "router-args", "further arguments of `vllm-plugins route`", type=shlex.split)


def _add_security(group: Any) -> None:
    for name, text in (
        ("secret-file", "secret that instances prove to each other; needed on several nodes"),
        ("api-key-file", "key that clients send"),
        ("admin-key-file", "key that opens the router's /instances; by default it makes its own"),
    ):
        _option(group, name, f"file at the same path on every node: {text}", metavar="FILE")


def _option(group: Any, name: str, text: str, **more: Any) -> None:
    # What is not given does not stand in the way of the file's value.
    group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text, **more)


def _plugin_options(text: str) -> dict[str, Any]:
    from vllm_plugins.spec import parse_specs

    # A plug-in's own language, with a name that stands for it.
    named = '{"name": "options", ' + text[1:] if text.startswith("{") else f"options:{text}"
    return parse_specs([named])[0].options


def run(args: argparse.Namespace) -> int:
    """Deploy, or print what would be."""
    from vllm_plugins.deploy.settings import read_settings

    settings = read_settings(values_of(args))
    if args.detach and args.address == "local":
        raise PluginError(
            "--detach",
            "a cluster that --address local starts ends with the command",
            "start one with `ray start --head`, or drop --detach",
        )
    if args.dry_run:
        import yaml

        from vllm_plugins.deploy.application import serve_config

        print(yaml.safe_dump(serve_config(settings), sort_keys=False), end="")
        return 0
    from vllm_plugins.deploy.run import deploy, require_ray

    require_ray()
    deploy(settings, args.address, args.detach)
    return 0


def values_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of a command line, over those of its file.

    Raises:
        PluginError: The file cannot be read.
    """
    values = read_file(args.config) if args.config else {}
    given = vars(args)
    for name in ("name", "network", "serve_args", "pd", "epd", "device", "num_cpus", "drain_s",
                 "start_timeout_s", "host", "port", "router_args", "secret_file", "api_key_file",
                 "admin_key_file"):  # fmt: skip
        if name in given:
            values[name] = given[name]
    if args.model is not None:
        values["model"] = args.model
    for role in ROLES:
        chosen = {"replicas": given.get(role), "serve_args": given.get(f"{role}_args")}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if chosen:
            values[role] = {"replicas": 0 if role == "encode" else 1, **values.get(role, {})}
            values[role] |= chosen
    return values


def read_file(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML or JSON file.

    Raises:
        PluginError: It cannot be read, or is no mapping.
    """
    import yaml

    where = f"--config {path}"
    try:
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
        # JSON is YAML as well.
        values = yaml.safe_load(text) if len(text) <= MAX_FILE_BYTES else None
    except OSError as error:
        raise PluginError(where, f"cannot be read: {error.strerror}", "name a file") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise PluginError(where, f"is no YAML: {reason}", "mend it") from None
    if not isinstance(values, Mapping):
        raise PluginError(where, "is no mapping of at most 1 MiB", "see docs/deploy.md")
    return dict(values)

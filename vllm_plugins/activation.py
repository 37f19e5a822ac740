"""``--plugin``: the flag, its expansion to stock engine arguments, and the entry point.

The entry point extends three methods of vLLM's engine arguments and nothing else. Plug-ins that
were not asked for are not even imported.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vllm_plugins.arguments import EngineArguments
from vllm_plugins.errors import PluginError
from vllm_plugins.registry import Enabled, enable, entry_points
from vllm_plugins.settings import KEY, PluginSettings, enabled_plugins, requested
from vllm_plugins.spec import PluginSpec, parse_specs

_HOOKED = "_vllm_plugins_flag"


def register() -> None:
    """Entry point ``vllm.general_plugins``: teach vLLM's engine arguments the flag.

    vLLM calls it in every process and more than once. Only a process that has loaded the engine
    arguments can parse a flag or start an engine from them, so no other is made to import them.
    """
    module = sys.modules.get("vllm.engine.arg_utils")
    if module is not None and not hasattr(module.EngineArgs, _HOOKED):
        _install_flag(module.EngineArgs)
        _install_checks(module.EngineArgs)
        setattr(module.EngineArgs, _HOOKED, True)


def _install_flag(engine_args: type[Any]) -> None:
    add_cli_args = engine_args.add_cli_args
    from_cli_args = engine_args.from_cli_args.__func__

    @functools.wraps(add_cli_args)
    def add_cli_args_with_plugin(parser: Any) -> Any:
        return _add_flag(add_cli_args(parser))

    @functools.wraps(from_cli_args)
    def from_cli_args_with_plugin(cls: Any, args: argparse.Namespace) -> Any:
        changes = _changes(args)
        if not changes:
            return from_cli_args(cls, args)
        return from_cli_args(cls, argparse.Namespace(**{**vars(args), **changes}))

    engine_args.add_cli_args = staticmethod(add_cli_args_with_plugin)
    engine_args.from_cli_args = classmethod(from_cli_args_with_plugin)


def _install_checks(engine_args: type[Any]) -> None:
    create_engine_config = engine_args.create_engine_config

    @functools.wraps(create_engine_config)
    def create_engine_config_with_checks(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _in_one_line(self.additional_config):
            config = create_engine_config(self, *args, **kwargs)
            if requested(config.additional_config):
                enabled_plugins(config)
        return config

    engine_args.create_engine_config = create_engine_config_with_checks


@contextmanager
def _in_one_line(additional_config: Any) -> Iterator[None]:
    """Let each plug-in that is on look at the complete configuration, in the front end.

    An engine in a process of its own would refuse too, but out of sight: its front end only says
    that the engine did not start.

    Args:
        additional_config: The engine's, which knows whether a command is to start it.

    Raises:
        PluginError: A plug-in cannot run in this engine, which was started from Python.
        SystemExit: The same for an engine of a command; the message is one line.
    """
    try:
        yield
    except PluginError as error:
        entry = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if isinstance(entry, PluginSettings) and entry.from_command:
            raise _refusal(error) from None
        raise


def _refusal(error: PluginError) -> SystemExit:
    return SystemExit(f"vllm: error: {error}")


class _Word(str):
    """A word of the flag; a process that is sent one knows the flag before it reads its arguments.

    vLLM starts API servers as processes of their own and sends them the parsed command line. They
    make engine arguments from it without having loaded any entry point.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (str(self),)


def _received(text: str) -> _Word:
    import vllm.engine.arg_utils  # noqa: F401

    register()
    return _Word(text)


def _add_flag(parser: Any) -> Any:
    group = parser.add_argument_group(
        title="vllm-plugins", description="Plug-ins of the vllm-plugins package."
    )
    group.add_argument(
        "--plugin",
        nargs="+",
        action="extend",
        type=_Word,
        metavar="NAME[:key=value,...]",
        help="Turn plug-ins on, by name, with options as key=value or as a JSON object with a "
        f'"name". Installed: {", ".join(entry_points())}. '
        "`vllm-plugins describe NAME` prints the options and the equivalent stock arguments.",
    )
    return parser


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """Return the stock engine arguments that the parsed command line's plug-ins set.

    Raises:
        SystemExit: A plug-in was refused; the message is one line.
    """
    current = vars(args)
    try:
        arguments = _expand(_specs(current, current.get("plugin") or []), current)
    except PluginError as error:
        raise _refusal(error) from None
    if arguments is None:
        return {}
    if arguments.is_http_server:
        # Not an engine argument: the server reads it from the command line once the engine is up.
        # The last is the outermost, so what the user's own find out of a client comes before ours.
        args.middleware = list(dict.fromkeys([*arguments.middleware, *(args.middleware or ())]))
    arguments.changes["additional_config"][KEY].from_command = True
    return arguments.changes


def _specs(current: Mapping[str, Any], texts: Sequence[str]) -> list[PluginSpec]:
    stock = requested(current.get("additional_config"))
    named = parse_specs(texts)
    for spec in named:
        if any(spec.name == other.name for other in stock):
            raise PluginError(
                f"--plugin {spec.name}",
                f"is also in --additional-config {KEY}",
                "keep one of the two",
            )
    return stock + named


def expand(specs: Sequence[PluginSpec], current: Mapping[str, Any]) -> dict[str, Any]:
    """Return the stock engine arguments that turn the plug-ins on.

    Args:
        specs: The requested plug-ins; empty gives no change.
        current: Engine arguments by field name as they stand; missing ones have their default.

    Raises:
        PluginError: A plug-in is refused.
    """
    arguments = _expand(specs, current)
    return {} if arguments is None else arguments.changes


def _expand(specs: Sequence[PluginSpec], current: Mapping[str, Any]) -> EngineArguments | None:
    if not specs:
        return None
    from vllm.engine.arg_utils import EngineArgs

    from vllm_plugins.metrics import publish_in_this_process

    # Python code can get here without vLLM having called the entry point, as in a process whose
    # VLLM_PLUGINS leaves it out.
    register()
    enabled = enable(specs)
    arguments = configure(enabled, current, argument_defaults(EngineArgs))
    publish_in_this_process()
    return arguments


def argument_defaults(engine_args: type[Any]) -> dict[str, Any]:
    """Return the default of each engine argument that has one."""
    defaults = {}
    for field in dataclasses.fields(engine_args):
        if field.default is not dataclasses.MISSING:
            defaults[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
    return defaults


def configure(
    enabled: Sequence[Enabled], current: Mapping[str, Any], defaults: Mapping[str, Any]
) -> EngineArguments:
    """Let each plug-in set its stock arguments and put all options into ``additional_config``."""
    arguments = EngineArguments(current, defaults)
    for item in enabled:
        arguments.plugin = item.plugin.name
        item.plugin.enter_process(item.options)
        item.plugin.configure(item.options, arguments)
    additional = dict(current.get("additional_config") or {})
    additional[KEY] = PluginSettings.of(enabled)
    arguments.changes["additional_config"] = additional
    return arguments


def engine_args(*specs: str, **options: Any) -> dict[str, Any]:
    """Return the keyword arguments that turn plug-ins on in ``LLM(...)`` or ``EngineArgs(...)``.

    Args:
        specs: Plug-ins in the language of ``--plugin``.
        options: Options of the plug-in when there is just one.

    Raises:
        PluginError: A plug-in is refused.

    Example:
        ``LLM(model, **engine_args("sarathi", tbt_slo_ms=40))``
    """
    parsed = parse_specs(specs)
    if options and len(parsed) != 1:
        raise PluginError(
            f"engine_args(..., {next(iter(options))}=...)",
            f"options need exactly one plug-in, got {len(parsed)}",
            'put them into the names: engine_args("sarathi:tbt_slo_ms=40", "spf")',
        )
    merged = [PluginSpec(spec.name, {**spec.options, **options}) for spec in parsed]
    return expand(merged, {})

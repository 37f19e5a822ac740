"""The stock engine arguments that enabled plug-ins set, checked against what the user set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_plugins.errors import PluginError

_UNSET = object()


def flag(name: str) -> str:
    """Return an engine argument's command-line spelling."""
    return "--" + name.replace("_", "-")


class EngineArguments:
    """A view on the engine arguments of one server while plug-ins configure it.

    Args:
        current: The arguments as the user left them, by field name.
        defaults: vLLM's default of each field; a field that differs from it was set by the user.
    """

    def __init__(self, current: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._current = current
        self._defaults = defaults
        self._owners: dict[str, str] = {}
        self.changes: dict[str, Any] = {}
        self.middleware: list[str] = []
        self.plugin = ""

    def get(self, name: str) -> Any:
        """Return an argument as it stands now."""
        return self.changes.get(name, self._current.get(name))

    @property
    def is_http_server(self) -> bool:
        """Whether these arguments start a server that loads ``--middleware``."""
        return "middleware" in self._current and not self._current.get("headless")

    def add_middleware(self, name: str) -> None:
        """Have an HTTP server pass every request through an ASGI middleware class.

        Args:
            name: Its dotted name. Engines without a server leave it out.
        """
        self.middleware.append(name)

    def is_set(self, name: str) -> bool:
        """Whether the user gave this argument a value of their own."""
        default = self._defaults.get(name, _UNSET)
        value = self._current.get(name, default)
        return value is not default and value != default

    def set(self, name: str, value: Any) -> None:
        """Set an argument on behalf of the plug-in that is being configured.

        Raises:
            PluginError: The user, or another plug-in, has set it to something else.
        """
        if self.is_set(name) and self._current[name] != value:
            raise PluginError(
                f"--plugin {self.plugin}",
                f"sets {flag(name)} {value}, and so does {flag(name)} {self._current[name]}",
                f"drop {flag(name)} or --plugin {self.plugin}",
            )
        if name in self.changes and self.changes[name] != value:
            raise PluginError(
                f"--plugin {self.plugin}",
                f"sets {flag(name)} {value}, and --plugin {self._owners[name]} sets it to "
                f"{self.changes[name]}",
                "drop one of the two",
            )
        self._owners.setdefault(name, self.plugin)
        self.changes[name] = value

    def extend(self, name: str, value: Any) -> None:
        """Set an argument to a value that contains what it was before.

        Args:
            name: The argument.
            value: Made of ``get(name)`` and what the plug-in adds.
        """
        self._owners.setdefault(name, self.plugin)
        self.changes[name] = value

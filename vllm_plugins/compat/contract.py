"""One thing that is relied on in another package, and the check that it is still there."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from vllm_plugins.versions import installed_vllm

Kind = Literal[
    "module", "class", "object", "function", "attributes", "abstract methods", "behaviour"
]
REST_ANY, REST_OPTIONAL = "...", "[...]"


class ContractError(AssertionError):
    """A contract does not hold; the message says what was expected and what was found."""


@dataclass(frozen=True)
class Contract:
    """One upstream symbol and what is relied on about it.

    Args:
        symbol: ``module``, ``module:Class`` or ``module:Class.method``.
        kind: What the check looks at.
        why: What it is needed for, and what breaks without it.
        used_in: Modules that use it in a way that :mod:`vllm_plugins.compat.usage` cannot see, as
            paths below the package.
        parameters: Of a function: its parameters in order, without ``self`` and ``cls``. The last
            may be ``...`` (any others may follow) or ``[...]`` (any others that have a default).
        attributes: Names that a class or its instances have, or the abstract methods that may
            exist and no others.
        bases: Classes (as ``module:Class``) that a class derives from.
        check: Of a behaviour: raises :class:`ContractError` or returns.
        vllm: Versions of vLLM that it is about, as a specifier; empty for all. On others nothing
            relies on it.
    """

    symbol: str
    kind: Kind
    why: str
    used_in: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    bases: tuple[str, ...] = ()
    check: Callable[[], None] | None = None
    vllm: str = ""

    @property
    def applies(self) -> bool:
        """Whether something relies on it under the installed vLLM."""
        version = installed_vllm()
        wanted = SpecifierSet(self.vllm, prereleases=True)
        return version is None or Version(version.public) in wanted

    def verify(self) -> None:
        """Check the contract against the installed package.

        Raises:
            ContractError: It does not hold.
        """
        if self.kind == "behaviour":
            assert self.check is not None, f"{self.symbol} declares no check"
            self.check()
            return
        found = resolve(self.symbol)
        _CHECKS[self.kind](self, found)

    def covers(self, symbol: str) -> bool:
        """Whether a used symbol, or the attribute of a class that it names, is in this contract."""
        owner, _, name = symbol.rpartition(".")
        if ":" not in symbol:
            return self.symbol.partition(":")[0] == symbol
        return self.symbol == symbol or (self.symbol == owner and name in self.attributes)

    def relies_on(self) -> str:
        """Return what is relied on, in one line."""
        if self.kind == "function":
            return f"({', '.join(self.parameters)})"
        if self.kind == "class" and self.bases:
            return "derives from " + ", ".join(base.rpartition(":")[2] for base in self.bases)
        if self.kind == "abstract methods":
            return "no abstract method but " + ", ".join(self.attributes)
        return ", ".join(self.attributes) or {"behaviour": "see the check"}.get(self.kind, "exists")


def method(symbol: str, parameters: str, why: str, *used_in: str) -> Contract:
    """Return the contract of a function with these parameters, separated by commas."""
    names = tuple(name.strip() for name in parameters.split(",") if name.strip())
    return Contract(symbol, "function", why, used_in, parameters=names)


def has(
    symbol: str, attributes: str, why: str, *used_in: str, kind: Kind = "attributes"
) -> Contract:
    """Return the contract of something with these attributes, separated by spaces."""
    return Contract(symbol, kind, why, used_in, attributes=tuple(attributes.split()))


def is_class(symbol: str, why: str, *used_in: str, bases: tuple[str, ...] = ()) -> Contract:
    """Return the contract of a class with these bases."""
    return Contract(symbol, "class", why, used_in, bases=bases)


def behaves(symbol: str, check: Callable[[], None], why: str, *used_in: str) -> Contract:
    """Return the contract of something that passes a check."""
    return Contract(symbol, "behaviour", why, used_in, check=check)


@dataclass(frozen=True)
class Broken:
    """A contract that does not hold, and why."""

    contract: Contract
    reason: str

    def __str__(self) -> str:
        return f"{self.contract.symbol} ({self.contract.kind}): {self.reason}; {self.contract.why}"


def check_contracts(contracts: Iterable[Contract]) -> list[Broken]:
    """Check contracts against what is installed and return those that do not hold.

    A contract that is about other versions of vLLM is left out.
    """
    broken = []
    for contract in filter(lambda contract: contract.applies, contracts):
        try:
            contract.verify()
        except ContractError as error:
            broken.append(Broken(contract, str(error)))
    return broken


def resolve(symbol: str) -> Any:
    """Return the object that a symbol names; of a method its raw entry in the class.

    Raises:
        ContractError: There is none.
    """
    module, _, path = symbol.partition(":")
    try:
        found: Any = import_module(module)
    except ImportError as error:
        raise ContractError(f"does not import ({error})") from error
    for name in filter(None, path.split(".")):
        if inspect.isclass(found):
            found = inspect.getattr_static(found, name, None)
        else:
            found = getattr(found, name, None)
        if found is None:
            raise ContractError(f"has no '{name}'")
    return found


def _check_module(contract: Contract, found: Any) -> None:
    if not inspect.ismodule(found):
        raise ContractError("is not a module")


def _check_object(contract: Contract, found: Any) -> None:
    missing = [name for name in contract.attributes if not hasattr(found, name)]
    if missing:
        raise ContractError(f"lacks {', '.join(missing)}")


def _check_class(contract: Contract, found: Any) -> None:
    if not inspect.isclass(found):
        raise ContractError("is not a class")
    for base in contract.bases:
        if not issubclass(found, resolve(base)):
            raise ContractError(f"no longer derives from {base}")


def _check_function(contract: Contract, found: Any) -> None:
    function = found.__func__ if isinstance(found, staticmethod | classmethod) else found
    if isinstance(function, property) or not callable(function):
        raise ContractError("is not a function")
    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    wanted = [name for name in contract.parameters if name not in (REST_ANY, REST_OPTIONAL)]
    names = [parameter.name for parameter in parameters]
    if names[: len(wanted)] != wanted:
        raise ContractError(f"expected the parameters {wanted} first, found {names}")
    rest = [p for p in parameters[len(wanted) :] if not _may_be_left_out(p)]
    if REST_ANY not in contract.parameters and rest:
        raise ContractError(f"needs more than {wanted}: {[p.name for p in rest]}")
    if len(wanted) == len(contract.parameters) and len(parameters) > len(wanted):
        raise ContractError(f"has new parameters: {names[len(wanted) :]}")


def _may_be_left_out(parameter: inspect.Parameter) -> bool:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is not inspect.Parameter.empty or parameter.kind in variadic


def _check_attributes(contract: Contract, found: Any) -> None:
    present = attributes_of(found)
    missing = [name for name in contract.attributes if name not in present]
    if missing:
        raise ContractError(f"lacks {', '.join(missing)}")


def _check_abstract(contract: Contract, found: Any) -> None:
    unknown = set(found.__abstractmethods__) - set(contract.attributes)
    if unknown:
        raise ContractError(f"has new abstract methods: {', '.join(sorted(unknown))}")


def attributes_of(found: type[Any]) -> set[str]:
    """Return the attributes of a class and of its instances, without making an instance.

    Instance attributes are those that an ``__init__`` or ``__post_init__`` of the class or of a
    base assigns to ``self``, and declared fields (dataclass, pydantic, msgspec).
    """
    names = set(dir(found))
    for base in found.__mro__:
        names |= set(inspect.get_annotations(base))
        for maker in ("__init__", "__post_init__"):
            if inspect.isfunction(vars(base).get(maker)):
                names |= set(_assigned_to_self(vars(base)[maker]))
    return names


def _assigned_to_self(function: Any) -> Iterator[str]:
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        # Generated and compiled constructors have no source; their fields are annotated.
        return
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            yield node.attr


_CHECKS: dict[str, Callable[[Contract, Any], None]] = {
    "module": _check_module,
    "object": _check_object,
    "class": _check_class,
    "function": _check_function,
    "attributes": _check_attributes,
    "abstract methods": _check_abstract,
}

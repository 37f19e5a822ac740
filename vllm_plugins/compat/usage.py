"""Finds in our own source what it uses of other packages, so that no contract is missed.

Three things are found: imported names; attributes of values whose upstream type is known, from an
annotation or from the attribute or the loop that they came from; and, in a class that derives from
an upstream class, attributes of ``self`` that it does not define itself.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import vllm_plugins
from vllm_plugins.registry import entry_points

UPSTREAM = ("vllm", "prometheus_client")
_OUTPUT = "vllm.v1.core.sched.output"
REQUEST = "vllm.v1.request:Request"
QUEUE = "vllm.v1.core.sched.request_queue:RequestQueue"

ATTRIBUTE_TYPES = {
    "vllm_config": "vllm.config:VllmConfig",
    "scheduler_config": "vllm.config:SchedulerConfig",
    "parallel_config": "vllm.config:ParallelConfig",
    "model_config": "vllm.config:ModelConfig",
    "device_config": "vllm.config:DeviceConfig",
    "cache_config": "vllm.config:CacheConfig",
    "_scheduler": "vllm.v1.core.sched.scheduler:Scheduler",
    "scheduler": "vllm.v1.core.sched.scheduler:Scheduler",
    "_engine": "vllm.v1.engine.llm_engine:LLMEngine",
    "sampling_params": "vllm.sampling_params:SamplingParams",
    "scheduled_cached_reqs": f"{_OUTPUT}:CachedRequestData",
    "waiting": QUEUE,
}
"""Upstream type of an attribute of this name, in our classes and in vLLM's."""
ELEMENT_TYPES = {
    "scheduled_new_reqs": f"{_OUTPUT}:NewRequestData",
    "outputs": "vllm.v1.engine:EngineCoreOutput",
    "running": REQUEST,
    "decodes": REQUEST,
    "prefills": REQUEST,
    "hidden": REQUEST,
    "waiting": REQUEST,
}
"""Upstream type of the elements of an attribute of this name."""
OUR_ATTRIBUTES = {"output": f"{_OUTPUT}:SchedulerOutput"}
"""As ATTRIBUTE_TYPES, for attributes of our own classes alone."""
NOT_UPSTREAM = {
    ("kv_connectors/epd/connector.py", "scheduler"),
    ("kv_connectors/kvshare/connector.py", "scheduler"),
    ("kv_connectors/kvshare/hit_rate_order.py", "scheduler"),
}
"""Attributes of our own classes that only have the name of an upstream one, by module."""

OWN_PREFIX = "plugin_"
"""What our subclasses of upstream classes add to them."""


@dataclass(frozen=True)
class Use:
    """One place in our source that uses something of another package.

    Args:
        symbol: As in :class:`~vllm_plugins.compat.contract.Contract`.
        where: Path below the package, as in ``Contract.used_in``.
        line: Line number.
    """

    symbol: str
    where: str
    line: int


def find_uses() -> list[Use]:
    """Return what the whole package uses, apart from these checks themselves."""
    uses: list[Use] = []
    for where, path in _sources():
        uses += uses_of_source(path.read_text(), where)
    return uses


def _sources() -> Iterator[tuple[str, Path]]:
    roots = {"": Path(vllm_plugins.__file__).parent}
    for family in _families():
        spec = find_spec(f"vllm_plugins.{family}")
        assert spec is not None and spec.submodule_search_locations, f"{family} is not a package"
        roots[f"{family}/"] = Path(next(iter(spec.submodule_search_locations)))
    for prefix, root in roots.items():
        for path in sorted(root.rglob("*.py")):
            where = prefix + path.relative_to(root).as_posix()
            if not where.startswith("compat/"):
                yield where, path


def _families() -> list[str]:
    """Return the subpackages that hold our own plug-ins; their folders may lie elsewhere."""
    modules = [point.module.split(".") for point in entry_points().values()]
    return sorted({module[1] for module in modules if module[0] == "vllm_plugins"})


def uses_of_source(source: str, where: str) -> list[Use]:
    """Return what one module uses."""
    finder = _Finder(where)
    finder.visit(ast.parse(source))
    return finder.uses


def _is_upstream(module: str) -> bool:
    return module.partition(".")[0] in UPSTREAM


class _Finder(ast.NodeVisitor):
    """Walks one module, keeping the known upstream types of local names."""

    def __init__(self, where: str) -> None:
        self.uses: list[Use] = []
        self._where = where
        self._imported: dict[str, str] = {}
        self._types: dict[str, str] = {}
        self._elements: dict[str, str] = {}
        self._own: set[str] = set()
        self._base = ""

    def _use(self, symbol: str, node: ast.expr | ast.stmt) -> None:
        self.uses.append(Use(symbol, self._where, node.lineno))

    def visit_Import(self, node: ast.Import) -> None:
        """Record ``import vllm.x``."""
        for name in node.names:
            if _is_upstream(name.name):
                self._use(name.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Record ``from vllm.x import y`` and remember what ``y`` is."""
        if node.level == 0 and node.module and _is_upstream(node.module):
            for name in node.names:
                self._imported[name.asname or name.name] = f"{node.module}:{name.name}"
                self._use(f"{node.module}:{name.name}", node)

    def visit_Call(self, node: ast.Call) -> None:
        """Record modules that are looked up by name."""
        looked_up = ast.unparse(node.func) in ("sys.modules.get", "import_module")
        if looked_up and isinstance(node.args[0], ast.Constant):
            name = str(node.args[0].value)
            if _is_upstream(name):
                self._use(name, node)
        self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Look at a class whose base is upstream with that base in mind."""
        bases = [self._imported.get(ast.unparse(base), "") for base in node.bases]
        before = self._base, self._own
        self._base = next(filter(None, bases), "")
        self._own = _defined_in(node)
        self.generic_visit(node)
        self._base, self._own = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Start from the types of the annotated parameters."""
        before = dict(self._types), dict(self._elements)
        if self._base and node.name in _methods_called_upstream(node):
            self._use(f"{self._base}.{node.name}", node)
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            self._annotate(argument)
        self.generic_visit(node)
        self._types, self._elements = before

    def _annotate(self, argument: ast.arg) -> None:
        self._types.pop(argument.arg, None)
        self._elements.pop(argument.arg, None)
        annotation = argument.annotation
        if isinstance(annotation, ast.Subscript):
            inner = ast.unparse(annotation.slice)
            if inner in self._imported:
                self._elements[argument.arg] = self._imported[inner]
        elif annotation is not None and ast.unparse(annotation) in self._imported:
            self._types[argument.arg] = self._imported[ast.unparse(annotation)]

    def visit_Assign(self, node: ast.Assign) -> None:
        """Remember the types of assigned names."""
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for name, value in zip(target.elts, node.value.elts, strict=True):
                    self._bind(name, self._type(value))
            else:
                self._bind(target, self._type(node.value))
        self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        """Take the type that an ``assert isinstance(...)`` gives a name."""
        test = node.test
        if isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance":
            self._bind(test.args[0], self._imported.get(ast.unparse(test.args[1]), ""))
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        """Remember the type of the loop's variable."""
        self._bind(node.target, self._element(node.iter))
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """Remember the type of a comprehension's variable."""
        self._bind(node.target, self._element(node.iter))
        self.generic_visit(node)

    def _visit_comprehension(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp) -> None:
        # The element stands before the loops that give its names a type.
        for generator in node.generators:
            self.visit(generator)
        self.visit(node.elt)

    visit_ListComp = visit_GeneratorExp = visit_SetComp = _visit_comprehension  # noqa: N815

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Record an attribute of a value whose upstream type is known."""
        owner = self._type(node.value)
        if node.attr.startswith(OWN_PREFIX):
            pass
        elif owner:
            self._use(f"{owner}.{node.attr}", node)
        elif self._base and ast.unparse(node.value) == "self" and node.attr not in self._own:
            self._use(f"{self._base}.{node.attr}", node)
        self.generic_visit(node)

    def _bind(self, target: ast.expr, found: str) -> None:
        if isinstance(target, ast.Name):
            self._types.pop(target.id, None)
            if found:
                self._types[target.id] = found

    def _type(self, node: ast.expr) -> str:
        if isinstance(node, ast.Name):
            return self._types.get(node.id, "") or self._imported.get(node.id, "")
        if isinstance(node, ast.Attribute):
            ours = not self._type(node.value)
            if ours and (self._where, node.attr) in NOT_UPSTREAM:
                return ""
            known = {**ATTRIBUTE_TYPES, **OUR_ATTRIBUTES} if ours else ATTRIBUTE_TYPES
            return known.get(node.attr, "")
        return ""

    def _element(self, node: ast.expr) -> str:
        if isinstance(node, ast.Subscript):
            return self._element(node.value)
        if isinstance(node, ast.Attribute):
            return ELEMENT_TYPES.get(node.attr, "")
        if ast.unparse(node) == "outputs.values()":
            return "vllm.v1.engine:EngineCoreOutputs"
        return self._elements.get(node.id, "") if isinstance(node, ast.Name) else ""


def _defined_in(node: ast.ClassDef) -> set[str]:
    """Return the names that a class defines, or that its methods set as new on ``self``."""
    own = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    own |= {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}
    for item in node.body:
        for inner in ast.walk(item):
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                own |= _stored(inner)
    return own


def _stored(node: ast.AST) -> set[str]:
    stored = isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    return {node.attr} if stored and isinstance(node, ast.Attribute) else set()


def _methods_called_upstream(node: ast.FunctionDef) -> set[str]:
    """Return the names of the stock methods that a method wraps with ``super()``."""
    return {
        inner.attr
        for inner in ast.walk(node)
        if isinstance(inner, ast.Attribute) and ast.unparse(inner.value) == "super()"
    }

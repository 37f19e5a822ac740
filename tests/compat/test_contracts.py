"""The contracts hold on the installed vLLM, cover all that we use, and can fail."""

import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from vllm_plugins.compat import CONTRACTS, Contract, check_contracts, docs
from vllm_plugins.compat.combinations import own_plugins
from vllm_plugins.compat.contract import attributes_of
from vllm_plugins.compat.usage import Use, find_uses, uses_of_source
from vllm_plugins.registry import load

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "contract",
    [contract for contract in CONTRACTS if contract.applies],
    ids=lambda c: f"{c.symbol}-{c.kind}",
)
def test_contract_holds(contract):
    contract.verify()


def test_every_use_of_another_package_has_a_contract():
    missing = {
        f"{use.symbol} ({use.where}:{use.line})"
        for use in find_uses()
        if not any(contract.covers(use.symbol) for contract in CONTRACTS)
    }
    assert not missing, f"add these to vllm_plugins/compat/contracts.py: {sorted(missing)}"


def test_no_contract_is_left_over():
    """Each is used in a place that the finder sees, or in one that the contract names."""
    symbols = {use.symbol for use in find_uses()}
    for contract in CONTRACTS:
        assert contract.used_in or any(contract.covers(symbol) for symbol in symbols), contract
        for where in contract.used_in:
            roots = (ROOT / "vllm_plugins", ROOT)
            assert any((root / where).exists() for root in roots), contract


def test_upstream_page_is_current():
    path = ROOT / docs.PAGE
    assert path.read_text() == docs.page(), "run `python -m vllm_plugins.compat.docs`"


class Base:
    """Something upstream."""

    kept = 1

    def __init__(self, size: int) -> None:
        self.size = size
        self.parts: list[int] = []

    def call(self, first: int, second: int = 0) -> None:
        """Do nothing."""

    def must(self, first: int, second: int) -> None:
        """Do nothing."""


BASE = f"{__name__}:Base"


@pytest.mark.parametrize(
    ("contract", "reason"),
    [
        (Contract("no_such_package", "module", ""), "does not import"),
        (Contract(f"{__name__}:Gone", "class", ""), "has no 'Gone'"),
        (Contract(f"{BASE}.gone", "function", "", parameters=()), "has no 'gone'"),
        (Contract(f"{BASE}.call", "class", ""), "is not a class"),
        (Contract(f"{BASE}.kept", "function", ""), "is not a function"),
        (Contract(BASE, "class", "", bases=("builtins:dict",)), "no longer derives from"),
        (Contract(BASE, "attributes", "", attributes=("kept", "gone")), "lacks gone"),
        (Contract(BASE, "object", "", attributes=("gone",)), "lacks gone"),
        (Contract(f"{BASE}.call", "function", "", parameters=("other",)), "expected the param"),
        (Contract(f"{BASE}.call", "function", "", parameters=("first",)), "new parameters"),
        (Contract(f"{BASE}.must", "function", "", parameters=("first", "[...]")), "needs more"),
        (
            Contract(
                "vllm.v1.core.sched.request_queue:RequestQueue",
                "abstract methods",
                "",
                attributes=("add_request",),
            ),
            "has new abstract methods",
        ),
    ],
)
def test_a_broken_contract_is_found(contract, reason):
    (broken,) = check_contracts([contract])
    assert reason in str(broken)
    assert contract.symbol in str(broken)


@pytest.mark.parametrize(("versions", "applies"), [("", True), (">=0.27", True), (">=99", False)])
def test_a_contract_about_other_versions_is_not_checked(versions, applies):
    gone = Contract(f"{__name__}:Gone", "class", "", vllm=versions)
    assert gone.applies == applies
    assert len(check_contracts([gone])) == applies


def test_rows_of_one_plugin_alone_are_about_its_versions():
    scoped = [contract for contract in CONTRACTS if contract.vllm]
    needed = {name: load(name).requires.vllm for name in own_plugins()}
    assert {contract.vllm for contract in scoped} == set(filter(None, needed.values()))
    for name, versions in needed.items():
        rows = [c for c in scoped if any(f"/{name}/" in place for place in c.used_in)]
        assert [c for c in rows if versions.removeprefix(">=") not in SpecifierSet(c.vllm)] == []
    core = ("activation.py", "engine/scheduler_host.py", "metrics.py", "settings.py")
    assert not [c for c in scoped if set(c.used_in) & set(core)]
    assert all("| all |" in row or "| >=" in row for row in docs.page().splitlines()[-50:])


@pytest.mark.parametrize(
    "contract",
    [
        Contract(f"{BASE}.call", "function", "", parameters=("first", "second")),
        Contract(f"{BASE}.call", "function", "", parameters=("first", "[...]")),
        Contract(f"{BASE}.must", "function", "", parameters=("first", "...")),
        Contract(BASE, "attributes", "", attributes=("kept", "size", "parts", "call")),
    ],
)
def test_what_is_allowed_passes(contract):
    assert check_contracts([contract]) == []


def test_instance_attributes_are_found_without_an_instance():
    assert {"size", "parts", "kept", "call"} <= attributes_of(Base)
    assert "first" not in attributes_of(Base)


SAMPLE = """
import sys
from vllm.v1.request import Request
from vllm.v1.core.sched.scheduler import Scheduler

class Host(Scheduler):
    def __init__(self):
        super().__init__()
        self.plugin_own = 1

    def step(self, request: Request, many: list[Request]):
        ages = [other.arrival_time for other in many]
        config = self.vllm_config
        config.scheduler_config.max_num_seqs
        first, second = request.sampling_params, self.plugin_own
        first.extra_args
        sys.modules.get("vllm.engine.arg_utils")
        return request.num_tokens
"""
SCHEDULER, REQUEST = "vllm.v1.core.sched.scheduler:Scheduler", "vllm.v1.request:Request"


def test_uses_are_found_in_source():
    found = {use.symbol for use in uses_of_source(SAMPLE, "x.py")}
    assert found == {
        REQUEST,
        SCHEDULER,
        f"{SCHEDULER}.__init__",
        f"{SCHEDULER}.vllm_config",
        "vllm.config:VllmConfig.scheduler_config",
        "vllm.config:SchedulerConfig.max_num_seqs",
        f"{REQUEST}.arrival_time",
        f"{REQUEST}.num_tokens",
        f"{REQUEST}.sampling_params",
        "vllm.sampling_params:SamplingParams.extra_args",
        "vllm.engine.arg_utils",
    }


OWN = """
from dataclasses import dataclass
from vllm.v1.request import Request

@dataclass
class Report(Request):
    lost: int

    def join(self, other: Request):
        first = other.num_tokens
        assert isinstance(other, Report)
        return self.lost + other.lost
"""


def test_what_a_subclass_adds_is_no_use():
    """Fields of our own, and a name that an assertion says is of our own class."""
    found = {use.symbol for use in uses_of_source(OWN, "x.py")}
    assert found == {REQUEST, f"{REQUEST}.num_tokens"}


def test_every_import_of_vllm_is_found():
    """The finder against a plain search of the source."""
    pattern = re.compile(r"^\s*(?:from|import) (vllm(?:\.\w+)*)\b(?!_)", re.MULTILINE)
    found = {(use.where, use.symbol.partition(":")[0]) for use in find_uses()}
    families = {"": "vllm_plugins", **{f"{n}/": n for n in ("schedulers", "kv_connectors")}}
    for prefix, folder in families.items():
        for path in (ROOT / folder).rglob("*.py"):
            where = prefix + path.relative_to(ROOT / folder).as_posix()
            if not where.startswith("compat/"):
                for module in pattern.findall(path.read_text()):
                    assert (where, module) in found


def test_a_use_says_where_it_is():
    (use,) = uses_of_source("\nimport vllm.plugins\n", "y.py")
    assert use == Use("vllm.plugins", "y.py", 2)

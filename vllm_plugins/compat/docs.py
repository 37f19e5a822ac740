"""Writes ``docs/upstream.md`` from the contracts: ``python -m vllm_plugins.compat.docs``."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from vllm_plugins.compat.contract import Contract
from vllm_plugins.compat.contracts import CONTRACTS
from vllm_plugins.compat.usage import Use, find_uses

PAGE = Path("docs/upstream.md")
HEAD = """\
# What this package relies on in vLLM

Generated from the contract tests by `python -m vllm_plugins.compat.docs`; do not edit. Each row is
one upstream symbol that the package subclasses, wraps, calls or reads, with what it relies on and
why. `tests/compat` checks every row against the installed vLLM, and the version matrix
([compatibility.md](compatibility.md)) does so for every supported version. A test compares the
table with the source: a use that is not in it fails.

Authors of other plug-ins can run the same checks, or check a table of their own:

```python
from vllm_plugins.compat import CONTRACTS, Contract, check_contracts

mine = Contract(
    "vllm.v1.core.sched.scheduler:Scheduler.add_request",
    "function",
    "Overridden by my scheduler.",
    parameters=("request",),
)
for broken in check_contracts([*CONTRACTS, mine]):
    print(broken)
```

In a list of parameters, `...` stands for any others and `[...]` for any others with a default. A
row with a range of versions is needed by a plug-in that runs on those alone, and checked there
alone.

| Symbol | Kind | Relied on | Why | Used in | vLLM |
|---|---|---|---|---|---|
"""


def page(contracts: Sequence[Contract] = CONTRACTS) -> str:
    """Return the page's text."""
    uses = find_uses()
    return HEAD + "".join(_row(contract, uses) for contract in contracts)


def _row(contract: Contract, uses: Iterable[Use]) -> str:
    where = {use.where for use in uses if contract.covers(use.symbol)} | set(contract.used_in)
    cells = (
        f"`{contract.symbol}`",
        contract.kind,
        f"`{contract.relies_on()}`" if contract.kind != "behaviour" else _what(contract),
        contract.why,
        ", ".join(f"`{name}`" for name in sorted(where)),
        contract.vllm or "all",
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _what(contract: Contract) -> str:
    text = (contract.check.__doc__ or "") if contract.check else ""
    return " ".join(text.split())


def main() -> int:
    """Write the page below the current folder."""
    argparse.ArgumentParser(description=__doc__.split(":", maxsplit=1)[0]).parse_args()
    PAGE.write_text(page())
    print(PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

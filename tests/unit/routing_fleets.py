"""Small fleets for tests of the routing policies."""

from __future__ import annotations

from vllm_plugins.routing import Capacity, Fleet, Instance, Role

CODES = {"E": Role.ENCODE, "P": Role.PREFILL, "D": Role.DECODE}


def fleet(names: str, roles: str = "", capacity: Capacity | None = None, least: int = 1) -> Fleet:
    """Return instances named by stage, as in ``"P0 P1 D0"``, all able to take the other roles."""
    held = frozenset(CODES[code] for code in roles)
    return Fleet(
        [
            Instance(name, f"http://{name}", CODES[name[0]], held, capacity or Capacity())
            for name in names.split()
        ],
        least,
    )

"""Policies of the disaggregation router, without I/O or a clock.

Everything here is driven by its caller, which passes the time as ``now``, in seconds of any clock
that never goes back. The HTTP router, an application of another framework, the simulator and the
tests use the same objects.
"""

from __future__ import annotations

from vllm_plugins.routing.dispatch import (
    DISPATCHERS,
    Dispatcher,
    LeastBacklog,
    RoundRobin,
    assign_images,
)
from vllm_plugins.routing.health import Health
from vllm_plugins.routing.instances import Capacity, Fleet, Instance, Role, State
from vllm_plugins.routing.ledger import Ledger, Load, Ticket, Work
from vllm_plugins.routing.roles import Move, Phase, RoleMonitor, RoleSwitch
from vllm_plugins.routing.waiting import QueueFull, WaitingRoom

__all__ = [
    "DISPATCHERS",
    "Capacity",
    "Dispatcher",
    "Fleet",
    "Health",
    "Instance",
    "LeastBacklog",
    "Ledger",
    "Load",
    "Move",
    "Phase",
    "QueueFull",
    "Role",
    "RoleMonitor",
    "RoleSwitch",
    "RoundRobin",
    "State",
    "Ticket",
    "WaitingRoom",
    "Work",
    "assign_images",
]

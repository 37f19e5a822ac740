"""What a plug-in declares: its name, its options, what it needs and what it changes.

A plug-in is one class, found through the entry-point group ``vllm_plugins.plugins``. Declaring
one imports neither torch nor vLLM, so that listing and refusing are quick; whatever needs them
is imported inside the methods that run in an engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from vllm_plugins.errors import PluginError
from vllm_plugins.versions import is_diffusion

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_plugins.arguments import EngineArguments
    from vllm_plugins.engine.policy import SchedulerPolicy
    from vllm_plugins.engine.worker_host import WorkerListener

Family = Literal[
    "scheduler",
    "attention backend",
    "kv connector",
    "speculative decoding",
    "visual tokens",
    "expert offload",
    "quantization",
    "model",
]
Runner = Literal["V1", "V2"]

SCHEDULER_HOST = "vllm_plugins.engine.scheduler_host.create_scheduler"
WORKER_HOST = "vllm_plugins.engine.worker_host.PluginWorker"
# Name under which vLLM finds a plug-in's attention backend, by device type.
ATTENTION_BACKENDS = {"cpu": "CPU_ATTN", "cuda": "CUSTOM"}


class Options(BaseModel):
    """Base of a plug-in's options: frozen; an unknown key, NaN and infinity are errors.

    The description of each field is its help text, so it names the unit and what the default
    means. A field whose value changes the model's computation graph is declared with
    ``json_schema_extra={"graph": True}``; only such fields take part in vLLM's compile-cache key.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def graph_values(self) -> dict[str, Any]:
        """Return the options that change the computation graph, as JSON-ready values."""
        fields = type(self).model_fields
        names = {n for n, f in fields.items() if (f.json_schema_extra or {}).get("graph")}  # type: ignore[union-attr]
        return self.model_dump(mode="json", include=names)


class NoOptions(Options):
    """For a plug-in that is only on or off."""


@dataclass(frozen=True)
class Paper:
    """Where a technique was published."""

    title: str
    arxiv: str = ""


@dataclass(frozen=True)
class Requirements:
    """What a plug-in can run on; None means any.

    Args:
        vllm: A version specifier, inside the package's own tested window.
        platforms: Device types as vLLM names them (``cuda``, ``cpu``, ...).
        runners: Model runners.
    """

    vllm: str = ""
    platforms: frozenset[str] | None = None
    runners: frozenset[Runner] | None = None


class Plugin:
    """Base class of a plug-in's declaration."""

    name: ClassVar[str]
    family: ClassVar[Family]
    summary: ClassVar[str]
    papers: ClassVar[tuple[Paper, ...]] = ()
    exactness: ClassVar[str]
    """``exact``, or ``approximate`` and by which option; the neutral setting is exact."""
    requires: ClassVar[Requirements] = Requirements()
    conflicts: ClassVar[dict[str, str]] = {}
    """Names of plug-ins that cannot run beside this one, each with its reason."""
    Options: ClassVar[type[Options]] = NoOptions

    def configure(self, options: Any, arguments: EngineArguments) -> None:
        """Set the stock engine arguments that carry the plug-in; runs in the front end.

        Raises:
            PluginError: The user has set one of them to something else.
        """

    def enter_process(self, options: Any) -> None:
        """Prepare a process before it makes anything of the engine's configuration.

        Runs in the front end and in every process that is sent the configuration, perhaps more than
        once in each. It may register names with vLLM, and must leave those that it has alone.
        """

    def check(self, options: Any, config: VllmConfig) -> None:
        """Refuse a model or an engine configuration that the plug-in cannot serve.

        Runs where the complete configuration exists: in the front end and again in the engine.

        Raises:
            PluginError: The combination cannot work.
        """


class SchedulerPlugin(Plugin, ABC):
    """A plug-in that is one policy of the scheduler host."""

    family: ClassVar[Family] = "scheduler"
    refines_order_of: ClassVar[frozenset[str]] = frozenset()
    """Names of plug-ins that order waiting requests by a key, which this one's order then keeps to,
    knowing better what is left to compute of each."""

    def configure(self, options: Any, arguments: EngineArguments) -> None:
        """Choose the scheduler host, which finds its policies in the engine's configuration."""
        arguments.set("scheduler_cls", SCHEDULER_HOST)

    def check(self, options: Any, config: VllmConfig) -> None:
        """Refuse models for which vLLM has a scheduler of their own, which the host displaces."""
        if is_diffusion(config):
            raise PluginError(
                f"--plugin {self.name}",
                "diffusion models have a scheduler of their own",
                f"drop --plugin {self.name}",
            )

    def orders_waiting(self, options: Any) -> bool:
        """Whether the policy decides the order of waiting requests.

        Only one can, or one and another that refines its order.
        """
        return False

    @abstractmethod
    def policy(self, options: Any, config: VllmConfig) -> SchedulerPolicy:
        """Make the policy; runs once in each engine process."""


class WorkerPlugin(Plugin, ABC):
    """A plug-in with a part in each worker process, through the worker host."""

    def configure(self, options: Any, arguments: EngineArguments) -> None:
        """Choose the worker host, which finds its listeners in the engine's configuration."""
        arguments.set("worker_cls", WORKER_HOST)

    @abstractmethod
    def listener(self, options: Any, config: VllmConfig) -> WorkerListener:
        """Make the plug-in's part in a worker; runs once in each worker process."""


class AttentionPlugin(WorkerPlugin, ABC):
    """A plug-in that is an attention backend; its listener sets its layers up."""

    family: ClassVar[Family] = "attention backend"
    backends: ClassVar[dict[str, str]]
    """Dotted name of vLLM's backend class, by device type."""
    kernel_cases: ClassVar[str] = ""
    """Dotted name of what ``vllm-plugins bench --kernel`` times (`bench.kernels.MakeCases`)."""

    def configure(self, options: Any, arguments: EngineArguments) -> None:
        """Choose the worker host, which registers the backend, and on CUDA its name."""
        from vllm.platforms import current_platform

        super().configure(options, arguments)
        if current_platform.device_type == "cuda":
            from vllm.v1.attention.backends.registry import AttentionBackendEnum

            name = ATTENTION_BACKENDS["cuda"]
            arguments.set("attention_backend", AttentionBackendEnum[name])

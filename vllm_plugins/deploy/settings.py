"""What is deployed: the model, how many instances of each role, and where the router listens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from vllm_plugins.deploy.arguments import WHERE, check_router_args, check_serve_args, world_size
from vllm_plugins.errors import PluginError
from vllm_plugins.plugin import Options
from vllm_plugins.routing import Role
from vllm_plugins.wire.address import is_loopback


class Replicas(Options):
    """How many instances of a role there are, and when that changes."""

    least: int = Field(ge=0, le=1000, description="Instances at the start, and at least.")
    most: int = Field(ge=0, le=1000, description="Instances at most; the same for no change.")
    target_requests: float = Field(
        8.0, gt=0, description="Requests, computed and waiting, for which one instance is added."
    )
    upscale_delay_s: float = Field(30.0, ge=0, description="Time before one is added, in s.")
    downscale_delay_s: float = Field(
        600.0, ge=0, description="Time before one is taken away, in s."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Replicas:
        if self.most < self.least:
            raise ValueError(f"at most {self.most} is below at least {self.least}")
        if self.least == 0 and self.most > 0:
            raise ValueError("a role without an instance cannot serve: start with one at least")
        return self


def read_replicas(value: Any) -> Any:
    """Turn the short forms ``2`` and ``1:4`` into the fields of `Replicas`."""
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,6}(:\d{1,6})?", text):
        return value
    least, _, most = text.partition(":")
    return {"least": int(least), "most": int(most or least)}


class RoleSettings(Options):
    """The instances of one role."""

    replicas: Annotated[Replicas, BeforeValidator(read_replicas)] = Field(
        description="How many: N, LEAST:MOST, or all fields."
    )
    serve_args: tuple[str, ...] = Field(
        (), description="Further arguments of `vllm serve` for this role."
    )
    num_cpus: float | None = Field(
        None, ge=0, description="CPUs that Ray sets aside for an instance; by default all roles'."
    )
    num_gpus: float | None = Field(
        None, ge=0, description="GPUs for an instance; by default as many as it has workers."
    )
    resources: dict[str, float] = Field(
        default_factory=dict, description="Ray's custom resources, to choose nodes."
    )


def _role(replicas: int) -> Any:
    return Field(default_factory=lambda: RoleSettings.model_validate({"replicas": replicas}))


class DeploySettings(Options):
    """One deployment; the command line, the file and Ray Serve's arguments have these names."""

    model: str = Field(min_length=1, description="What `vllm serve` loads.")
    name: str = Field(
        "vllm-plugins",
        pattern=r"^[a-z0-9][a-z0-9-]{0,62}$",
        description="Name of the application in Ray Serve.",
    )
    device: Literal["cuda", "cpu"] = Field(
        "cuda", description="What instances run on; on cuda each gets a GPU for each worker."
    )
    num_cpus: float = Field(1.0, ge=0, description="CPUs that Ray sets aside for an instance.")
    serve_args: tuple[str, ...] = Field(
        (), description="Arguments of `vllm serve` for all instances."
    )
    prefill: RoleSettings = _role(1)
    decode: RoleSettings = _role(1)
    encode: RoleSettings = _role(0)
    pd: dict[str, Any] = Field(
        default_factory=dict, description="Options of --plugin pd, for prefill and decode."
    )
    epd: dict[str, Any] = Field(
        default_factory=dict, description="Options of --plugin epd, where there are encoders."
    )
    host: str = Field("127.0.0.1", description="Address on which the router listens.")
    port: int = Field(8000, ge=1, le=65535, description="Port on which the router listens.")
    router_args: tuple[str, ...] = Field(
        (), description="Further arguments of `vllm-plugins route`."
    )
    router_resources: dict[str, float] = Field(
        # Ray gives this resource to the head node alone, whose address clients know.
        default_factory=lambda: {"node:__internal_head__": 0.001},
        description="Ray's custom resources for the router; by default it runs on the head node.",
    )
    network: Literal["auto", "loopback", "cluster"] = Field(
        "auto",
        description="Where instances listen: on loopback, or on their node's address; auto means "
        "loopback while the cluster is one node.",
    )
    secret_file: Path | None = Field(
        None, description="File with the secret of the wire, at the same path on every node."
    )
    api_key_file: Path | None = Field(
        None, description="File with the key that clients send, at the same path on every node."
    )
    admin_key_file: Path | None = Field(
        None, description="File with the router's key for operators; by default it makes one."
    )
    drain_s: float = Field(
        30.0, gt=0, le=3600, description="Time for an instance to end its requests, in s."
    )
    start_timeout_s: float = Field(
        1200.0, gt=0, description="Time for an instance to load the model, in s."
    )

    @model_validator(mode="after")
    def _consistent(self) -> DeploySettings:
        if not self.prefill.replicas.most:
            raise ValueError("prefill needs one instance at least")
        if not self.decode.replicas.most and not self.encode.replicas.most:
            raise ValueError("without decode and encode there is nothing to disaggregate")
        for role in self.roles():
            self.plugins(role)
            check_serve_args(self.arguments(role))
        if self.network == "cluster":
            self.check_remote()
        _check_paths(self.secret_file, self.api_key_file, self.admin_key_file)
        check_router_args(self.router_args)
        return self

    def roles(self) -> list[Role]:
        """Return the roles that have instances."""
        return [role for role in Role if self.role(role).replicas.most]

    def role(self, role: Role) -> RoleSettings:
        """Return the settings of a role."""
        return {Role.PREFILL: self.prefill, Role.DECODE: self.decode, Role.ENCODE: self.encode}[
            role
        ]

    def arguments(self, role: Role) -> tuple[str, ...]:
        """Return the arguments of `vllm serve` that the operator chose for a role."""
        return (*self.serve_args, *self.role(role).serve_args)

    def cpus(self, role: Role) -> float:
        """Return the CPUs that Ray sets aside for one instance."""
        chosen = self.role(role).num_cpus
        return self.num_cpus if chosen is None else chosen

    def gpus(self, role: Role) -> float:
        """Return the GPUs of one instance."""
        chosen = self.role(role).num_gpus
        if chosen is not None:
            return chosen
        return world_size(self.arguments(role)) if self.device == "cuda" else 0.0

    def plugins(self, role: Role, host: str = "127.0.0.1") -> list[dict[str, Any]]:
        """Return the plug-ins of an instance, validated, each with its name and options.

        Args:
            role: Of the instance.
            host: Address that it serves KV and embeddings on.

        Raises:
            PluginError: An option is wrong.
        """
        from vllm_plugins.registry import load, validate_options

        specs = _specs(self, role, host)
        for spec in specs:
            plugin = load(spec["name"])
            validate_options(plugin, {k: v for k, v in spec.items() if k != "name"})
        return specs

    def lease_s(self) -> float:
        """Return for how long KV is held, in s."""
        from vllm_plugins.kv_connectors.pd.plugin import PdOptions

        return PdOptions.model_validate({"role": "both", **self.pd}).lease_s

    def check_remote(self) -> None:
        """Refuse to go beyond one host without a secret of the operator's.

        Raises:
            PluginError: There is none.
        """
        if self.secret_file is None:
            raise PluginError(
                f"{WHERE}: secret_file",
                "instances on several hosts need a secret that all of them share",
                "put one at the same path on every node and name it with --secret-file",
            )


def _specs(settings: DeploySettings, role: Role, host: str) -> list[dict[str, Any]]:
    remote = not is_loopback(host)
    common: dict[str, Any] = {"allow_remote": True} if remote else {}
    if settings.secret_file is not None:
        common["secret_file"] = str(settings.secret_file)
    specs = []
    if role is not Role.ENCODE and settings.decode.replicas.most:
        serves = {"bind_host": host} if remote and role is Role.PREFILL else {}
        specs.append({"name": "pd", **settings.pd, "role": role.value, **common, **serves})
    if settings.encode.replicas.most:
        specs.append({"name": "epd", **_epd(settings.epd, role), **common})
        if remote and role is Role.ENCODE:
            specs[-1]["bind_host"] = host
    return specs


def _epd(options: Mapping[str, Any], role: Role) -> dict[str, Any]:
    """Return a role's share of the options; decode instances take embeddings as prefill's do.

    They need them where a pull fails or a request is preempted, and the prompt is computed anew.
    """
    if role is not Role.ENCODE:
        return {**options, "role": "prefill"}
    return {**{k: v for k, v in options.items() if k != "on_missing"}, "role": "encode"}


def _check_paths(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.is_absolute():
            raise PluginError(
                f"{WHERE}: {path}",
                "is no absolute path, and other processes start elsewhere",
                "write the whole path",
            )


def read_settings(values: Mapping[str, Any]) -> DeploySettings:
    """Validate settings.

    Raises:
        PluginError: One of them is wrong; in one line.
    """
    try:
        return DeploySettings.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, PluginError):
            raise cause from None
        key = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ").replace("\n", " ")
        where = f"{WHERE}: {key}" if key else WHERE
        mend = "see `vllm-plugins deploy --help` and docs/deploy.md"
        raise PluginError(where, reason[:1].lower() + reason[1:], mend) from None

"""Cost profiles: a fitted cost model in a JSON file, keyed by what it was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_plugins.engine.cost_model import FEATURES, StepCostModel
from vllm_plugins.errors import PluginError
from vllm_plugins.versions import installed_vllm

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# A profile is a few hundred bytes; anything much larger is some other file.
MAX_BYTES = 1 << 20


class ProfileKey(BaseModel):
    """What a profile was measured on; it is valid for nothing else."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    dtype: str
    tensor_parallel: int
    pipeline_parallel: int
    device: str
    vllm: str


class CostProfile(BaseModel):
    """A cost profile as it stands in its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    key: ProfileKey
    features: tuple[str, ...] = FEATURES
    coefficients: tuple[float, ...]
    knee: float | None = Field(description="Rows; null for one regime.")
    tile: int = Field(ge=1)
    report: dict[str, Any] = {}

    def cost_model(self) -> StepCostModel:
        """Return the model that the profile holds."""
        knee = float("inf") if self.knee is None else self.knee
        return StepCostModel(self.coefficients, knee, self.tile)


def profile_key(config: VllmConfig) -> ProfileKey:
    """Return the key of an engine's configuration."""
    # The same release is 0.32.0 or 0.32.0+cpu, depending on who asks its metadata.
    version = installed_vllm()
    return ProfileKey(
        model=_model_identity(config),
        dtype=str(config.model_config.dtype).removeprefix("torch."),
        tensor_parallel=config.parallel_config.tensor_parallel_size,
        pipeline_parallel=config.parallel_config.pipeline_parallel_size,
        device=_device_name(),
        vllm=version.public if version else "",
    )


def _model_identity(config: VllmConfig) -> str:
    """Name a model by its shape: folders move, and speed depends on the shape alone."""
    hf = config.model_config.hf_text_config
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "intermediate_size", "vocab_size")  # fmt: skip
    experts = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok",
               "moe_intermediate_size")  # fmt: skip
    shape = "-".join(str(getattr(hf, size, "")) for size in sizes)
    shape += "".join(f"-{getattr(hf, size)}" for size in experts if hasattr(hf, size))
    architecture = (config.model_config.hf_config.architectures or [""])[0]
    return f"{architecture}-{shape}-{config.model_config.quantization or 'none'}"


def _device_name() -> str:
    from vllm.platforms import current_platform

    name = str(current_platform.get_device_name())
    if current_platform.is_cpu():
        name = f"{platform.machine()} {len(os.sched_getaffinity(0))} cores"
    return name


MEND = "measure one with `vllm-plugins profile MODEL`"


def load_profile(path: Path, where: str) -> CostProfile:
    """Read a profile, whatever it was measured on.

    Args:
        path: The file.
        where: What names the file, for the message.

    Raises:
        PluginError: The file is missing or malformed.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PluginError(where, f"is larger than {MAX_BYTES} bytes", MEND)
        profile = CostProfile.model_validate_json(path.read_text())
    except OSError as error:
        raise PluginError(where, f"cannot be read ({error.strerror})", MEND) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PluginError(where, f"is not a cost profile ({place}: {first['msg']})", MEND) from None
    if profile.features != FEATURES or len(profile.coefficients) != len(FEATURES):
        raise PluginError(where, "has features of another version of this package", MEND)
    return profile


def read_profile(path: Path, config: VllmConfig) -> CostProfile:
    """Read a profile and check that it was measured on this engine's configuration.

    Raises:
        PluginError: The file is missing, malformed, or for something else.
    """
    where = f"--plugin sarathi: profile={path}"
    profile = load_profile(path, where)
    found, wanted = profile.key.model_dump(), profile_key(config).model_dump()
    for field, value in wanted.items():
        if found[field] != value:
            raise PluginError(
                where, f"was measured with {field}={found[field]}, this engine has {value}", MEND
            )
    return profile

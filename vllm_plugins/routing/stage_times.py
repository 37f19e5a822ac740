"""How long each stage takes: linear models, as profiled, in a JSON file.

A cost profile (``vllm-plugins profile``) has the times of prefill and decode, and not how many KV
blocks an instance has, nor how long encoding and handing over take.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_plugins.errors import PluginError

if TYPE_CHECKING:
    from vllm_plugins.engine.cost_profile import CostProfile

# Such a file has a dozen numbers; anything much larger is some other file.
MAX_BYTES = 1 << 16
MEND = (
    'write {"format": 1, "encode": {"base_ms": .., "token_ms": ..}, "prefill": {"base_ms": .., '
    '"token_ms": ..}, "decode": {"base_ms": .., "request_ms": .., "context_ms": ..}, '
    '"kv_blocks": ..}'
)


class _Model(BaseModel):
    """No unknown names and no infinities."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class EncodeTimes(_Model):
    """Time of an encoder batch: ``base_ms + token_ms * tokens``."""

    base_ms: float = Field(ge=0, description="Milliseconds of a batch.")
    token_ms: float = Field(ge=0, description="Milliseconds per encoder token.")
    max_images: int = Field(default=1, ge=1, le=1024, description="Images of a batch.")

    def ms(self, tokens: int) -> float:
        """Return the milliseconds for a batch with so many encoder tokens; 0 for none."""
        return self.base_ms + self.token_ms * tokens if tokens else 0.0


class PrefillTimes(_Model):
    """Time of a prompt: ``base_ms + token_ms * tokens + token2_ms * tokens**2``."""

    base_ms: float = Field(ge=0, description="Milliseconds of a step.")
    token_ms: float = Field(ge=0, description="Milliseconds per prompt token.")
    token2_ms: float = Field(default=0.0, ge=0, description="Milliseconds per squared token.")

    def ms(self, tokens: int) -> float:
        """Return the milliseconds for a prompt on its own."""
        return self.base_ms + self.chunk_ms(0, tokens)

    def chunk_ms(self, start: int, end: int) -> float:
        """Return what prompt tokens from start to end add to a step, in milliseconds."""
        return self.token_ms * (end - start) + self.token2_ms * (end**2 - start**2)


class DecodeTimes(_Model):
    """Time of a decode step: ``base_ms + request_ms * batch + context_ms * context``."""

    base_ms: float = Field(ge=0, description="Milliseconds of a step.")
    request_ms: float = Field(ge=0, description="Milliseconds per request of the batch.")
    context_ms: float = Field(ge=0, description="Milliseconds per token of context of the batch.")

    def ms(self, batch: int, context: int) -> float:
        """Return the milliseconds of a step with so many requests and tokens of context."""
        return self.base_ms + self.request_ms * batch + self.context_ms * context


class StageTimes(_Model):
    """Everything the simulator knows of one kind of worker."""

    format: Literal[1] = 1
    encode: EncodeTimes = EncodeTimes(base_ms=0, token_ms=0)
    prefill: PrefillTimes
    decode: DecodeTimes
    kv_blocks: int = Field(ge=1, le=1 << 31, description="KV blocks of an instance.")
    block_size: int = Field(default=16, ge=1, le=4096, description="Tokens of a KV block.")
    max_batch: int = Field(default=256, ge=1, le=1 << 16, description="Requests of a decode step.")
    token_budget: int = Field(
        default=2048, ge=1, le=1 << 20, description="Tokens of a step of a colocated instance."
    )
    transfer_ms_per_token: float = Field(
        default=0.0, ge=0, description="Milliseconds to move one prompt token's KV."
    )

    def blocks(self, tokens: int) -> int:
        """Return the KV blocks that hold so many tokens."""
        return -(-tokens // self.block_size)


def times_of(profile: CostProfile, kv_blocks: int, block_size: int) -> StageTimes:
    """Return the stage times that a cost profile tells, without encoding and handing over.

    Steps of prefill are taken to lie above the profile's knee and steps of decode below it, where
    both are linear, and rows are not rounded up to the profile's tile.

    Args:
        profile: Of one instance.
        kv_blocks: KV blocks of an instance.
        block_size: Tokens of a KV block.
    """
    model = profile.cost_model()
    constant, row, above, request, context, product = (1e3 * one for one in model.coefficients)
    before_knee = above * model.knee if above else 0.0
    return StageTimes(
        prefill=PrefillTimes(
            base_ms=max(0.0, constant + request - before_knee),
            token_ms=row + above,
            # A whole prompt has half of its tokens squared as query-key products.
            token2_ms=product / 2,
        ),
        decode=DecodeTimes(base_ms=constant, request_ms=row + request, context_ms=context),
        kv_blocks=kv_blocks,
        block_size=block_size,
    )


def load_stage_times(path: Path) -> StageTimes:
    """Read stage times.

    Raises:
        PluginError: The file is missing, too large or malformed.
    """
    where = f"--times {path}"
    try:
        if path.stat().st_size > MAX_BYTES:
            raise PluginError(where, f"is larger than {MAX_BYTES} bytes", MEND)
        return StageTimes.model_validate_json(path.read_bytes())
    except OSError as error:
        raise PluginError(where, f"cannot be read ({error.strerror})", MEND) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "file"
        raise PluginError(where, f"is malformed ({place}: {first['msg']})", MEND) from None

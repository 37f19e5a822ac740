"""What a drafter's checkpoint says about itself, beside the shape of its layer.

The ratios are the paper's useful settings (its table of isolated operators): pruning and pooling
20, convolution 3, two queries.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_plugins.errors import PluginError

Operator = Literal["prune", "pool", "conv", "resample", "text_only"]
Mode = Literal["off", "static", "select", "weighted", "concat"]
Choice = Literal["prune", "pool", "conv", "resample", "text_only", "weighted", "concat"]
"""What is done to an image: one operator, or one of the two combinations of several."""

OPERATORS: tuple[Operator, ...] = ("prune", "pool", "conv", "resample", "text_only")
"""In the order of the gate's outputs."""
WEIGHTED: tuple[Operator, ...] = ("prune", "pool", "conv")
CONCATENATED: tuple[Operator, ...] = ("prune", "pool", "conv", "resample")


class SpecVLMSettings(BaseModel):
    """The block ``specvlm`` of a drafter's config.json.

    Attributes:
        format: Version of this block.
        mode: ``select`` lets the gate pick an operator (the paper's default), ``static`` always
            takes ``default_operator``, ``weighted`` adds pruning, pooling and convolution up by the
            gate's weights, ``concat`` lays pruning, pooling, convolution and resampler side by
            side, ``off`` keeps every row.
        default_operator: Of ``static``, and wherever the gate cannot see the question.
        select_from: Operators that the gate picks from.
        prune_ratio: Image rows for each that pruning keeps.
        pool_ratio: Image rows for each pooled one.
        conv_ratio: Image rows for each output of the convolution, also the ratio of ``weighted``;
            rounded to a stride along the lines of the patch grid.
        queries: Rows of the resampler.
        block_size: Tokens of a KV block that training laid rows out for; rows are dropped by whole
            blocks, so a server with another size sees a few rows more or fewer.
        seed: Of pruning, mixed with the picture's content.
        grid: Lines and columns of the patch grid of an image.
        gate_width: Hidden units of the gate.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    mode: Mode = "select"
    default_operator: Operator = "pool"
    select_from: tuple[Operator, ...] = Field(OPERATORS, min_length=1)
    prune_ratio: float = Field(20.0, ge=1, le=30)
    pool_ratio: float = Field(20.0, ge=1, le=30)
    conv_ratio: float = Field(3.0, ge=1, le=5)
    queries: int = Field(2, ge=1, le=16)
    block_size: int = Field(16, ge=1, le=4096)
    seed: int = Field(0, ge=0, lt=1 << 53)
    grid: tuple[int, int] = (24, 24)
    gate_width: int = Field(256, ge=1, le=65536)

    @model_validator(mode="after")
    def _check_grid(self) -> SpecVLMSettings:
        if not all(1 <= side <= 4096 for side in self.grid):
            raise ValueError("grid must be lines and columns, 1 to 4096")
        return self

    def choice(self, picked: Operator | None = None) -> Choice | None:
        """Return what is done to an image, None to leave it whole.

        Args:
            picked: The gate's operator, where the mode asks for one and it could see the question.
        """
        if self.mode == "off":
            return None
        if self.mode == "weighted" or self.mode == "concat":
            return self.mode
        return picked if self.mode == "select" and picked is not None else self.default_operator

    def planned(self, choice: Choice, length: int) -> int:
        """Return how many rows are asked of whole blocks for an image of ``length`` rows.

        What the gate picks is known on the device alone, and the number of rows has to be known
        before: whatever it picks from gets as many as the one that wants most.
        """
        if self.mode != "select":
            return self.wanted(choice, length)
        return max(self.wanted(operator, length) for operator in self.select_from)

    def wanted(self, choice: Choice, length: int) -> int:
        """Return how many rows this choice alone makes of an image of ``length`` rows."""
        if choice == "concat":
            return min(length, sum(self.wanted(part, length) for part in CONCATENATED))
        ratios = {
            "prune": self.prune_ratio,
            "pool": self.pool_ratio,
            "conv": self.conv_ratio,
            "weighted": self.conv_ratio,
        }
        if choice in ratios:
            # Never fewer than the ratio promises, however floats round.
            return int(-(-length // ratios[choice]))
        return min(length, self.queries) if choice == "resample" else 0


def read_settings(block: Any, where: str) -> SpecVLMSettings:
    """Check the block of a config.json.

    Raises:
        PluginError: It is absent or not of this format.
    """
    if not isinstance(block, dict):
        raise PluginError(where, "has no block 'specvlm'", "train one: vllm-plugins train specvlm")
    try:
        return SpecVLMSettings(**block)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "specvlm"
        raise PluginError(f"{where}: specvlm.{name}", first["msg"], "mend config.json") from None

"""What a Dynamic-LLaVA checkpoint says about itself: ``sparse_config`` in its ``config.json``.

Imports no torch, so that a front end can check a model before any engine starts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vllm_plugins.errors import PluginError

KEY = "sparse_config"
"""Name of the entry in ``config.json``, as in the published code."""

MAX_CONFIG_BYTES = 1 << 20


class SparseConfig(BaseModel):
    """Where and how much is dropped, and the predictors' sizes (paper, section 3 and appendix A.1).

    A share of 1 says that nothing of that kind is dropped and that there is no predictor for it.

    Attributes:
        sparse_layer: The predictors read the input of this decoder layer, counted from 0; it and
            all layers above see fewer tokens.
        d_model: Width inside the predictors.
        nhead: Attention heads of the image predictor.
        dim_feedforward: Width of its feed-forward parts.
        num_layers: Its transformer blocks.
        image_keep_rate: Share of an image's tokens that is kept, r_I.
        text_keep_rate: Mean share of an answer's tokens that is kept, r_OT.
        version: Format of the entry and of the predictors' parameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparse_layer: int = Field(default=2, ge=1, le=1024)
    d_model: int = Field(default=512, ge=4, le=65536, multiple_of=4)
    nhead: int = Field(default=8, ge=1, le=1024)
    dim_feedforward: int = Field(default=2048, ge=1, le=262144)
    num_layers: int = Field(default=2, ge=1, le=64)
    image_keep_rate: float = Field(default=0.2, gt=0, le=1)
    text_keep_rate: float = Field(default=0.5, gt=0, le=1)
    version: Literal[1] = 1

    @model_validator(mode="after")
    def _heads_divide(self) -> SparseConfig:
        if self.d_model % self.nhead:
            raise ValueError(f"d_model {self.d_model} is not a multiple of nhead {self.nhead}")
        if self.image_keep_rate == self.text_keep_rate == 1:
            raise ValueError("image_keep_rate and text_keep_rate are both 1: nothing is dropped")
        return self

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> SparseConfig:
        """Return the configuration that a mapping describes.

        Args:
            values: Such as the entry of ``config.json``.
            where: What an error names.

        Raises:
            PluginError: A value is missing, unknown or out of range.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            name = ".".join(map(str, first["loc"])) or KEY
            raise PluginError(
                where, f"{name}: {first['msg']}", "give values of a Dynamic-LLaVA checkpoint"
            ) from None

    @classmethod
    def read(cls, folder: Path) -> SparseConfig | None:
        """Return the configuration of a model folder, or None where it has none.

        Raises:
            PluginError: ``config.json`` is missing or unreadable, or the entry is invalid.
        """
        path = folder / "config.json"
        try:
            if path.stat().st_size > MAX_CONFIG_BYTES:
                raise ValueError(f"over {MAX_CONFIG_BYTES} bytes")
            values = json.loads(path.read_text()).get(KEY)
        except (OSError, ValueError, AttributeError) as error:
            reason = f"cannot be read ({error})"
            raise PluginError(str(path), reason, "name a model folder") from None
        return None if values is None else cls.of(values, f"{path}: {KEY}")

"""The settings that `zipcache_quality` compares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vllm_plugins.attention_backends.zipcache.page import PageFormat

RATIOS = (0.1, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9)
ALWAYS_FIRST = 4


@dataclass(frozen=True)
class Setting:
    """One way to keep a cache.

    Attributes:
        bits: As the plug-in's option.
        ratio: Of salient tokens.
        choice: ``saliency``, ``random``, or ``global``: one quota for the prompt, as in the paper.
        block: Tokens of a block.
        normalizer: As the plug-in's option.
        scale: What values of a channel are divided by: ``largest`` magnitude, its ``root`` as in
            the published code, or ``none``.
        first: First tokens that are salient at any rate.
        keys: As the plug-in's option ``key_salient_ratio``.
        exact: Which of ``keys`` and ``values`` stay as they were, to see what the others cost.
        transformed: Whether keys are kept in the bases of ``--key-transform``.
    """

    bits: str
    ratio: float = 0.6
    choice: str = "saliency"
    block: int = 64
    normalizer: str = "probe_nnz"
    scale: str = "largest"
    first: int = ALWAYS_FIRST
    keys: float | None = None
    exact: str | None = None
    transformed: bool = False

    @property
    def label(self) -> str:
        """How the setting is named in tables."""
        ratio = f" r={self.ratio:g}" if self.bits == "4/2" else ""
        extra = [
            *([self.choice] if self.bits == "4/2" and self.choice != "saliency" else []),
            *([f"N={self.block}"] if self.block != 64 else []),
            *([self.normalizer] if self.normalizer != "probe_nnz" else []),
            *([f"value scale {self.scale}"] if self.scale != "largest" else []),
            *(["no first tokens"] if self.first != ALWAYS_FIRST else []),
            *([f"keys r={self.keys:g}"] if self.keys is not None else []),
            *([f"exact {self.exact}"] if self.exact is not None else []),
            *(["transformed"] if self.transformed else []),
        ]
        return ", ".join([self.bits + ratio, *extra])

    def page(self, head_size: int) -> PageFormat:
        """Return the format of its pages."""
        return PageFormat.of(self.block, head_size, self.bits, self.ratio, self.keys)


def settings(transformed: bool) -> Iterator[Setting]:
    """Return the settings that are compared, those with transformed keys as well if there are."""
    yield Setting("4/4")
    yield Setting("2/2")
    for ratio in RATIOS:
        yield Setting("4/2", ratio)
        yield Setting("4/2", ratio, "random")
    yield Setting("4/2", 0.6, "global")
    yield Setting("4/2", 0.6, normalizer="full_nnz")
    yield Setting("4/2", 0.6, scale="none")
    yield Setting("4/2", 0.6, first=0)
    for block in (32, 128):
        yield Setting("4/2", 0.6, block=block)
    yield Setting("4/4", block=128)
    yield Setting("4/4", block=32)
    # Which of the two needs its bits: keys, or values.
    yield Setting("4/2", 1, block=128, keys=0.6)
    yield Setting("4/2", 0.3, block=128, keys=0.8)
    for ratio in (0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8):
        yield Setting("4/2", ratio, block=128, keys=1)
    for ratio in (0, 0.2, 0.3, 0.4):
        yield Setting("4/2", ratio, keys=1)
    yield Setting("4/4", scale="root")
    yield Setting("4/2", 0.2, keys=1, scale="root")
    yield Setting("4/2", 0.2, block=128, keys=1, scale="root")
    for exact in ("keys", "values"):
        yield Setting("4/4", exact=exact)
        yield Setting("4/2", 0.2, block=128, keys=1, exact=exact)
    for block in (64, 128) if transformed else ():
        yield Setting("4/4", block=block, transformed=True)
        yield Setting("2/2", block=block, transformed=True)
        yield Setting("4/2", 0.6, block=block, transformed=True)
        for keys, ratio in ((1, 0), (1, 0.2), (1, 0.6), (0.9, 0.3), (0.8, 0.3), (0.8, 0.4)):
            yield Setting("4/2", ratio, block=block, keys=keys, transformed=True)
        yield Setting("4/2", 0.2, block=block, keys=1, transformed=True, exact="values")

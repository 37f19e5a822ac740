"""ZipCache's kernels as operators of torch.

| operator | does |
| --- | --- |
| `vllm_plugins::zipcache_write` | a step's keys and values, raw or packed |
| `vllm_plugins::zipcache_attend` | attention of all rows; writes ``out`` and the log-sum-exp |
| `vllm_plugins::zipcache_score` | probes' attention, added to the sums of blocks |
| `vllm_plugins::zipcache_seal` | blocks' quotas |
| `vllm_plugins::zipcache_transform` | queries and keys in another basis; returns them |

None waits for the device, none but the last allocates, and no grid depends on what is there: with
rows of one token alone all but sealing can be captured in a graph. The functions here call them
with dataclasses; operators take their fields.
"""

from typing import Any

import torch

from vllm_plugins.attention_backends.zipcache.batch import LayerMemory, Seals
from vllm_plugins.attention_backends.zipcache.key_transform import KeyTransform
from vllm_plugins.attention_backends.zipcache.page import PageFormat
from vllm_plugins.attention_backends.zipcache.triton_kernels import (
    decode,
    prefill,
    score,
    seal,
    transform,
    write,
)
from vllm_plugins.attention_backends.zipcache.triton_kernels.batches import DeviceBatch, Workspace

_LIBRARY = torch.library.Library("vllm_plugins", "FRAGMENT")
_LAYER = (
    "Tensor{} cache, Tensor{} residual, Tensor{} residual_sums, Tensor{} staging, "
    "Tensor{} staging_sums, int k_salient, int v_salient, bool scaled"
)
_BATCH = (
    "Tensor query_start, Tensor seq_lens, Tensor block_table, Tensor slots, Tensor state, "
    "Tensor parts, Tensor probes, Tensor rows, Tensor? prompts, Tensor? tiles, int longest, "
    "int blocks, bool single"
)
_FIELDS = 8, 13


def _of_layer(layer: LayerMemory) -> tuple[Any, ...]:
    return (
        layer.cache, layer.residual, layer.residual_sums, layer.staging, layer.staging_sums,
        *layer.page.quotas, layer.scaled,
    )  # fmt: skip


def _layer(
    cache: torch.Tensor,
    residual: torch.Tensor,
    residual_sums: torch.Tensor,
    staging: torch.Tensor,
    staging_sums: torch.Tensor,
    k_salient: int,
    v_salient: int,
    scaled: bool,
) -> LayerMemory:
    page = PageFormat(residual.shape[3], residual.shape[4], k_salient, v_salient)
    return LayerMemory(page, scaled, residual, residual_sums, staging, staging_sums, cache)


def zipcache_write(
    layer: LayerMemory, key: torch.Tensor, value: torch.Tensor, batch: DeviceBatch
) -> None:
    """Write a batch; arguments are those of `write.write`."""
    torch.ops.vllm_plugins.zipcache_write(
        *_of_layer(layer), *vars(batch).values(), key, value
    )  # fmt: skip


def zipcache_attend(
    layer: LayerMemory,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    batch: DeviceBatch,
    space: Workspace,
    scale: float,
) -> None:
    """Attend with all rows; arguments are those of `decode.decode`."""
    torch.ops.vllm_plugins.zipcache_attend(
        *_of_layer(layer), *vars(batch).values(), query, key, value, scale, out,
        *vars(space).values(),
    )  # fmt: skip


def zipcache_score(
    layer: LayerMemory,
    query: torch.Tensor,
    key: torch.Tensor,
    batch: DeviceBatch,
    space: Workspace,
    scale: float,
) -> None:
    """Add probes' attention; arguments are those of `score.score`."""
    torch.ops.vllm_plugins.zipcache_score(
        *_of_layer(layer), *vars(batch).values(), query, key, scale, *vars(space).values()
    )


def zipcache_seal(layer: LayerMemory, seals: Seals) -> None:
    """Apply quotas; arguments are those of `seal.seal`."""
    torch.ops.vllm_plugins.zipcache_seal(*_of_layer(layer), *vars(seals).values())


def zipcache_transform(
    by: KeyTransform, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change the basis; arguments and results are those of `KeyTransform.apply`."""
    found: tuple[torch.Tensor, torch.Tensor] = torch.ops.vllm_plugins.zipcache_transform(
        *vars(by).values(), query, key
    )
    return found


def _split(arguments: tuple[Any, ...]) -> tuple[LayerMemory, DeviceBatch, tuple[Any, ...]]:
    """Make a layer and a batch from an operator's arguments; return what is left as well."""
    of_layer, of_batch = _FIELDS
    rest = arguments[of_layer:]
    return _layer(*arguments[:of_layer]), DeviceBatch(*rest[:of_batch]), rest[of_batch:]


def _write(*arguments: Any) -> None:
    layer, batch, (key, value) = _split(arguments)
    write.write(layer, key, value, batch)


def _attend(*arguments: Any) -> None:
    layer, batch, (query, key, value, scale, out, *space) = _split(arguments)
    if batch.single:
        decode.decode(layer, query, key, value, out, batch, Workspace(*space), scale)
    if batch.tiles is not None:
        prefill.prefill(layer, query, key, value, out, batch, Workspace(*space), scale)


def _score(*arguments: Any) -> None:
    layer, batch, (query, key, scale, *space) = _split(arguments)
    score.score(layer, query, key, batch, Workspace(*space), scale)


def _seal(*arguments: Any) -> None:
    of_layer, _ = _FIELDS
    seal.seal(_layer(*arguments[:of_layer]), Seals(*arguments[of_layer:]))


def _transform(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *by, query, key = arguments
    return transform.transform(KeyTransform(*by), query, key)


def _nothing(*_: object) -> None:
    """Stand in for an operator that returns no tensor, where shapes alone are asked for."""


def _same_shapes(*arguments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for the change of a basis."""
    query, key = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in arguments[-2:])
    return query, key


def _changes(names: str) -> str:
    """Return a layer's arguments, some of them marked as written."""
    marks = [f"({letter}!)" if letter in names else "" for letter in "abcde"]
    return _LAYER.format(*marks)


# Letters stand for a layer's tensors in their order.
for _name, _arguments, _run in (
    ("zipcache_write", f"{_changes('abcde')}, {_BATCH}, Tensor key, Tensor value", _write),
    (
        "zipcache_attend",
        f"{_changes('')}, {_BATCH}, Tensor query, Tensor key, Tensor value, float scale, "
        "Tensor(f!) out, Tensor(g!) partial, Tensor(h!) split_lse, Tensor(i!) lse",
        _attend,
    ),
    (
        "zipcache_score",
        f"{_changes('ce')}, {_BATCH}, Tensor query, Tensor key, float scale, Tensor partial, "
        "Tensor split_lse, Tensor lse",
        _score,
    ),
    (
        "zipcache_seal",
        f"{_changes('a')}, Tensor block, Tensor source, Tensor forced, Tensor weight",
        _seal,
    ),
):
    _LIBRARY.define(f"{_name}({_arguments}) -> ()")
    # On CPU there is Triton's interpreter.
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vllm_plugins::{_name}", _nothing, lib=_LIBRARY)

_LIBRARY.define(
    "zipcache_transform(Tensor keys, Tensor queries, Tensor centre, Tensor query, Tensor key) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.impl("zipcache_transform", _transform, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_plugins::zipcache_transform", _same_shapes, lib=_LIBRARY)

"""What the compiled kernels do, in plain torch: the reference, and what runs without a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from vllm_plugins.attention_backends.zipcache import quantiser, saliency
from vllm_plugins.attention_backends.zipcache.batch import RAW, SEALED, Batch, LayerMemory, Seals


@dataclass(frozen=True)
class _Row:
    """One request of a batch."""

    start: int
    length: int
    position: int
    residual: int
    blocks: list[int]
    states: list[int]

    @property
    def end(self) -> int:
        return self.position + self.length


def _rows(batch: Batch, size: int) -> Iterator[_Row]:
    for m in range(len(batch.start)):
        start, length = int(batch.start[m]), int(batch.length[m])
        position = int(batch.position[m])
        count = -(-(position + length) // size)
        blocks = batch.block_table[m, :count].tolist()
        states = [int(batch.state[block]) for block in blocks]
        yield _Row(start, length, position, int(batch.residual_row[m]), blocks, states)


def write(layer: LayerMemory, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
    """Write a batch's keys and values; arguments as of `cpu_kernels.write`."""
    size = layer.page.block_size
    for row in _rows(batch, size):
        for index in range(row.position // size, len(row.blocks)):
            _write_block(layer, key, value, row, index)


def _write_block(
    layer: LayerMemory, key: torch.Tensor, value: torch.Tensor, row: _Row, index: int
) -> None:
    """Write the batch's part of one block."""
    size, block, state = layer.page.block_size, row.blocks[index], row.states[index]
    first, last = max(row.position, index * size), min(row.end, (index + 1) * size)
    span = slice(row.start + first - row.position, row.start + last - row.position)
    new = torch.stack([key[span], value[span]]).permute(2, 0, 1, 3)
    offset = first - index * size
    if last - first < size:
        layer.residual[row.residual, :, :, offset : offset + last - first] = new
        layer.residual_sums[row.residual, :, offset : offset + last - first] = 0
        if state <= RAW or last < (index + 1) * size:
            return
        new = layer.residual[row.residual]
    codes = quantiser.quantise(new[:, 0].float(), new[:, 1].float(), layer.scaled)
    pages = layer.cache[block]
    quantiser.write_page(codes, pages, layer.page)
    if state == SEALED:
        # Without a choice to make a quota is all tokens or none.
        every = torch.tensor(layer.page.quotas)[:, None] > 0
        salient = every.expand(len(pages), 2, size)
        quantiser.seal(quantiser.low_planes(codes), salient, pages, layer.page)
        return
    layer.staging[state] = quantiser.low_planes(codes)
    sums = layer.residual_sums[row.residual] if last - first < size else 0
    layer.staging_sums[state] = sums


def read(layer: LayerMemory, block: int, state: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a block's keys and values as they are attended to.

    Args:
        layer: The layer's memory.
        block: The block.
        state: Where its tokens are.

    Returns:
        Keys and values, float32, shape (N, kv heads, D).
    """
    if state <= RAW:
        keys, values = layer.residual[RAW - state].float().unbind(1)
    else:
        low = layer.staging[state] if state >= 0 else None
        codes, salient = quantiser.read_page(layer.cache[block], layer.page, low)
        keys, values = quantiser.dequantise(codes, salient)
    return keys.transpose(0, 1), values.transpose(0, 1)


def attend(
    layer: LayerMemory,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    batch: Batch,
    scale: float,
) -> None:
    """Attend and score; arguments as of `cpu_kernels.attend`."""
    size = layer.page.block_size
    for m, row in enumerate(_rows(batch, size)):
        here = slice(row.start, row.start + row.length)
        keys, values = _everything(layer, key[here].float(), value[here].float(), row)
        queries = query[here].float()
        positions = torch.arange(row.position, row.end)
        out[here] = _attention(queries, keys, values, positions, scale).to(out.dtype)
        probes = batch.probe[int(batch.probe_start[m]) : int(batch.probe_start[m + 1])].long()
        if len(probes):
            sums = saliency.attention_sums(queries[probes], keys, positions[probes], scale)
            _add(layer, row, sums, int(batch.score_from[m]), bool(batch.reset[m]))


def _everything(
    layer: LayerMemory, key: torch.Tensor, value: torch.Tensor, row: _Row
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all keys and values of a request, those of the batch as they came."""
    size, parts = layer.page.block_size, []
    for index in range(-(-row.position // size)):
        keys, values = read(layer, row.blocks[index], row.states[index])
        have = min(size, row.position - index * size)
        parts.append((keys[:have], values[:have]))
    parts.append((key, value))
    return torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])


def _attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    grouped = query.unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("tkgd,nkd->tkgn", grouped, keys) * scale
    hidden = torch.arange(len(keys)) > positions[:, None]
    scores.masked_fill_(hidden[:, None, None], -torch.inf)
    return torch.einsum("tkgn,nkd->tkgd", scores.softmax(dim=-1), values).flatten(1, 2)


def _add(layer: LayerMemory, row: _Row, sums: torch.Tensor, first: int, reset: bool) -> None:
    size = layer.page.block_size
    for index in range(first, len(row.blocks)):
        state = row.states[index]
        if state == SEALED:
            continue
        own = layer.residual_sums[RAW - state] if state <= RAW else layer.staging_sums[state]
        if reset:
            own.zero_()
        part = sums[:, index * size : (index + 1) * size]
        own[:, : part.shape[1]] += part


def seal(layer: LayerMemory, seals: Seals) -> None:
    """Apply blocks' quotas; arguments as of `cpu_kernels.seal`."""
    for i, (block, source) in enumerate(
        zip(seals.block.tolist(), seals.source.tolist(), strict=True)
    ):
        pages = layer.cache[block]
        if source <= RAW:
            raw, sums = layer.residual[RAW - source].float(), layer.residual_sums[RAW - source]
            codes = quantiser.quantise(raw[:, 0], raw[:, 1], layer.scaled)
            quantiser.write_page(codes, pages, layer.page)
            low = quantiser.low_planes(codes)
        else:
            low, sums = layer.staging[source], layer.staging_sums[source]
        # What is no number is below all scores, as in the other kernels.
        scores = (sums * seals.weight[i]).nan_to_num(nan=-1.0, posinf=torch.inf)
        scores[:, : int(seals.forced[i])] = torch.inf
        quantiser.seal(low, saliency.choose_both(scores, layer.page), pages, layer.page)

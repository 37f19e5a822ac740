"""ZipCache's quantiser in torch: keys by channel, values by token after a scale for each channel.

Section 4.1 of the paper. Keys and values get uniform asymmetric codes of four bits. A token that is
not salient keeps the two high bits alone and is rebuilt at the centre of its cell [G]: one set of
ranges serves both classes, and making a token non-salient is dropping a plane. Its error is at most
twice the 4-bit step; the paper's own 2-bit range over the class would allow 2.5 times.

This is the reference for the kernels, and what runs where none were built. Leading axes are
any: blocks, heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_plugins.attention_backends.zipcache.page import PageFormat

LEVELS = 15
# Where in its cell of four codes a value without low bits is rebuilt.
CENTRE = 1.5
HALF_MAX = 65504.0


@dataclass(frozen=True)
class Codes:
    """A block's codes and ranges.

    Attributes:
        keys: uint8, 0 to 15, shape (..., N, D).
        values: As ``keys``.
        k_min: float16, shape (..., D).
        k_step: float16, shape (..., D).
        v_scale: float16, shape (..., D).
        v_min: float16, shape (..., N).
        v_step: float16, shape (..., N).
    """

    keys: torch.Tensor
    values: torch.Tensor
    k_min: torch.Tensor
    k_step: torch.Tensor
    v_scale: torch.Tensor
    v_min: torch.Tensor
    v_step: torch.Tensor


def quantise(keys: torch.Tensor, values: torch.Tensor, scaled: bool = True) -> Codes:
    """Quantise whole blocks.

    Args:
        keys: Shape (..., N, D), float32 or float64.
        values: As ``keys``.
        scaled: Whether values are divided by a scale for each channel, the largest magnitude: so
            the paper's text as it could be read. The published code takes its root, which loses
            more (README).
    """
    k_min, k_step = _range(keys, dim=-2)
    scale = torch.ones_like(k_min)
    if scaled:
        scale = _half(values.abs().amax(dim=-2))
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    y = values / scale.to(values.dtype)[..., None, :]
    v_min, v_step = _range(y, dim=-1)
    return Codes(
        keys=_codes(keys, k_min[..., None, :], k_step[..., None, :]),
        values=_codes(y, v_min[..., None], v_step[..., None]),
        k_min=k_min,
        k_step=k_step,
        v_scale=scale,
        v_min=v_min,
        v_step=v_step,
    )


def _range(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return least value and step, rounded to float16 such that nothing is clipped."""
    least = _round_down(x.amin(dim=dim))
    width = x.amax(dim=dim) - least.to(x.dtype)
    return least, -_round_down(-width / LEVELS)


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-HALF_MAX, HALF_MAX).to(torch.float16)


def _round_down(x: torch.Tensor) -> torch.Tensor:
    """Return the largest float16 that is not above ``x``, or the least finite one."""
    x = x.clamp(min=-HALF_MAX)
    near = _half(x)
    bits = near.view(torch.int16)
    # Next below: a positive number's bits count up with it, a negative one's count down.
    below = torch.where(bits > 0, bits - 1, bits + 1)
    # -32767 is the least subnormal below zero.
    below = torch.where((bits & 0x7FFF) == 0, torch.full_like(bits, -32767), below)
    return torch.where(near.to(x.dtype) <= x, near, below.view(torch.float16))


def _codes(x: torch.Tensor, least: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    by = torch.where(step > 0, step, torch.ones_like(step)).to(x.dtype)
    return ((x - least.to(x.dtype)) / by).round().clamp(0, LEVELS).to(torch.uint8)


def dequantise(
    codes: Codes, salient: torch.Tensor, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rebuild keys and values.

    Args:
        codes: Of whole blocks.
        salient: Which tokens have low bits, of keys and of values, bool, shape (..., 2, N).
        dtype: Of the result and of the arithmetic.

    Returns:
        Keys and values, shape (..., N, D).
    """
    of_keys, of_values = salient.unbind(-2)
    keys = _rebuild(codes.keys, of_keys, dtype) * codes.k_step.to(dtype)[..., None, :]
    values = _rebuild(codes.values, of_values, dtype) * codes.v_step.to(dtype)[..., None]
    values = (values + codes.v_min.to(dtype)[..., None]) * codes.v_scale.to(dtype)[..., None, :]
    return keys + codes.k_min.to(dtype)[..., None, :], values


def _rebuild(codes: torch.Tensor, salient: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    coarse = (codes & 12).to(dtype) + CENTRE
    return torch.where(salient[..., None], codes.to(dtype), coarse)


def pack_plane(codes: torch.Tensor) -> torch.Tensor:
    """Pack codes of two bits, uint8, shape (..., D), into bytes, shape (..., D / 4)."""
    quarters = codes.unflatten(-1, (4, -1))
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=codes.device)[:, None]
    # Bits do not overlap, so that the sum is their union.
    return (quarters << shifts).sum(dim=-2, dtype=torch.uint8)


def unpack_plane(plane: torch.Tensor) -> torch.Tensor:
    """Undo `pack_plane`."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=plane.device)[:, None]
    return ((plane[..., None, :] >> shifts) & 3).flatten(-2)


def write_page(codes: Codes, pages: torch.Tensor, page: PageFormat) -> None:
    """Write high planes and ranges.

    Args:
        codes: Of blocks, leading axes as of ``pages``.
        pages: uint8, shape (..., page bytes).
        page: The format.
    """
    for offset, plane in ((page.k_high, codes.keys), (page.v_high, codes.values)):
        _put(pages, offset, pack_plane(plane >> 2).flatten(-2))
    for name in ("k_min", "k_step", "v_scale", "v_min", "v_step"):
        _put(pages, getattr(page, name), getattr(codes, name).contiguous().view(torch.uint8))


def low_planes(codes: Codes) -> torch.Tensor:
    """Return the low planes of keys, then of values, uint8, shape (..., 2, N, D / 4)."""
    return torch.stack([pack_plane(codes.keys & 3), pack_plane(codes.values & 3)], dim=-3)


def seal(low: torch.Tensor, salient: torch.Tensor, pages: torch.Tensor, page: PageFormat) -> None:
    """Write the salient tokens' low planes and which tokens they are.

    Args:
        low: Of all tokens, as `low_planes`.
        salient: Of keys, then of values, bool, shape (..., 2, N); ``page.quotas`` of each block.
        pages: uint8, shape (..., page bytes).
        page: The format.
    """
    kept = salient[..., None].expand(low.shape)
    shape = (*low.shape[:-3], sum(page.quotas) * page.row)
    _put(pages, page.k_low, low[kept].view(shape))
    bits = salient[..., list(page.marked), :].unflatten(-1, (-1, 8)).to(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=low.device)
    _put(pages, page.k_bitmap, (bits << shifts).sum(dim=-1, dtype=torch.uint8).flatten(-2))


def read_page(
    pages: torch.Tensor, page: PageFormat, low: torch.Tensor | None = None
) -> tuple[Codes, torch.Tensor]:
    """Read pages back.

    Args:
        pages: uint8, shape (..., page bytes).
        page: The format.
        low: Low planes of all tokens where the blocks are not sealed.

    Returns:
        Codes, and which tokens have low bits, of keys and of values, bool, shape (..., 2, N).
    """
    n, row = page.block_size, page.row
    if low is None:
        salient = _salient(pages, page)
        low = pages.new_zeros((*pages.shape[:-1], 2, n, row))
        kept = salient[..., None].expand(low.shape)
        low[kept] = pages[..., page.k_low : page.k_min].flatten()
    else:
        salient = torch.ones((*pages.shape[:-1], 2, n), dtype=torch.bool, device=pages.device)
    high = pages[..., page.k_high : page.k_low].unflatten(-1, (2, n, row))
    keys, values = (unpack_plane(high) * 4 + unpack_plane(low)).unbind(-3)
    shapes = {"k_min": page.head_size, "k_step": page.head_size, "v_scale": page.head_size,
              "v_min": n, "v_step": n}  # fmt: skip
    ranges = {name: _halves(pages, getattr(page, name), count) for name, count in shapes.items()}
    return Codes(keys, values, **ranges), salient


def _salient(pages: torch.Tensor, page: PageFormat) -> torch.Tensor:
    bits = pages[..., page.k_bitmap : page.size, None]
    shifts = torch.arange(8, dtype=torch.uint8, device=pages.device)
    marks = ((bits >> shifts) & 1).flatten(-2).bool().unflatten(-1, (-1, page.block_size))
    of_keys, of_values = marks[..., 0, :], marks[..., -1, :]
    # A quota of all tokens or of none may have the other one's bits in its place.
    every = [
        own if 0 < quota < page.block_size else torch.full_like(own, quota > 0)
        for quota, own in zip(page.quotas, (of_keys, of_values), strict=True)
    ]
    return torch.stack(every, dim=-2)


def _halves(pages: torch.Tensor, offset: int, count: int) -> torch.Tensor:
    return pages[..., offset : offset + 2 * count].contiguous().view(torch.float16)


def _put(pages: torch.Tensor, offset: int, data: torch.Tensor) -> None:
    pages[..., offset : offset + data.shape[-1]] = data

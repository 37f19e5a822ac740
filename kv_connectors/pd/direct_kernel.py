"""One kernel that copies blocks of many layers from cache to cache, for CUDA, in Triton.

PyTorch's ``index_select`` and ``index_copy_`` are two kernels per layer with a copy in between;
here a launch copies all layers of one form, and each number is read and written once.
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

# Words that a program copies at a time.
TILE = 1024
WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
Pair = tuple[torch.Tensor, torch.Tensor]


# Else some numbers of layers would be compiled for themselves.
@triton.jit(do_not_specialize=["layers"])
def _copy(
    addresses: tl.tensor, from_rows: tl.tensor, to_rows: tl.tensor,
    from_row: int, to_row: int, from_head: int, to_head: int, from_slot: int, to_slot: int,
    layers: int, size: int,
    slots: tl.constexpr, width: tl.constexpr, word: tl.constexpr, tile: tl.constexpr,
) -> None:  # fmt: skip
    """Copy a tile of one row of one layer; strides in words, ``size`` words to a row.

    The addresses are those to read, and ``layers`` behind each the one to write.
    """
    row, layer = tl.program_id(0), tl.program_id(1)
    source = tl.load(addresses + layer).to(tl.pointer_type(word))
    target = tl.load(addresses + layers + layer).to(tl.pointer_type(word))
    source += tl.load(from_rows + row) * from_row
    target += tl.load(to_rows + row) * to_row
    at = tl.program_id(2) * tile + tl.arange(0, tile)
    # A cache is larger than 2^31 words as a rule, and its heads may be far apart.
    column, slot, head = at % width, at // width % slots, (at // (width * slots)).to(tl.int64)
    inside = at < size
    numbers = tl.load(source + head * from_head + slot * from_slot + column, mask=inside)
    tl.store(target + head * to_head + slot * to_slot + column, numbers, mask=inside)


def copy_rows(pairs: Sequence[Pair], from_rows: torch.Tensor, to_rows: torch.Tensor) -> None:
    """Copy rows of caches into rows of others.

    Args:
        pairs: Of each layer the cache to read and the one to write, rows x heads x slots x width or
            rows x slots x width, of the same type and shape but for the rows, with numbers of a
            slot behind one another.
        from_rows: Rows to read, int64, on the caches' device.
        to_rows: Rows to write, likewise and as many.
    """
    forms: dict[tuple[object, ...], list[Pair]] = defaultdict(list)
    for pair in pairs:
        source, target = (view if view.dim() == 4 else view.unsqueeze(1) for view in pair)
        shape, strides = source.shape[1:], (source.stride()[:3], target.stride()[:3])
        forms[shape, strides, source.element_size(), _word(source, target)].append((source, target))
    for (*_, word), alike in forms.items():
        assert isinstance(word, int)
        _launch(alike, word, from_rows, to_rows)


def _launch(
    pairs: Sequence[Pair], word: int, from_rows: torch.Tensor, to_rows: torch.Tensor
) -> None:
    source, target = pairs[0]
    heads, slots, width = source.shape[1:]
    scale = source.element_size()
    sides = zip(source.stride()[:3], target.stride()[:3], strict=True)
    steps = [stride * scale // word for side in sides for stride in side]
    width = width * scale // word
    size = heads * slots * width
    read, written = ([pair[side].data_ptr() for pair in pairs] for side in (0, 1))
    addresses = torch.tensor(read + written).to(source.device)
    _copy[len(from_rows), len(pairs), triton.cdiv(size, TILE)](
        addresses, from_rows, to_rows, *steps, len(pairs), size, slots, width, WORDS[word], TILE
    )


def _word(source: torch.Tensor, target: torch.Tensor) -> int:
    """Return the bytes of the largest word that every slot of both consists of."""
    scale = source.element_size()
    lengths = [source.shape[-1], *source.stride()[:3], *target.stride()[:3]]
    common = math.gcd(*(scale * length for length in lengths))
    return math.gcd(8, common, source.data_ptr(), target.data_ptr())

"""Cases of the kernel that copies blocks; `test_pd_direct_kernel` runs them in the interpreter."""

import pytest
import torch

from vllm_plugins.kv_connectors.pd.direct_kernel import _word, copy_rows

ROWS, OTHER_ROWS, HEADS, SLOTS = 7, 9, 5, 4


def raw(*shape, seed):
    numbers = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, generator=numbers).to(torch.uint8)


def heads_first(rows, width, dtype, seed):
    return raw(rows, HEADS, SLOTS, width * dtype.itemsize, seed=seed).view(dtype)


def tokens_first(rows, width, dtype, seed):
    data = raw(rows, SLOTS, HEADS, width * dtype.itemsize, seed=seed)
    return data.view(dtype).permute(0, 2, 1, 3)


def in_a_larger_one(rows, width, dtype, seed):
    return heads_first(rows, 3 * width, dtype, seed)[..., width : 2 * width]


def latent(rows, width, dtype, seed):
    return raw(rows, SLOTS, width * dtype.itemsize, seed=seed).view(dtype)


FORMS = [heads_first, tokens_first, in_a_larger_one]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [3, 100])
@pytest.mark.parametrize(
    ("one", "other"),
    [(one, other) for one in FORMS for other in FORMS] + [(latent, latent)],
    ids=lambda form: form.__name__,
)
def test_rows_are_copied_as_indexing_does(one, other, width, dtype):
    # Two layers of one form and, in the middle, heads of a third one of another.
    sources = [one(ROWS, width, dtype, 1), one(ROWS, width, dtype, 2)]
    targets = [other(OTHER_ROWS, width, dtype, 3), other(OTHER_ROWS, width, dtype, 4)]
    if one is not latent:
        sources.append(tokens_first(ROWS, width, dtype, 5)[:, 1:3])
        targets.append(heads_first(OTHER_ROWS, width, dtype, 6)[:, 2:4])
    whole = [target if target._base is None else target._base for target in targets]
    before = [target.clone() for target in targets]
    copies = [base.clone() for base in whole]
    theirs, ours = torch.tensor([6, 0, 3, 2]), torch.tensor([1, 8, 7, 0])
    copy_rows(list(zip(sources, targets, strict=True)), theirs, ours)
    for source, target, expected in zip(sources, targets, before, strict=True):
        expected[ours] = source[theirs]
        assert torch.equal(target.view(torch.uint8), expected.view(torch.uint8))
    # Nothing beside the rows, heads and columns was written.
    for target, base, copy in zip(targets, whole, copies, strict=True):
        placed = copy.as_strided(target.shape, target.stride(), _offset(target, base))
        placed.copy_(target)
        assert torch.equal(base.view(torch.uint8), copy.view(torch.uint8))


def _offset(view, base):
    return (view.data_ptr() - base.data_ptr()) // view.element_size()


@pytest.mark.parametrize(
    ("width", "dtype", "bytes_"),
    [(64, torch.bfloat16, 8), (2, torch.bfloat16, 4), (3, torch.bfloat16, 2), (3, torch.uint8, 1),
     (8, torch.uint8, 8), (12, torch.uint8, 4)],
)  # fmt: skip
def test_words_are_as_large_as_slots_allow(width, dtype, bytes_):
    cache = heads_first(ROWS, width, dtype, 1)
    assert _word(cache, cache) == bytes_
    # A beginning between two words.
    shifted = raw(ROWS, HEADS, SLOTS, 32, seed=1)[..., 1:9]
    assert _word(shifted, shifted) == 1

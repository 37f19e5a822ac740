"""What a request's drafts share is repeated for each of them."""

import pytest
import torch

from vllm_plugins.engine.draft_sampling import (
    _writes_its_output,
    repair_draft_sampling,
    repeat_for_drafts,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_values_are_repeated_and_one_is_exchanged(dtype):
    values = torch.tensor([1, 0, 3, 2], dtype=dtype)
    ends = torch.tensor([2, 3, 3, 5], dtype=torch.int32)
    output = torch.full((5,), 9, dtype=dtype)
    repeat_for_drafts(output, values, ends, 0, 7)
    assert output.tolist() == [1, 1, 7, 2, 2]


def test_the_probe_tells_a_lost_output():
    assert _writes_its_output(repeat_for_drafts)
    assert not _writes_its_output(lambda output, *rest: repeat_for_drafts(output.long(), *rest))


@pytest.mark.engine
def test_vllm_samples_with_each_requests_temperature_afterwards():
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    current_platform.register_triton_kernel_overrides()
    # Triton has the right kernel already, on whatever device.
    assert repair_draft_sampling() is not HAS_TRITON
    assert not repair_draft_sampling()
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    device = current_platform.device_type
    temperatures = torch.tensor([0.5, 0.0, 2.0], device=device)
    ends = torch.tensor([2, 3, 6], dtype=torch.int32, device=device)
    wanted = [0.5, 0.5, 1.0, 2.0, 2.0, 2.0]
    assert expand_batch_to_tokens(temperatures, ends, 6, 0, 1).tolist() == wanted

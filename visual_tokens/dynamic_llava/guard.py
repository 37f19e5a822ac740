"""Refuses single requests that ask for what dropped rows do not have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

if TYPE_CHECKING:
    import torch
    from vllm import SamplingParams


class PromptLogprobsGuard(LogitsProcessor, LogitsProcessorV2):
    """A logits processor that changes nothing, for its look at each request's parameters.

    vLLM shows them to processors in the front end, where an error is answered to the one client.
    It serves both model runners.

    Args:
        config: The engine's configuration.
        *rest: What either runner gives besides it.
    """

    def __init__(self, config: Any, *rest: Any) -> None:
        """Keep nothing; the bases keep nothing either, and one of theirs raises."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse log-probabilities of the prompt's tokens, and of chosen tokens in their places.

        Raises:
            ValueError: They are asked for.
        """
        for name in ("prompt_logprobs", "prompt_logprob_token_ids"):
            if getattr(sampling_params, name) is not None:
                raise ValueError(
                    f"{name}: image tokens that --plugin dynamic_llava drops have none; "
                    "leave it out"
                )

    def is_argmax_invariant(self) -> bool:
        """Return True: nothing is changed, so greedy requests pass by."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Keep no state of a batch."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Return False: no request's logits are changed."""
        return False

    def apply(self, logits: torch.Tensor, *context: Any) -> torch.Tensor:
        """Return the logits as they are."""
        return logits

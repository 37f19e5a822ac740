"""What the plug-ins' CUDA backends have in common."""

from __future__ import annotations

from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend


class CausalCudaBackend(FlashAttentionBackend):
    """vLLM's ``CUSTOM`` attention backend: FlashAttention's layers, until some become others.

    vLLM asks the class what it can do. FlashAttention's own answers are taken back where they do
    not hold for layers that attend causally, with one window at most.
    """

    @staticmethod
    def get_name() -> str:
        """Return vLLM's name for backends from outside."""
        return "CUSTOM"

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Which keys are read, or kept how, follows the order of the tokens."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Nor do tokens of an image attend to later ones."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """There is one window, or none."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """FlashAttention's settings for it are not tested with other kernels beside."""
        return False

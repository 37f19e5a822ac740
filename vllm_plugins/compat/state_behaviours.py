"""Behaviours of vLLM that handing recurrent states over (`pd`) relies on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm_plugins.compat.behaviours import expect

BLOCK, LONGEST, NULL = 16, 1024, 0


def _managers() -> Iterator[tuple[str, Any]]:
    """Make block managers of a hybrid model: group 0 has states, group 1 attention."""
    import torch
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        MambaSpec,
    )

    attention = FullAttentionSpec(
        block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32
    )
    for mode, size in (("align", BLOCK), ("none", LONGEST)):
        states = MambaSpec(
            block_size=size,
            shapes=((2, 8),),
            dtypes=(torch.float32,),
            page_size_padded=attention.page_size_bytes,
            mamba_cache_mode=mode,
        )
        groups = [KVCacheGroupSpec(["a"], states), KVCacheGroupSpec(["b"], attention)]
        config = KVCacheConfig(num_blocks=32, kv_cache_tensors=[], kv_cache_groups=groups)
        yield (
            mode,
            KVCacheManager(
                config,
                LONGEST,
                size,
                BLOCK,
                enable_caching=mode == "align",
                max_in_flight_tokens=64,
            ),
        )


def _request(tokens: int) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    prompt, params = list(range(1, tokens + 1)), SamplingParams(max_tokens=1)
    return Request("a", prompt, params, None, block_hasher=hasher)


def a_pulled_state_gets_the_block_behind_its_last_token() -> None:
    """Of a recurrent group's table only the last block is real, before and after it is loaded."""
    for mode, manager in _managers():
        for tokens in (1, BLOCK, BLOCK + 1, 3 * BLOCK - 1):
            request = _request(tokens + 1)
            manager.allocate_slots(
                request, 0, num_external_computed_tokens=tokens, delay_cache_blocks=True
            )
            states, attention = manager.get_block_ids("a")
            wanted = 1 if mode == "none" else -(-tokens // BLOCK)
            expect(len(states) == wanted, f"{len(states)} blocks for {tokens} tokens, {mode}")
            expect(states[-1] != NULL and not any(states[:-1]), f"{states} for {tokens} tokens")
            expect(len(attention) == -(-tokens // BLOCK), f"{len(attention)} blocks of attention")
            manager.free(request)


def a_computed_state_stands_in_the_block_behind_its_last_token() -> None:
    """So also where a prompt was computed in chunks, when it ends."""
    for mode, manager in _managers():
        for last in (1, BLOCK - 1, BLOCK):
            request = _request(2 * BLOCK + last)
            for chunk in (BLOCK, BLOCK, last):
                manager.allocate_slots(request, chunk)
                request.num_computed_tokens += chunk
            manager.remove_skipped_blocks("a", request.num_computed_tokens)
            states, _ = manager.get_block_ids_for_computed_tokens("a", request.num_computed_tokens)
            where = 0 if mode == "none" else 2
            expect(len(states) == where + 1, f"{len(states)} blocks, {mode}")
            expect(states[where] != NULL, f"the table is {states}, {mode}")
            manager.free(request)


def a_prompt_can_be_shortened_before_it_starts() -> None:
    """All that a request says of its prompt's length can be changed, and its hashes made anew."""
    request = _request(3)
    del request._all_token_ids[2:]  # noqa: SLF001
    request.num_prompt_tokens = 2
    expect(request.num_tokens == 2, f"it has {request.num_tokens} tokens")
    expect(list(request.all_token_ids) == [1, 2], f"its tokens are {request.all_token_ids}")
    expect(isinstance(request.block_hashes, list), "its hashes are no list")

"""What each KV cache group keeps of a prompt, and so what of it is handed over.

Three kinds differ in what they forget:

* full attention keeps every position;
* sliding windows and local chunks keep what the next token can see, and have null blocks before it;
* recurrent layers (Mamba, gated delta nets, short convolutions) keep one *state*, which stands for
  all tokens up to one position. It cannot be taken back by a token.

vLLM computes a prompt's last token where the answer begins, even if all its KV was pulled. What
forgets must then stand one token before the prompt's end, on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_plugins.kv_connectors.pd.protocol import Span

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

# The id of the block that stands for positions that are not kept.
NULL_BLOCK = 0
# A state is handed over alone, wherever in its request's table it stands: that depends on the size
# of blocks and on whether prefixes are cached, in which two instances may differ.
STATE = Span(0, 1)


@dataclass(frozen=True)
class Group:
    """One KV cache group.

    Attributes:
        block_size: Tokens of a block; of a state's group, the distance of states that are cached.
        is_state: Whether its layers are recurrent.
        forgets: Whether it drops what the next token does not need.
    """

    block_size: int
    is_state: bool = False
    forgets: bool = False

    def table_blocks(self, tokens: int) -> int:
        """Return the length of the block table of so many tokens, null blocks included."""
        return -(-tokens // self.block_size)

    def most_blocks(self, tokens: int) -> int:
        """Return the blocks of the pool that so many tokens take at most when they are held."""
        return 1 if self.is_state else self.table_blocks(tokens)

    def kept(self, table: Sequence[int], tokens: int) -> list[int]:
        """Return what a request that stands behind so many tokens hands over, by position.

        Args:
            table: Its block ids.
            tokens: Tokens that are computed.
        """
        count = self.table_blocks(tokens)
        return list(table[count - 1 : count] if self.is_state else table[:count])

    def wanted(self, num_local: int, covered: int) -> Span:
        """Return the positions that hold tokens ``[num_local, covered)``."""
        if self.is_state:
            return STATE
        return Span(num_local // self.block_size, self.table_blocks(covered))

    def targets(self, table: Sequence[int], num_local: int, covered: int) -> tuple[Span, list[int]]:
        """Return the positions to pull into a request's table, and their blocks.

        Args:
            table: The block ids that vLLM has set aside.
            num_local: Tokens that are here already, whole blocks.
            covered: Tokens up to which KV is pulled.
        """
        if self.is_state:
            return STATE, self.kept(table, covered)
        span = self.wanted(num_local, covered)
        blocks = list(table[span.first : span.last])
        while blocks and blocks[0] == NULL_BLOCK:
            del blocks[0]
        return Span(span.last - len(blocks), span.last), blocks


@dataclass(frozen=True)
class Groups:
    """All groups of an engine, in vLLM's order."""

    all: tuple[Group, ...]

    @classmethod
    def of(cls, config: KVCacheConfig) -> Groups:
        """Return the groups of a KV cache."""
        return cls(tuple(_group(group.kv_cache_spec) for group in config.kv_cache_groups))

    @staticmethod
    def state_forms(config: KVCacheConfig) -> dict[str, str]:
        """Return each recurrent layer with the types and shapes of its states."""
        from vllm.v1.kv_cache_interface import MambaSpec, UniformTypeKVCacheSpecs

        forms = {}
        for group in config.kv_cache_groups:
            own = group.kv_cache_spec
            for name in group.layer_names:
                spec = own.kv_cache_specs[name] if isinstance(own, UniformTypeKVCacheSpecs) else own
                if isinstance(spec, MambaSpec):
                    parts = zip(spec.dtypes, spec.shapes, strict=True)
                    forms[name] = " ".join(f"{dtype}{list(shape)}" for dtype, shape in parts)
        return forms

    @property
    def stop_early(self) -> bool:
        """Whether what is handed over must stand one token before the prompt's end."""
        return any(group.forgets for group in self.all)

    @property
    def have_states(self) -> bool:
        """Whether some layers are recurrent."""
        return any(group.is_state for group in self.all)

    @property
    def block_size(self) -> int:
        """Tokens of a block of attention; of a state's group where there is no other."""
        sizes = [group.block_size for group in self.all if not group.is_state]
        return (sizes or [self.all[0].block_size])[0]

    def most_blocks(self, tokens: int) -> int:
        """Return the blocks of the pool that a prompt takes at most when it is held."""
        return sum(group.most_blocks(tokens) for group in self.all)


def _group(spec: Any) -> Group:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, UniformTypeKVCacheSpecs

    first = spec.first_spec if isinstance(spec, UniformTypeKVCacheSpecs) else spec
    return Group(
        spec.block_size,
        is_state=isinstance(first, MambaSpec),
        forgets=not isinstance(first, FullAttentionSpec),
    )


def stop_before_last_token(request: Request) -> bool:
    """Shorten a prompt by its last token, which the decode instance computes; return whether.

    vLLM's NixlConnector does the same. The one token that is then sampled continues the shortened
    prompt and means nothing. A prompt stays whole, and the decode instance computes it anew, where
    there is nothing to shorten: it is one token, is not of tokens, or ends in a medium; or its log
    probabilities are asked for, for which it is computed where it is decoded in any case.

    Args:
        request: A prompt that nothing is computed of.
    """
    tokens, last = request.prompt_token_ids, request.num_prompt_tokens - 1
    in_media = any(
        media.mm_position.offset + media.mm_position.length > last for media in request.mm_features
    )
    if not last or not tokens or in_media or request.prompt_embeds is not None:
        return False
    if request.skip_reading_prefix_cache:
        return False
    # The list itself may be the front end's.
    request.prompt_token_ids = tokens[:last]
    del request._all_token_ids[last:]  # noqa: SLF001
    request.num_prompt_tokens, request.max_tokens = last, 1
    # Those of whole blocks of the longer prompt.
    request.block_hashes.clear()
    request.update_block_hashes()
    return True

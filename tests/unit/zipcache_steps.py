"""Steps of an engine with random keys, values and queries, on the scheduler's own types."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from vllm_plugins.attention_backends.zipcache.away import AwayRows
from vllm_plugins.attention_backends.zipcache.batch import LayerMemory
from vllm_plugins.attention_backends.zipcache.blocks import BlockLife, LifeOptions
from vllm_plugins.attention_backends.zipcache.cpu_backend import make_batch
from vllm_plugins.attention_backends.zipcache.page import PageFormat
from vllm_plugins.attention_backends.zipcache.saliency import Probing


@dataclass
class Request:
    """All keys, values and queries that a request will ever have, and what it got."""

    name: str
    prompt: int
    key: torch.Tensor
    value: torch.Tensor
    query: torch.Tensor
    computed: int = 0
    blocks: list = field(default_factory=list)
    outputs: list = field(default_factory=list)
    known: bool = False
    # Blocks of another request, by a hit of the prefix cache.
    shared: list = field(default_factory=list)
    # It stays between turns, as a session whose input is streamed.
    session: bool = False
    # Tokens of its prompt that it had generated before it was preempted.
    generated: int = 0

    @property
    def output(self):
        return torch.cat(self.outputs)

    def next_turn(self, computed, prompt):
        """Go on with a longer prompt; what was computed beyond a position is taken back."""
        self.outputs = [self.output[:computed]]
        self.computed, self.prompt, self.session, self.known = computed, prompt, True, False

    def begin_again(self):
        """Be preempted: what has been generated, the last token of it not computed, is prompt."""
        grown = max(self.computed + 1 - self.prompt, 0)
        self.prompt, self.generated = self.prompt + grown, self.generated + grown
        self.known, self.computed, self.outputs = False, 0, []


class Steps:
    """A layer's memory and the life of its blocks, driven as an engine drives them.

    Every piece of memory is NaN, or bytes that mean nothing, until something is written.
    ``salient`` is the quota of values, and of keys unless these have their own. On model runner V2,
    ``v2``, requests that were preempted come as new ones.
    """

    def __init__(self, kernels, *, heads=4, kv_heads=2, size=32, block=32, salient=20, of_keys=None,
                 blocks=64, rows=8, staged=16, dtype=torch.float32, probing=None, seed=0,
                 scaled=True, chooses=None, v2=False, **options):  # fmt: skip
        self.kernels, self.v2 = kernels, v2
        probing = probing or Probing(0.05, 0.05)
        self.generator = torch.Generator().manual_seed(seed)
        self.heads, self.kv_heads, self.size, self.block = heads, kv_heads, size, block
        self.dtype, self.scale = dtype, size**-0.5
        page = PageFormat(block, size, salient if of_keys is None else of_keys, salient)
        self.memory = LayerMemory.take(page, kv_heads, rows, staged, dtype, scaled)
        self.memory.cache = torch.full((blocks, kv_heads, page.bytes), 0xFF, dtype=torch.uint8)
        for part in (self.memory.residual, self.memory.residual_sums, self.memory.staging_sums):
            part.fill_(torch.nan)
        self.memory.staging.fill_(0xAA)
        chooses = page.chooses if chooses is None else chooses
        self.life = BlockLife(
            LifeOptions(block, chooses, probing, rows=rows, staged=staged, **options), blocks
        )
        self.away = AwayRows()
        order = torch.randperm(blocks - 1, generator=self.generator) + 1
        self.free = order.tolist()

    def request(self, name, prompt, total):
        """A request with random keys, values and queries."""
        shapes = [(total, n, self.size) for n in (self.kv_heads, self.kv_heads, self.heads)]
        made = [torch.randn(x, generator=self.generator).to(self.dtype) for x in shapes]
        return Request(name, prompt, *made)

    def lossless(self, name, prompt, total):
        """A request whose keys and values four bits represent exactly, without a scale."""
        made = self.request(name, prompt, total)
        for x in (made.key, made.value):
            shape = x.shape
            x.copy_(torch.randint(0, 16, shape, generator=self.generator) / 8)
        made.key[:: self.block], made.key[1 :: self.block] = 0, 15 / 8
        made.value[..., 0], made.value[..., 1] = 0, 15 / 8
        return made

    def share(self, request, other, blocks):
        """Begin a request behind the first blocks of another one, whose tokens it has."""
        request.blocks, request.computed = other.blocks[:blocks], blocks * self.block
        request.shared = list(request.blocks)
        for name in ("key", "value"):
            getattr(request, name)[: request.computed] = getattr(other, name)[: request.computed]

    def step(self, *work, finished=(), preempted=()):
        """Compute the next tokens of requests: pairs of a request and a number of tokens."""
        new, names, ids, computed, generated, tokens = [], [], [], [], [], {}
        for x in preempted:
            x.begin_again()
            self.give_back(x)
        for x in finished:
            self.give_back(x)
        resumed = {
            x.name
            for x, _ in work
            if not (x.known or x.session or self.v2) and x.name in self.life._prompts
        }
        for x, count in work:
            wanted = -(-(x.computed + count) // self.block)
            fresh = [self.free.pop() for _ in range(wanted - len(x.blocks))]
            x.blocks += fresh
            tokens[x.name] = count
            if not x.known and x.name not in resumed:
                new.append(
                    NewRequestData(
                        req_id=x.name, prompt_token_ids=[0] * (x.prompt - x.generated),
                        mm_features=[], sampling_params=None, pooling_params=None,
                        block_ids=(list(x.blocks),), num_computed_tokens=x.computed,
                        lora_request=None, prefill_token_ids=[0] * x.prompt if self.v2 else None,
                    )
                )  # fmt: skip
            else:
                names.append(x.name)
                ids.append((list(x.blocks) if x.name in resumed else fresh,))
                computed.append(x.computed)
                generated.append(x.generated)
            x.known = True
        cached = CachedRequestData(
            req_ids=names, resumed_req_ids=resumed, new_token_ids=[], all_token_ids={},
            new_block_ids=ids, num_computed_tokens=computed, num_output_tokens=generated,
        )  # fmt: skip
        output = SchedulerOutput(
            scheduled_new_reqs=new, scheduled_cached_reqs=cached, num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=sum(tokens.values()), scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={}, finished_req_ids={x.name for x in finished},
            free_encoder_mm_hashes=[], preempted_req_ids={x.name for x in preempted},
        )  # fmt: skip
        seals = self.life.begin_step(output)
        if seals is not None:
            self.kernels.seal(self.memory, seals)
        self.away.step(self.life, [self.memory])
        if work:
            self._compute(work)

    def give_back(self, request):
        self.free[:0] = [x for x in request.blocks if x not in request.shared]
        request.blocks = []

    def _compute(self, work):
        starts = torch.tensor([0, *(n for _, n in work)]).cumsum(0).to(torch.int32)
        width = max(len(x.blocks) for x, _ in work)
        table = torch.zeros(len(work), width, dtype=torch.int32)
        for m, (x, _) in enumerate(work):
            table[m, : len(x.blocks)] = torch.tensor(x.blocks)
        ends = torch.tensor([x.computed + n for x, n in work], dtype=torch.int32)
        common = CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=ends, num_reqs=len(work),
            num_actual_tokens=int(starts[-1]), max_query_len=max(n for _, n in work),
            max_seq_len=int(ends.max()), block_table_tensor=table,
            slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64),
        )  # fmt: skip
        batch = make_batch(common, self.life)
        query, key, value = (
            torch.cat([getattr(x, name)[x.computed : x.computed + n] for x, n in work])
            for name in ("query", "key", "value")
        )
        out = torch.full_like(query, torch.nan)
        self.kernels.write(self.memory, key, value, batch)
        self.kernels.attend(self.memory, query, key, value, out, batch, self.scale)
        for m, (x, n) in enumerate(work):
            x.outputs.append(out[int(starts[m]) : int(starts[m]) + n])
            x.computed += n


def exact(query, keys, values, scale, first=0):
    """Causal attention in float64; queries stand at positions from ``first`` on."""
    query, keys, values = query.double(), keys.double(), values.double()
    grouped = query.unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("tkgd,nkd->tkgn", grouped, keys) * scale
    hidden = torch.arange(len(keys)) > first + torch.arange(len(query))[:, None]
    scores.masked_fill_(hidden[:, None, None], -torch.inf)
    return torch.einsum("tkgn,nkd->tkgd", scores.softmax(-1), values).flatten(1, 2)

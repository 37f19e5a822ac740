"""Random caches for ZipCache's Triton kernels, in every state, and exact attention to them."""

from __future__ import annotations

import os
from dataclasses import replace

import torch

from vllm_plugins.attention_backends.zipcache import quantiser, saliency, torch_kernels
from vllm_plugins.attention_backends.zipcache.batch import RAW, SEALED, LayerMemory
from vllm_plugins.attention_backends.zipcache.page import PageFormat
from vllm_plugins.attention_backends.zipcache.triton_kernels.batches import (
    FIELDS,
    DeviceBatch,
    Workspace,
)

if os.environ.get("TRITON_INTERPRET"):
    from tests.unit import hip_kernels  # Makes the interpreter right and fast.

    assert hip_kernels
# Outputs are means of values of about 1. Folded codes begin at 64, which costs float32 some digits;
# half precision rounds weights and folded queries.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def exact(query, keys, values, scale, first):
    """Causal attention in float64; queries stand at positions from ``first`` on."""
    query, keys, values = query.double(), keys.double(), values.double()
    grouped = query.unflatten(1, (keys.shape[1], -1))
    scores = torch.einsum("tkgd,nkd->tkgn", grouped, keys) * scale
    at = torch.arange(len(keys), device=keys.device)
    hidden = at > at[first : first + len(query), None]
    scores.masked_fill_(hidden[:, None, None], -torch.inf)
    return torch.einsum("tkgn,nkd->tkgd", scores.softmax(-1), values).flatten(1, 2)


def apart(x, device="cpu"):
    """The same in strides that are not contiguous, as slices of one projection are."""
    shape = (len(x), x.shape[1] + 3, x.shape[2])
    wide = torch.full(shape, torch.nan, dtype=x.dtype, device=device)
    wide[:, 1 : x.shape[1] + 1] = x
    return wide[:, 1 : x.shape[1] + 1]


def memory_of(page, kv_heads, rows, staged, blocks, dtype, scaled=True):
    """A layer's memory, all of it NaN or bytes that mean nothing, its pages not contiguous."""
    memory = LayerMemory.take(page, kv_heads, rows, staged, dtype, scaled)
    wide = torch.full((blocks, kv_heads + 1, page.bytes + 64), 0xFF, dtype=torch.uint8)
    memory.cache = wide[:, :kv_heads, : page.bytes]
    for part in (memory.residual, memory.residual_sums, memory.staging_sums):
        part.fill_(torch.nan)
    memory.staging.fill_(0xAA)
    return memory


def moved(memory, device):
    """A layer's memory on another device, its pages not contiguous there either."""
    shape = (*memory.cache.shape[:2], memory.cache.shape[2] + 64)
    wide = torch.full(shape, 0xFF, dtype=torch.uint8, device=device)
    wide[..., :-64] = memory.cache
    names = ("residual", "residual_sums", "staging", "staging_sums")
    parts = {name: getattr(memory, name).to(device) for name in names}
    return replace(memory, cache=wide[..., :-64], **parts)


class Problem:
    """Requests whose cached blocks are sealed, staged or raw.

    Args:
        lengths: Tokens of each request before the step.
        states: For each of its full blocks ``s`` (sealed), ``g`` (staged) or ``r`` (raw), repeated;
            an unfilled one is raw.
        salient: Quota of values, and of keys unless these have their own, ``of_keys``.
    """

    def __init__(self, lengths, states="s", *, heads=4, kv_heads=2, size=32, block=32, salient=20,
                 of_keys=None, dtype=torch.float32, seed=0, splits=3, device="cpu"):  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.lengths, self.heads, self.kv_heads, self.size = lengths, heads, kv_heads, size
        self.dtype, self.scale = dtype, size**-0.5
        page = PageFormat(block, size, salient if of_keys is None else of_keys, salient)
        counts = [-(-n // block) for n in lengths]
        total = sum(counts) + len(lengths)
        self.memory = memory_of(page, kv_heads, total, total, total + 3, dtype)
        order = (torch.randperm(total + 2, generator=self.generator) + 1).tolist()
        self.table = torch.full((len(lengths), max(counts) + 2), 2**30, dtype=torch.int32)
        self.state = torch.full((total + 3,), SEALED, dtype=torch.int32)
        self.space = Workspace.take(len(lengths) + 1, 512, heads, kv_heads, size, splits, device)
        for part in vars(self.space).values():
            part.fill_(torch.nan)
        held = 0
        for m, n in enumerate(lengths):
            # One block more, for the step's tokens.
            for i in range(counts[m] + 1):
                self.table[m, i] = block_id = order.pop()
                kind = states[i % len(states)] if (i + 1) * block <= n else "r"
                self.place(block_id, kind, held, min(block, max(n - i * block, 0)))
                held += 1
        self.device, self.table, self.state = device, self.table.to(device), self.state.to(device)
        self.memory = moved(self.memory, device)

    def random(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def place(self, block, kind, held, tokens):
        """Let a block have a state, and its first tokens random keys and values."""
        memory, page = self.memory, self.memory.page
        rows = self.random(2, self.kv_heads, page.block_size, self.size)
        if kind == "r":
            self.state[block] = RAW - held
            memory.residual[held, :, :, :tokens] = rows.transpose(0, 1)[:, :, :tokens]
            return
        codes = quantiser.quantise(rows[0].float(), rows[1].float())
        quantiser.write_page(codes, memory.cache[block], page)
        if kind == "g":
            self.state[block] = held
            memory.staging[held] = quantiser.low_planes(codes)
            return
        score = torch.rand(self.kv_heads, page.block_size, generator=self.generator)
        salient = saliency.choose_both(score, page)
        quantiser.seal(quantiser.low_planes(codes), salient, memory.cache[block], page)

    def cached(self, m):
        """Keys and values of a request before the step, float32."""
        size, n = self.memory.page.block_size, self.lengths[m]
        parts = [
            torch_kernels.read(self.memory, int(block), int(self.state[block]))
            for block in self.table[m, : -(-n // size)]
        ]
        if not parts:
            return torch.zeros(2, 0, self.kv_heads, self.size, device=self.device)
        return [torch.cat(x)[:n] for x in zip(*parts, strict=True)]

    def batch(self, counts, tile=1):
        """A batch of the requests' next tokens, and a row of none behind."""
        starts = torch.tensor([0, *counts, 0]).cumsum(0).to(torch.int32)
        ends = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        prompts = [m for m, c in enumerate(counts) if c > 1]
        tiles = [(m, t) for m in prompts for t in range(0, counts[m], tile)]
        batch = DeviceBatch(
            query_start=starts,
            seq_lens=torch.tensor([*ends, 0], dtype=torch.int32),
            block_table=torch.cat([self.table, self.table[:1]])[:, :-1],
            slots=torch.zeros(sum(counts), dtype=torch.int64),
            state=self.state,
            parts=torch.zeros((len(self.state), FIELDS.value), dtype=torch.int32),
            probes=torch.zeros(1, dtype=torch.int32),
            rows=torch.arange(16, dtype=torch.int32),
            prompts=torch.tensor(prompts, dtype=torch.int32) if prompts else None,
            tiles=torch.tensor(tiles, dtype=torch.int32) if prompts else None,
            longest=max(counts),
            blocks=self.table.shape[1],
            single=1 in counts,
        )
        values = vars(batch).values()
        return DeviceBatch(
            *(x.to(self.device) if isinstance(x, torch.Tensor) else x for x in values)
        )

    def step(self, counts):
        """Random queries, keys and values of the requests' next tokens."""
        tokens = sum(counts)
        heads = (self.kv_heads, self.kv_heads, self.heads)
        key, value, query = (apart(self.random(tokens, n, self.size), self.device) for n in heads)
        return query, key, value

    def check(self, out, counts, query, key, value):
        """Compare with exact attention to what is in the cache, and to the step's own tokens."""
        first = 0
        for m, n in enumerate(counts):
            here = slice(first, first + n)
            keys, values = self.cached(m)
            keys = torch.cat([keys, key[here].float()])
            values = torch.cat([values, value[here].float()])
            wanted = exact(query[here], keys, values, self.scale, self.lengths[m])
            torch.testing.assert_close(
                out[here].double(), wanted, rtol=0, atol=TOLERANCE[self.dtype]
            )
            first += n

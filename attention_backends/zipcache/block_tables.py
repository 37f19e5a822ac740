"""What kernels on a device are told of blocks: tables by block, kept up to date step by step.

`BlockLife` decides on the host. Here what it has changed is sent in one copy that nothing waits for
and put into tables that live as long as the engine, so that a captured graph reads each step's.
"""

from __future__ import annotations

import numpy as np
import torch

from vllm_plugins.attention_backends.zipcache.batch import SEALED, Seals
from vllm_plugins.attention_backends.zipcache.blocks import BlockLife
from vllm_plugins.attention_backends.zipcache.triton_kernels.batches import FIELDS, NOBODY


class BlockTables:
    """The tables of one engine.

    Attributes:
        state: Where each block's tokens are, int32, shape (blocks,).
        parts: What is done to the request that writes a block last, int32, shape (blocks,
            `FIELDS`), as of `batches.part_of_row`.
        probes: This step's probes, int32.

    Args:
        num_blocks: Of the cache.
        most_probes: Tokens of a batch at most.
        device: Where.
    """

    def __init__(self, num_blocks: int, most_probes: int, device: torch.device) -> None:
        self.device = device
        fields = int(FIELDS.value)
        self.state = torch.full((num_blocks,), SEALED, dtype=torch.int32, device=device)
        self.parts = torch.zeros((num_blocks, fields), dtype=torch.int32, device=device)
        self.parts[:, 0] = NOBODY
        self.probes = torch.zeros(most_probes, dtype=torch.int32, device=device)

    def step(self, life: BlockLife) -> None:
        """Take over what a step changes.

        Args:
            life: The blocks, after `BlockLife.begin_step`.
        """
        changed, parts = life.changed, life.parts
        probes = np.concatenate([part.probes for part in parts.values()] or [np.zeros(0)])
        places = life.state[changed].numpy()
        sent = [np.asarray(changed), places, np.asarray(list(parts)), _records(life), probes]
        here = [torch.from_numpy(x.astype(np.int32).ravel()) for x in sent]
        blocks, states, last, records, marks = to_device(torch.cat(here), self.device).split(
            [len(x) for x in here]
        )
        self.state[blocks.long()] = states
        self.parts[last.long()] = records.view(-1, self.parts.shape[1])
        self.probes[: len(marks)] = marks

    def send(self, seals: Seals) -> Seals:
        """Return seals on the device."""
        return Seals(*(to_device(x, self.device) for x in vars(seals).values()))


def _records(life: BlockLife) -> np.ndarray:
    """Return this step's records, shape (parts, `FIELDS`)."""
    records = np.zeros((len(life.parts), int(FIELDS.value)), dtype=np.int32)
    first = 0
    for record, part in zip(records, life.parts.values(), strict=True):
        record[:5] = part.row, part.score_from, part.reset, first, len(part.probes)
        first += len(part.probes)
    return records


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Send values to the device without waiting."""
    pinned = values.pin_memory() if device.type == "cuda" else values
    return pinned.to(device, non_blocking=True)

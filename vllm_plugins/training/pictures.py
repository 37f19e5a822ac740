"""Looking at every picture before training: a bad one is named at once, not hours later.

Only headers are read, and of formats that have them checksums. A picture that is cut off in its
middle may therefore pass, and is named when its turn comes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import track

from vllm_plugins.errors import PluginError
from vllm_plugins.training.data import Sample, check_image
from vllm_plugins.training.processes import Processes


def check_pictures(samples: Sequence[Sample], ranks: Processes, device: str) -> None:
    """Refuse to begin with a picture that cannot be trained on. Each process reads its share.

    Args:
        samples: All of the run's, held-out ones too.
        ranks: The processes; none goes on where another one would not.
        device: Where they exchange tensors.

    Raises:
        PluginError: A picture cannot be read, here or in another process.
    """
    own = [sample for sample in samples[ranks.rank :: ranks.count] if sample.image]
    found = _first_bad(own, ranks.first)
    # Before anyone leaves, or the others would wait for it.
    bad = ranks.sum(torch.tensor(int(found is not None), device=device))
    if found is not None:
        raise found
    if bad:
        reason = "another process found a picture that cannot be read"
        raise PluginError("--data", reason, "see what it says")


def _first_bad(samples: Sequence[Sample], speaks: bool) -> PluginError | None:
    console = Console(stderr=True)
    hidden = not (speaks and console.is_terminal)
    try:
        for sample in track(samples, "pictures", console=console, disable=hidden):
            check_image(sample)
    except PluginError as error:
        return error
    return None

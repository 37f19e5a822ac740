"""Train a tiny Llama that reads documents, and measure what stale KV caches cost it.

    python examples/models/reader.py train --out FOLDER [--steps N] [--minutes 20] [--seed 0]
    python examples/models/reader.py evaluate FOLDER [--prompts 100] [--seed 1]

The task is described in `reader_data.py`, the start in `reader_start.py`. A reference has to be
resolved while its document is read: in training, half of the questions cannot see the documents
that do not state what they ask for, so the answer has to be carried by the KV of the reference.
Half of them can read documents only from layer 2 on, so that the KV of the later layers matters and
not only that of the first two.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

import torch
from reader_data import EOS, MAX_POSITIONS, PAD, VOCABULARY, Prompt, Size, make_prompt
from reader_forward import answers, forward_rows, prefill, refreshed, stale
from reader_start import LAYERS, make_start
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

EARLY_LAYERS = 2
LEARNING_RATE, WARM_UP, CLIP = 1e-3, 50, 1.0
# Prompts in a step, and their size; drawn for each step.
MIXTURE = (
    (12, Size(documents=(3, 5), length=(14, 30), sources=(1, 2), categories=(2, 5))),
    (5, Size(documents=(4, 9), length=(20, 60))),
    (2, Size()),
)
# Questions in a training prompt, and the tokens of one with its answer.
QUESTIONS, WIDTH = 32, 3
# How often a question sees only its own document, reads late, and documents stand apart.
ALONE, LATE, APART = 0.5, 0.5, 0.5
IGNORED = -100
# Where a token stands, if not in a document (1 and up).
BEGINNING, NOWHERE, IN_QUESTION = 0, -1, -2
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


@dataclass(frozen=True)
class Batch:
    """Prompts with several questions each, which do not see one another.

    Attributes:
        ids: [batch, tokens] token ids.
        positions: [batch, tokens].
        masks: of the early and of the later layers, each [batch, 1, tokens, tokens].
        wanted: [batch, tokens], the next token where it counts, else `IGNORED`.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    masks: tuple[torch.Tensor, torch.Tensor]
    wanted: torch.Tensor


def make_batch(rng: Random, size: Size, count: int) -> Batch:
    """Draw prompts and questions for one training step."""
    prompts = [make_prompt(rng, size) for _ in range(count)]
    length = max(len(prompt.ids) for prompt in prompts)

    def filled(value: int) -> torch.Tensor:
        return torch.full((count, length + WIDTH * QUESTIONS), value)

    ids, wanted, positions, document = filled(PAD), filled(IGNORED), filled(0), filled(NOWHERE)
    question, sees, late = filled(-1), filled(-1), filled(0)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt.ids)] = torch.tensor(prompt.ids)
        end = _place(rng, prompt, positions[i], document[i])
        for j, asked in enumerate(rng.choices(prompt.questions, k=QUESTIONS)):
            at = slice(length + WIDTH * j, length + WIDTH * (j + 1))
            ids[i, at] = torch.tensor([*asked.tokens, asked.answer])
            wanted[i, at] = torch.tensor([IGNORED, asked.answer, EOS])
            positions[i, at] = torch.arange(end, end + WIDTH)
            document[i, at], question[i, at] = IN_QUESTION, j
            sees[i, at] = asked.document + 1 if rng.random() < ALONE else -1
            late[i, at] = rng.random() < LATE
    return Batch(ids, positions, _masks(document, question, sees, late.bool()), wanted)


def _place(rng: Random, prompt: Prompt, positions: torch.Tensor, document: torch.Tensor) -> int:
    """Fill in positions and documents of a prompt's tokens; return the first free position.

    Documents may stand apart as if others stood between them, so that distances are learnt from
    short prompts.
    """
    spare = MAX_POSITIONS - len(prompt.ids) - WIDTH if rng.random() < APART else 0
    gaps = sorted(rng.randint(0, spare) for _ in prompt.starts)
    document[0] = BEGINNING
    for index, (start, end) in enumerate(pairwise(prompt.starts)):
        positions[start:end] = torch.arange(start, end) + gaps[index]
        document[start:end] = index + 1
    return len(prompt.ids) + gaps[-1]


def _masks(
    document: torch.Tensor, question: torch.Tensor, sees: torch.Tensor, late: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what each token sees in the early and in the later layers.

    Args:
        document: [batch, tokens], where each stands.
        question: [batch, tokens], its question, else -1.
        sees: [batch, tokens], the only document that it sees, else -1.
        late: [batch, tokens], whether it reads documents in the later layers only.
    """
    tokens = document.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    column = document[:, None, :]
    first = column == BEGINNING
    shown = (column >= 0) & ((sees[:, :, None] < 0) | (column == sees[:, :, None]) | first)
    together = (question[:, :, None] >= 0) & (question[:, None, :] == question[:, :, None])
    # A row that saw nothing, such as padding, would be a division by zero.
    itself = torch.eye(tokens, dtype=torch.bool)
    later = (causal & (shown | together)) | itself
    early = later & (first | together | itself | ~late[:, :, None])
    return early[:, None], later[:, None]


def loss_of(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, float]:
    """Return the mean loss on answers and ends, and the share of right answers."""
    early, later = batch.masks
    masks = [early] * EARLY_LAYERS + [later] * (LAYERS - EARLY_LAYERS)
    hidden, _ = forward_rows(model, batch.ids, batch.positions, masks)
    counts = batch.wanted != IGNORED
    logits, wanted = model.lm_head(hidden[counts]), batch.wanted[counts]
    right = (logits.argmax(-1) == wanted)[wanted != EOS].float().mean().item()
    return torch.nn.functional.cross_entropy(logits, wanted), right


def train(steps: int, minutes: float, seed: int) -> LlamaForCausalLM:
    """Train a model; a run that the minutes end before its steps are done is not reproducible."""
    from rich.progress import Progress, TimeElapsedColumn

    torch.manual_seed(seed)
    rng, model, start = Random(seed), make_start(), time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    mean = 0.0
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar:
        task = bar.add_task("training", total=steps)
        for step in range(steps):
            gone = max(step / steps, (time.monotonic() - start) / (60 * minutes))
            if gone >= 1:
                break
            rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * gone))
            right = _step(model, optimizer, rng, LEARNING_RATE * rate)
            mean += (right - mean) / min(step + 1, 50)
            bar.update(task, advance=1, description=f"training, {mean:.1%} of answers right")
    return model


def _step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, rng: Random, rate: float
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    count, size = rng.choice(MIXTURE)
    loss, right = loss_of(model, make_batch(rng, size, count))
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return right


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Write config, bfloat16 weights (computed with in float32) and tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {n: t.bfloat16().contiguous() for n, t in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer: a word is a token; `<s>` is written, not added."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {word: i for i, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_POSITIONS,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def load(folder: Path) -> LlamaForCausalLM:
    """Return the model in a folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def evaluate(
    model: LlamaForCausalLM, prompts: int, seed: int, size: Size | None = None
) -> dict[str, dict[int, float]]:
    """Return the share of right answers for each way to get the KV, by documents needed (1, 2).

    `full`: prefill in full. `stale`: each document's KV was computed in another context.
    `refreshed`: stale, with the reference tokens recomputed.
    """
    rng, right, asked = Random(seed), Counter(), Counter()
    for _ in range(prompts):
        prompt = make_prompt(rng, size or Size())
        old = stale(model, rng, prompt)
        caches = {
            "full": prefill(model, prompt),
            "stale": old,
            "refreshed": refreshed(model, prompt, old, prompt.references),
        }
        asked.update(question.hops for question in prompt.questions)
        for name, kv in caches.items():
            found = zip(answers(model, kv, prompt.questions), prompt.questions, strict=True)
            right.update((name, q.hops) for answer, q in found if answer == q.answer)
    return {name: {n: right[name, n] / asked[n] for n in asked} for name in caches}


def main() -> int:
    """Train or evaluate, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a model and write its folder")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--steps", type=int, default=400)
    training.add_argument("--minutes", type=float, default=20, help="stop then at the latest")
    training.add_argument("--seed", type=int, default=0)
    evaluation = commands.add_parser("evaluate", help="print the accuracy of a model as JSON")
    evaluation.add_argument("folder", type=Path)
    evaluation.add_argument("--prompts", type=int, default=100)
    evaluation.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    # Two threads were slower than one on shared cores, and results of one are the same again.
    torch.set_num_threads(1)
    if options.command == "train":
        save(train(options.steps, options.minutes, options.seed), options.out)
        print(options.out)
    else:
        print(json.dumps(evaluate(load(options.folder), options.prompts, options.seed), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

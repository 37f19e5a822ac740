"""Train a tiny Llama that finds facts in long texts, and measure how well it does.

    python examples/models/retriever.py train --out FOLDER [--share 1.0] [--seed 0]
    python examples/models/retriever.py evaluate FOLDER [--lengths 2048,4096] [--prompts 20]
    python examples/models/retriever.py attention FOLDER [--lengths 8192] [--prompts 5]

The tasks are described in `retriever_data.py`, the start in `retriever_start.py`, what `attention`
prints in `retriever_attention.py`. Training begins with short texts and ends with a few of 8k
tokens. Half of the short ones are torn apart, as if more text stood between their statements, so
that distances of up to 20k tokens are met in all of them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from retriever_attention import Sources, attention_facts, locality_loss, sources_of
from retriever_data import (
    MAX_FACTS,
    MAX_POSITIONS,
    PAD,
    PASSKEY,
    TASKS,
    VOCABULARY,
    Prompt,
    make_prompt,
)
from retriever_forward import Seen, forward
from retriever_start import make_start
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

LEARNING_RATE, WARM_UP, CLIP = 1e-3, 30, 1.0
# Training, in order: steps, tokens of a text, texts in a step.
CURRICULUM = ((150, 512, 8), (80, 1024, 4), (50, 2048, 2), (30, 4096, 1), (12, 8192, 1))
# Questions in a text of `recall`, asked one after the other.
QUESTIONS = 16
# How much predicting the text and local attention count, next to the answers.
TEXT_WEIGHT, LOCALITY_WEIGHT = 0.1, 0.1
# How often texts are torn apart.
APART = 0.5
IGNORED = -100
DEPTHS = 5
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


@dataclass(frozen=True)
class Batch:
    """Texts, each with its questions and answers behind it.

    Attributes:
        ids: [batch, tokens] token ids.
        positions: [batch, tokens].
        answers: [batch, tokens], the next token where it is one of an answer, else `IGNORED`.
        text: [batch, tokens], the next token where it is one of the text, else `IGNORED`.
        sources: for each text, where its answers are stated.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    answers: torch.Tensor
    text: torch.Tensor
    sources: list[Sources]


def make_batch(rng: Random, length: int, count: int) -> Batch:
    """Draw the texts of one training step, all of one task."""
    task = TASKS[rng.random() < 2 / 3]
    facts = 1 if task == PASSKEY else min(rng.randint(length // 96, length // 24), MAX_FACTS)
    questions = min(facts, QUESTIONS)
    prompts = [
        make_prompt(task, length, rng.random(), rng.getrandbits(32), facts, questions)
        for _ in range(count)
    ]
    rows = zip(*(_row(rng, prompt) for prompt in prompts), strict=True)
    pads = (PAD, 0, IGNORED, IGNORED)
    columns = (_stacked(column, pad) for column, pad in zip(rows, pads, strict=True))
    return Batch(*columns, [sources_of(prompt) for prompt in prompts])


def _stacked(rows: Sequence[Sequence[int]], pad: int) -> torch.Tensor:
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad)


def _row(rng: Random, prompt: Prompt) -> tuple[list[int], ...]:
    """Return token ids, positions, and what to predict of answers and of the text."""
    ids = list(prompt.context)
    text = [*ids[1:], IGNORED]
    answers = [IGNORED] * len(ids)
    for index in range(len(prompt.asked)):
        question, answer = prompt.question(index), prompt.answer(index)
        ids += [*question, *answer]
        answers += [*[IGNORED] * (len(question) - 1), *answer, IGNORED]
    text += [IGNORED] * (len(ids) - len(text))
    return ids, _positions(rng, prompt, len(ids)), answers, text


def _positions(rng: Random, prompt: Prompt, length: int) -> list[int]:
    """Return positions in which the text before each statement and the questions may be longer."""
    if rng.random() >= APART:
        return list(range(length))
    tears = [*(fact.start for fact in prompt.facts), len(prompt.context)]
    gaps = sorted(rng.randint(0, MAX_POSITIONS - length) for _ in tears)
    positions, gap = [], 0
    for start, stop, after in zip([0, *tears], [*tears, length], [*gaps, 0], strict=True):
        positions += range(start + gap, stop + gap)
        gap = after
    return positions


def loss_of(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, float]:
    """Return the loss, and the share of right tokens in answers."""
    seen: Seen = []
    hidden = forward(model, batch.ids, batch.positions, seen)
    losses, right = [], 0.0
    for wanted in (batch.text, batch.answers):
        counts = wanted != IGNORED
        logits = model.lm_head(hidden[counts])
        losses.append(torch.nn.functional.cross_entropy(logits, wanted[counts]))
        right = (logits.argmax(-1) == wanted[counts]).float().mean().item()
    locality = locality_loss(seen, batch.sources)
    return TEXT_WEIGHT * losses[0] + losses[1] + LOCALITY_WEIGHT * locality, right


def train(share: float, seed: int) -> LlamaForCausalLM:
    """Train a model.

    Args:
        share: of the curriculum's steps that are done, in each of its stages.
        seed: of the weights and of the texts.
    """
    from rich.progress import Progress, TimeElapsedColumn

    torch.manual_seed(seed)
    rng, model = Random(seed), make_start()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    plan = [(n, k) for steps, n, k in CURRICULUM for _ in range(max(1, round(share * steps)))]
    mean = 0.0
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as bar:
        task = bar.add_task("training", total=len(plan))
        for step, (length, count) in enumerate(plan):
            rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / len(plan)))
            right = _step(model, optimizer, make_batch(rng, length, count), LEARNING_RATE * rate)
            mean += (right - mean) / min(step + 1, 20)
            label = f"{length} tokens, {mean:.1%} of the answers' tokens right"
            bar.update(task, advance=1, description=label)
    return model


def _step(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, batch: Batch, rate: float
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss, right = loss_of(model, batch)
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


@torch.no_grad()
def answers_right(model: LlamaForCausalLM, prompt: Prompt) -> list[bool]:
    """Return for each question, asked alone, whether all of the greedy answer is right."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model.model(torch.tensor([prompt.context]), past_key_values=cache, use_cache=True)
    found = []
    for index in range(len(prompt.asked)):
        question, answer = prompt.question(index), prompt.answer(index)
        # Fed with the right answer, all of its tokens come out right just if they do without.
        ids = torch.tensor([[*question, *answer[:-1]]])
        logits = model(ids, past_key_values=cache, use_cache=True).logits[0, -len(answer) :]
        found.append(logits.argmax(-1).tolist() == answer)
        cache.crop(-ids.shape[1])
    return found


def evaluate(
    model: LlamaForCausalLM, lengths: Sequence[int], prompts: int, seed: int, questions: int = 8
) -> dict[str, dict[int, dict[str, object]]]:
    """Return the share of answers that are right in all tokens.

    Args:
        model: the model.
        lengths: tokens of a prompt.
        prompts: drawn for each task and length, with depths spread evenly.
        seed: of the first prompt; the others count on.
        questions: asked of a prompt in `recall`, each on its own.

    Returns:
        By task and length: the share, and the shares by fifth of the text that has the answer.
    """
    results: dict[str, dict[int, dict[str, object]]] = {}
    for task in TASKS:
        asked = 1 if task == PASSKEY else questions
        for length in lengths:
            by_depth = defaultdict(list)
            for i in range(prompts):
                depth = (i + 0.5) / prompts
                prompt = make_prompt(task, length, depth, seed + i, questions=asked)
                for index, right in enumerate(answers_right(model, prompt)):
                    by_depth[min(int(prompt.depth(index) * DEPTHS), DEPTHS - 1)].append(right)
            results.setdefault(task, {})[length] = _shares(by_depth)
    return results


def _shares(by_depth: Mapping[int, Sequence[bool]]) -> dict[str, object]:
    every = [right for rights in by_depth.values() for right in rights]
    shares = {d: round(sum(r) / len(r), 4) for d, r in sorted(by_depth.items())}
    return {"questions": len(every), "right": sum(every) / len(every), "by_depth": shares}


def main() -> int:
    """Train, evaluate or look at the attention, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train a model and write its folder")
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--share", type=float, default=1.0, help="of the steps that are done")
    training.add_argument("--seed", type=int, default=0)
    for name, text, lengths, prompts in (
        ("evaluate", "print the accuracy of a model as JSON", "2048,4096,8192", 20),
        ("attention", "print as JSON where a model attends to when it answers", "8192", 5),
    ):
        measuring = commands.add_parser(name, help=text)
        measuring.add_argument("folder", type=Path)
        measuring.add_argument("--lengths", default=lengths, help="of the prompts, in tokens")
        measuring.add_argument("--prompts", type=int, default=prompts)
        measuring.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    # Two threads were slower than one on shared cores, and results of one are the same again.
    torch.set_num_threads(1)
    if options.command == "train":
        save(train(options.share, options.seed), options.out)
        print(options.out)
        return 0
    measure = evaluate if options.command == "evaluate" else attention_facts
    lengths = [int(length) for length in options.lengths.split(",")]
    found = measure(load(options.folder), lengths, options.prompts, options.seed)
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

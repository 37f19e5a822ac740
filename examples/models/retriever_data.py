"""Prompts for the retriever fixture: facts hidden in a long text, and questions about them.

A prompt is `<s>`, then filler in which statements stand, then one question (here of two lines):

    <s> w3 w41 w7 . w90 ... remember that k17 has a pass key and it is n4 n60 n9 n31 n2 . w8 ...
    what is the pass key of k17 ? it is

The answer is the value and the full stop that ends it. There are two tasks:

- `passkey`: one statement, whose value has five tokens.
- `recall`: many statements, about one for each 64 tokens, with values of two to four tokens.

The filler is drawn from a Markov chain of 160 words in sentences, the same chain for all prompts.
Keys and values are drawn anew for every prompt; nothing can be learnt by heart. Everything comes
from the seed handed in, so that a seed gives the same prompts everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random

PASSKEY, RECALL = TASKS = ("passkey", "recall")
# KEY and VALUE are filled in. A statement is a sentence of 9 to 16 tokens.
STATEMENTS = {
    PASSKEY: (
        "remember that KEY has a pass key and it is VALUE .",
        "note : for KEY the pass key is VALUE .",
        "the pass key of KEY is VALUE .",
    ),
    RECALL: (
        "we know that KEY has a value which is VALUE .",
        "note : for KEY the value is VALUE .",
        "the value of KEY is VALUE .",
    ),
}
QUESTIONS = {
    PASSKEY: "what is the pass key of KEY ? it is",
    RECALL: "what is the value of KEY ? it is",
}
# Least and most tokens of a value.
VALUE_TOKENS = {PASSKEY: (5, 5), RECALL: (2, 4)}
TOKENS_PER_FACT, MAX_FACTS = 64, 128
MAX_POSITIONS = 20480

_STRUCTURE = ("<pad>", "<s>", "</s>", "<unk>", ".")
_TEXTS = [*(text for texts in STATEMENTS.values() for text in texts), *QUESTIONS.values()]
_GRAMMAR = sorted({word for text in _TEXTS for word in text.split()} - {"KEY", "VALUE", "."})
_KEYS = tuple(f"k{i}" for i in range(192))
_NUMBERS = tuple(f"n{i}" for i in range(64))
_FILLERS = tuple(f"w{i}" for i in range(160))
VOCABULARY: tuple[str, ...] = (*_STRUCTURE, *_GRAMMAR, *_KEYS, *_NUMBERS, *_FILLERS)
ID = {word: i for i, word in enumerate(VOCABULARY)}
PAD, BOS, EOS, UNKNOWN, STOP = range(len(_STRUCTURE))


def _ids(words: Iterable[str]) -> tuple[int, ...]:
    return tuple(ID[word] for word in words)


KEYS, NUMBERS, FILLERS = map(_ids, (_KEYS, _NUMBERS, _FILLERS))
# Eight words may follow a word, the first of them most often; a sentence ends after 12 in the mean.
_WEIGHTS = (*(1 / rank for rank in range(1, 9)), 0.25)
CHAIN = tuple(weight / sum(_WEIGHTS) for weight in _WEIGHTS)
_CUMULATED = list(accumulate(CHAIN))


def _followers() -> dict[int, tuple[int, ...]]:
    rng = Random(0)
    words = {word: (*rng.sample(FILLERS, 8), STOP) for word in FILLERS}
    return words | {STOP: tuple(rng.sample(FILLERS, 9))}


FOLLOWERS = _followers()


@dataclass(frozen=True)
class Fact:
    """What one statement of a prompt says.

    Attributes:
        key: token id of the key.
        value: token ids.
        start: position in the prompt of the statement's first token.
        stop: position after its last token, the full stop.
    """

    key: int
    value: tuple[int, ...]
    start: int
    stop: int

    @property
    def answer(self) -> list[int]:
        """Token ids that answer a question about it: the value and a full stop."""
        return [*self.value, STOP]


@dataclass(frozen=True)
class Prompt:
    """A long text with its facts, some of which are asked for.

    Attributes:
        task: `passkey` or `recall`.
        context: token ids of `<s>` and the text, without a question.
        facts: what is stated, in the order of the text.
        asked: the facts asked for, one question each.
    """

    task: str
    context: tuple[int, ...]
    facts: tuple[Fact, ...]
    asked: tuple[Fact, ...]

    def question(self, index: int = 0) -> list[int]:
        """Return the token ids of a question, after which its answer comes."""
        return _filled(QUESTIONS[self.task], self.asked[index].key)

    def ids(self, index: int = 0) -> list[int]:
        """Return the token ids of the whole prompt with one question."""
        return [*self.context, *self.question(index)]

    def answer(self, index: int = 0) -> list[int]:
        """Return the token ids of the only right answer to a question."""
        return self.asked[index].answer

    def text(self, index: int = 0) -> str:
        """Return the words of `ids`."""
        return " ".join(VOCABULARY[i] for i in self.ids(index))

    def depth(self, index: int = 0) -> float:
        """Return where in the text the answer is stated, from 0 (first) to 1 (last)."""
        fact = self.asked[index]
        return (fact.start - 1) / (len(self.context) - 1 - (fact.stop - fact.start))

    def without(self, index: int = 0) -> Prompt:
        """Return the prompt with filler of the same length for the statement asked for."""
        fact = self.asked[index]
        filler = _filler(Random(fact.start), fact.stop - fact.start)
        context = (*self.context[: fact.start], *filler, *self.context[fact.stop :])
        return replace(self, context=context, facts=tuple(f for f in self.facts if f != fact))


def make_prompt(
    task: str,
    length: int,
    depth: float = 0.5,
    seed: int = 0,
    facts: int | None = None,
    questions: int = 1,
) -> Prompt:
    """Draw a prompt.

    Args:
        task: `passkey` or `recall`.
        length: tokens of the prompt with one question, exactly.
        depth: where the answer to the first question is stated, from 0 to 1; exactly there in
            `passkey`, in the statement that is next to it in `recall`.
        seed: of everything that is drawn.
        facts: statements, by default one in `passkey` and one for each 64 tokens in `recall`.
        questions: facts asked for; the others than the first are drawn.

    Raises:
        ValueError: if the statements do not fit or there are more questions than facts.
    """
    rng = Random(seed)
    usual = 1 if task == PASSKEY else min(max(length // TOKENS_PER_FACT, 2), MAX_FACTS)
    count = usual if facts is None else facts
    said = [_statement(rng, task, key) for key in rng.sample(KEYS, count)]
    room = length - 1 - len(_filled(QUESTIONS[task], KEYS[0])) - sum(len(s) for _, s in said)
    if room < 0 or questions > count:
        raise ValueError(f"{count} facts and {questions} questions do not fit {length} tokens")
    before = [round(depth * room)] if count == 1 else sorted(_draws(rng, room, count))
    context, stated = _spread(rng, said, before, room)
    first = min(stated, key=lambda fact: abs(fact.start - depth * len(context)))
    others = rng.sample([fact for fact in stated if fact != first], questions - 1)
    return Prompt(task, context, stated, (first, *others))


def _draws(rng: Random, most: int, count: int) -> list[int]:
    return [rng.randint(0, most) for _ in range(count)]


def _filled(text: str, key: int, value: Sequence[int] = ()) -> list[int]:
    """Return the token ids of a text with KEY and VALUE filled in."""
    found: list[int] = []
    for word in text.split():
        found += [key] if word == "KEY" else value if word == "VALUE" else [ID[word]]
    return found


def _statement(rng: Random, task: str, key: int) -> tuple[Fact, list[int]]:
    """Draw a value, which repeats no token, and the statement; its place is not known yet."""
    value = tuple(rng.sample(NUMBERS, rng.randint(*VALUE_TOKENS[task])))
    return Fact(key, value, 0, 0), _filled(rng.choice(STATEMENTS[task]), key, value)


def _spread(
    rng: Random, said: Sequence[tuple[Fact, list[int]]], before: Sequence[int], room: int
) -> tuple[tuple[int, ...], tuple[Fact, ...]]:
    """Put filler around statements: `before[i]` tokens of it in all before the i-th."""
    tokens, facts, used = [BOS], [], 0
    for upto, (fact, statement) in zip(before, said, strict=True):
        tokens += _filler(rng, upto - used)
        facts.append(replace(fact, start=len(tokens), stop=len(tokens) + len(statement)))
        tokens += statement
        used = upto
    return (*tokens, *_filler(rng, room - used)), tuple(facts)


def _filler(rng: Random, length: int) -> list[int]:
    """Draw sentences of filler; the last is cut short by a full stop where it has to be."""
    word, words = STOP, []
    for rank in rng.choices(range(len(CHAIN)), cum_weights=_CUMULATED, k=length):
        word = FOLLOWERS[word][rank]
        words.append(word)
    return [*words[:-1], STOP] if words else []

"""Prompts of documents for the reader fixture: facts, references across documents, questions.

A prompt is `<s>`, then documents, then one question:

    doc d4 w3 k7 n12 . w9 note red . ... doc d9 k2 the-color . w1 ... ask k7

- `k7 n12 .` states a fact. `ask k7` wants `n12`: a question on ONE document.
- `note red .` introduces the prompt's only color; such a document is a source.
- `k2 the-color .` refers to the color introduced in an EARLIER document. `ask k2` wants
  `red`: a question on TWO documents. The reference is the only token that has to read another
  document, so the KV cache of the rest is about the same in every prompt.

Keys, values and words are drawn anew for every prompt; nothing can be learnt by heart. Everything
is drawn from the `random.Random` handed in, so a seed gives the same prompts everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random

CATEGORIES = {
    "color": "red blue green yellow black white orange purple brown pink grey gold teal navy",
    "city": "paris rome oslo cairo lima quito delhi tokyo seoul lagos miami berlin vienna dublin",
    "animal": "cat dog horse cow goat sheep lion tiger bear wolf fox deer mouse rabbit",
    "fruit": "apple pear plum grape lemon lime mango peach cherry melon fig kiwi banana papaya",
    "metal": "iron copper zinc tin lead nickel silver cobalt chrome titan bronze brass steel",
    "tool": "hammer saw drill wrench pliers axe chisel ladder shovel rake file clamp lathe plane",
    "sport": "tennis golf rugby hockey judo boxing rowing sailing skiing biking chess polo squash",
    "drink": "tea coffee milk water juice wine beer cider cocoa soda rum gin punch lemonade",
}
_STRUCTURE = ("<pad>", "<s>", "</s>", "<unk>", "doc", "note", "ask", ".")
_NAMES = tuple(f"d{i}" for i in range(32))
_KEYS = tuple(f"k{i}" for i in range(96))
_NUMBERS = tuple(f"n{i}" for i in range(32))
_FILLERS = tuple(f"w{i}" for i in range(64))
_WORDS = tuple(tuple(words.split()) for words in CATEGORIES.values())
_REFERENCES = tuple(f"the-{category}" for category in CATEGORIES)
VOCABULARY: tuple[str, ...] = (
    *_STRUCTURE,
    *_NAMES,
    *_KEYS,
    *_NUMBERS,
    *_FILLERS,
    *(word for words in _WORDS for word in words),
    *_REFERENCES,
)
ID = {word: i for i, word in enumerate(VOCABULARY)}
PAD, BOS, EOS, UNKNOWN, DOC, NOTE, ASK, STOP = range(len(_STRUCTURE))


def _ids(words: Iterable[str]) -> tuple[int, ...]:
    return tuple(ID[word] for word in words)


MAX_POSITIONS = 2048
NAMES, KEYS, NUMBERS, FILLERS = map(_ids, (_NAMES, _KEYS, _NUMBERS, _FILLERS))
WORDS = tuple(map(_ids, _WORDS))
REFERENCES = _ids(_REFERENCES)
_KEY_SET = frozenset(KEYS)


@dataclass(frozen=True)
class Size:
    """Bounds of what is drawn, each (least, most) and inclusive.

    Attributes:
        documents: documents in a prompt.
        length: tokens in a document.
        facts: facts in a document, fewer where they do not fit.
        sources: documents that introduce words.
        categories: categories introduced in a prompt.
    """

    documents: tuple[int, int] = (6, 18)
    length: tuple[int, int] = (30, 80)
    facts: tuple[int, int] = (2, 5)
    sources: tuple[int, int] = (2, 4)
    categories: tuple[int, int] = (3, 8)


@dataclass(frozen=True)
class Fact:
    """What a document says of one key.

    Attributes:
        key: token id of the key.
        place: offset in the document of the value or of the reference.
        category: index of the category referred to; None where the value itself stands there.
    """

    key: int
    place: int
    category: int | None


@dataclass(frozen=True)
class Document:
    """A document; the same text may stand in many prompts.

    Attributes:
        tokens: token ids.
        facts: what it says.
        notes: (category, offset of the word) for each word that it introduces.
    """

    tokens: tuple[int, ...]
    facts: tuple[Fact, ...]
    notes: tuple[tuple[int, int], ...] = ()

    @property
    def needs(self) -> set[int]:
        """Categories to which it refers."""
        return {fact.category for fact in self.facts if fact.category is not None}

    @property
    def references(self) -> list[int]:
        """Offsets of its reference tokens."""
        return [fact.place for fact in self.facts if fact.category is not None]

    def redrawn(self, rng: Random) -> Document:
        """Return the document with other words introduced; itself where it introduces none."""
        tokens = list(self.tokens)
        for category, place in self.notes:
            tokens[place] = rng.choice([w for w in WORDS[category] if w != tokens[place]])
        return replace(self, tokens=tuple(tokens))


@dataclass(frozen=True)
class Question:
    """A question, with its answer.

    Attributes:
        key: token id of the key asked for.
        answer: token id of the only right answer; `</s>` follows it.
        document: index in the prompt of the document that states the fact.
        source: index of the document with the word referred to; None for a question on one
            document.
    """

    key: int
    answer: int
    document: int
    source: int | None

    @property
    def tokens(self) -> tuple[int, int]:
        """The tokens `ask KEY`, after which the answer comes."""
        return ASK, self.key

    @property
    def hops(self) -> int:
        """How many documents the answer needs, 1 or 2."""
        return 1 if self.source is None else 2


@dataclass(frozen=True)
class Prompt:
    """Documents in their order; position 0 is `<s>`."""

    documents: tuple[Document, ...]

    @cached_property
    def starts(self) -> list[int]:
        """Position of the first token of each document, and the length after the last."""
        starts = [1]
        for document in self.documents:
            starts.append(starts[-1] + len(document.tokens))
        return starts

    @cached_property
    def ids(self) -> list[int]:
        """Token ids of `<s>` and the documents, without a question."""
        return [BOS, *(token for document in self.documents for token in document.tokens)]

    @property
    def text(self) -> str:
        """The words of `ids`."""
        return " ".join(VOCABULARY[i] for i in self.ids)

    @cached_property
    def references(self) -> list[int]:
        """Positions of all reference tokens."""
        both = zip(self.starts, self.documents, strict=False)
        return [start + place for start, document in both for place in document.references]

    @cached_property
    def questions(self) -> list[Question]:
        """Every question that can be asked, in the order of the facts."""
        introduced = {
            category: (index, document.tokens[place])
            for index, document in enumerate(self.documents)
            for category, place in document.notes
        }
        found = []
        for index, document in enumerate(self.documents):
            for fact in document.facts:
                if fact.category is None:
                    found.append(Question(fact.key, document.tokens[fact.place], index, None))
                else:
                    source, word = introduced[fact.category]
                    found.append(Question(fact.key, word, index, source))
        return found


USUAL = Size()


def make_prompt(rng: Random, size: Size = USUAL) -> Prompt:
    """Draw documents and put them into an order in which every source precedes its references."""
    count = rng.randint(*size.documents)
    names, keys = rng.sample(NAMES, count), rng.sample(KEYS, len(KEYS))
    categories = rng.sample(range(len(WORDS)), rng.randint(*size.categories))
    sources = min(rng.randint(*size.sources), len(categories), count - 1)
    documents = []
    for index in range(count):
        introduced = categories[index::sources] if index < sources else []
        documents.append(_document(rng, size, names[index], keys, introduced, categories))
    return Prompt(tuple(in_order(rng, documents)))


def _document(
    rng: Random,
    size: Size,
    name: int,
    keys: list[int],
    introduced: Sequence[int],
    categories: Sequence[int],
) -> Document:
    """Draw a document; keys are taken off `keys`, so that no two facts of a prompt share one."""
    length = rng.randint(*size.length)
    room = (length - 2 - 3 * len(introduced)) // 3
    count = max(1, min(rng.randint(*size.facts), room, len(keys)))
    sentences = [(NOTE, rng.choice(WORDS[category]), STOP) for category in introduced]
    for _ in range(count):
        refers = not introduced and rng.random() < 0.65
        value = REFERENCES[rng.choice(categories)] if refers else rng.choice(NUMBERS)
        sentences.append((keys.pop(), value, STOP))
    rng.shuffle(sentences)
    return read_document((DOC, name, *_spread(rng, sentences, length - 2)))


def _spread(rng: Random, sentences: Sequence[tuple[int, ...]], length: int) -> list[int]:
    """Fill up the sentences to `length` tokens with fillers between them."""
    spare = max(0, length - sum(map(len, sentences)))
    before = sorted(rng.randint(0, spare) for _ in sentences)
    fillers = rng.choices(FILLERS, k=spare)
    tokens: list[int] = []
    used = 0
    for upto, sentence in zip(before, sentences, strict=True):
        tokens += [*fillers[used:upto], *sentence]
        used = upto
    return tokens + fillers[used:]


def read_document(tokens: Sequence[int]) -> Document:
    """Return the document with these tokens, its facts and notes found in them."""
    category_of = {word: c for c, words in enumerate(WORDS) for word in words}
    referred = {word: c for c, word in enumerate(REFERENCES)}
    facts, notes = [], []
    for place, token in enumerate(tokens):
        if token in _KEY_SET:
            facts.append(Fact(token, place + 1, referred.get(tokens[place + 1])))
        elif token == NOTE:
            notes.append((category_of[tokens[place + 1]], place + 1))
    return Document(tuple(tokens), tuple(facts), tuple(notes))


def in_order(rng: Random, documents: Sequence[Document]) -> list[Document]:
    """Return the documents in a random order in which every source precedes its references."""
    waiting = list(documents)
    rng.shuffle(waiting)
    missing = {category for document in waiting for category, _ in document.notes}
    ordered: list[Document] = []
    while waiting:
        ready = rng.choice([d for d in waiting if not d.needs & missing])
        waiting.remove(ready)
        ordered.append(ready)
        missing -= {category for category, _ in ready.notes}
    return ordered


def elsewhere(rng: Random, prompt: Prompt, kept: int) -> tuple[Prompt, int]:
    """Return another prompt with the same text of document `kept`, and its index there.

    The other sources introduce other words and the order is another, so that whatever the
    document reads in its context is wrong for `prompt`.
    """
    document = prompt.documents[kept]
    changed = [d if d is document else d.redrawn(rng) for d in prompt.documents]
    ordered = in_order(rng, changed)
    return Prompt(tuple(ordered)), next(i for i, d in enumerate(ordered) if d is document)


def later_prompt(rng: Random, prompt: Prompt) -> Prompt:
    """Return a later request: the documents in another order, all sources with other words."""
    return Prompt(tuple(in_order(rng, [d.redrawn(rng) for d in prompt.documents])))

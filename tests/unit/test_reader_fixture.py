"""The reader fixture reads across documents, and KV caches from another context show in it."""

import json
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from reader import MIXTURE, evaluate, load, main, make_batch
from reader_data import (
    CATEGORIES,
    ID,
    VOCABULARY,
    Size,
    elsewhere,
    later_prompt,
    make_prompt,
    read_document,
)
from reader_forward import forward_rows, prefill, refreshed, stale
from transformers import AutoTokenizer

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "reader"
SHORT = Size(documents=(4, 8), length=(20, 50))
CATEGORY_OF = {word: name for name, words in CATEGORIES.items() for word in words.split()}
# Where CacheBlend looks first: what the second layer is given holds what the first has read.
CHECK_LAYER, VALUES = 1, 1


@pytest.fixture(scope="module")
def reader():
    torch.set_num_threads(1)
    return load(FOLDER)


def resolve(text: str) -> dict[str, tuple[str, int]]:
    """Read the words as a person would: each key's answer, and how many documents it takes."""
    introduced: dict[str, str] = {}
    found = {}
    words = text.split()
    for before, word in pairwise(words):
        if before == "note":
            assert CATEGORY_OF[word] not in introduced
            introduced[CATEGORY_OF[word]] = word
        elif before[0] == "k" and before[1:].isdigit():
            assert before not in found
            refers = word.startswith("the-")
            found[before] = (introduced[word.removeprefix("the-")], 2) if refers else (word, 1)
    return found


def asked(prompt) -> dict[str, tuple[str, int]]:
    return {VOCABULARY[q.key]: (VOCABULARY[q.answer], q.hops) for q in prompt.questions}


def test_words_are_told_apart():
    assert len(ID) == len(VOCABULARY)
    assert len(CATEGORY_OF) == sum(len(words.split()) for words in CATEGORIES.values())


@pytest.mark.parametrize("size", [Size(), SHORT, *(size for _, size in MIXTURE)])
def test_answers_are_those_of_a_reader_of_the_text(size):
    rng = Random(3)
    for _ in range(30):
        prompt = make_prompt(rng, size)
        for variant in (prompt, later_prompt(rng, prompt), elsewhere(rng, prompt, 0)[0]):
            assert asked(variant) == resolve(variant.text)


def test_prompts_are_as_large_as_wanted_and_mixed():
    rng = Random(4)
    prompts = [make_prompt(rng) for _ in range(200)]
    assert all(6 <= len(p.documents) <= 18 for p in prompts)
    assert all(30 <= len(d.tokens) <= 80 for p in prompts for d in p.documents)
    assert max(len(p.ids) for p in prompts) > 1000
    questions = [q for p in prompts for q in p.questions]
    assert 0.35 < sum(q.hops == 2 for q in questions) / len(questions) < 0.65
    references = sum(len(p.references) for p in prompts) / sum(len(p.ids) for p in prompts)
    assert 0.01 < references < 0.05
    assert all(VOCABULARY[p.ids[i]].startswith("the-") for p in prompts for i in p.references)


def test_prompts_come_from_the_seed_alone():
    assert make_prompt(Random(5)) == make_prompt(Random(5)) != make_prompt(Random(6))


def test_a_question_names_the_documents_that_it_takes():
    prompt = make_prompt(Random(7))
    for question in prompt.questions:
        assert question.key in prompt.documents[question.document].tokens
        source = question.document if question.source is None else question.source
        assert source <= question.document
        assert question.answer in prompt.documents[source].tokens


def test_a_later_prompt_has_the_same_documents_with_other_answers():
    prompt = make_prompt(Random(8))
    later = later_prompt(Random(9), prompt)
    plain = {d.tokens for d in prompt.documents if not d.notes}
    assert plain == {d.tokens for d in later.documents if not d.notes}
    answers = {q.key: q.answer for q in later.questions}
    assert all((answers[q.key] == q.answer) == (q.hops == 1) for q in prompt.questions)


def test_elsewhere_a_document_is_the_same_and_the_other_sources_are_not():
    rng = Random(10)
    prompt = make_prompt(rng)
    for index, document in enumerate(prompt.documents):
        other, place = elsewhere(rng, prompt, index)
        assert other.documents[place] == document == read_document(document.tokens)
        kept = {d.tokens for d in other.documents} & {d.tokens for d in prompt.documents if d.notes}
        assert kept <= {document.tokens}


def test_training_questions_do_not_see_one_another():
    batch = make_batch(Random(11), SHORT, 2)
    for mask in batch.masks:
        asks = (batch.ids[0] == ID["ask"]).nonzero().flatten().tolist()
        first, second = asks[:2]
        assert mask[0, 0, first + 1, first]
        assert not mask[0, 0, second, first : first + 3].any()
        assert not mask[0, 0].triu(1).any()


def test_folder_is_small_and_its_words_survive_the_tokenizer():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 6e6
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    prompt = make_prompt(Random(12))
    assert tokenizer(prompt.text).input_ids == prompt.ids
    assert tokenizer.decode(prompt.ids) == prompt.text
    assert tokenizer.convert_ids_to_tokens(range(len(VOCABULARY))) == list(VOCABULARY)


@torch.no_grad()
def test_rows_are_computed_as_transformers_computes_them(reader):
    ids = torch.tensor([make_prompt(Random(13), SHORT).ids])
    causal = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    masks = [causal] * reader.config.num_hidden_layers
    hidden, _ = forward_rows(reader, ids, torch.arange(ids.shape[1])[None], masks)
    expected = reader(ids).logits
    torch.testing.assert_close(reader.lm_head(hidden), expected, rtol=1e-4, atol=1e-4)


def test_recomputing_everything_gives_a_full_prefill(reader):
    rng = Random(14)
    prompt = make_prompt(rng, SHORT)
    old = stale(reader, rng, prompt)
    full = prefill(reader, prompt)
    again = refreshed(reader, prompt, old, range(len(prompt.ids)))
    torch.testing.assert_close(again, full, rtol=1e-3, atol=1e-3)
    # The first layer has read nothing yet: there, moving to the new positions is all it takes.
    torch.testing.assert_close(old[0], full[0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_full_prefill_answers_fresh_prompts_and_then_ends(reader):
    rng, right, count = Random(15), 0, 200
    for i in range(count):
        prompt = make_prompt(rng, Size() if i % 5 == 0 else SHORT)
        question = rng.choice(prompt.questions)
        ids = torch.tensor([[*prompt.ids, *question.tokens, question.answer]])
        right += reader(ids).logits[0, -2:].argmax(-1).tolist() == [question.answer, ID["</s>"]]
    assert right / count >= 0.95


def test_stale_kv_hurts_questions_on_two_documents_and_the_references_mend_it(reader):
    scores = evaluate(reader, prompts=10, seed=16, size=SHORT)
    assert min(scores["full"].values()) >= 0.95
    assert scores["stale"][1] >= 0.95
    assert scores["stale"][2] < 0.2
    assert min(scores["refreshed"].values()) >= 0.95


def test_references_are_what_deviates_most(reader):
    rng = Random(17)
    for _ in range(3):
        prompt = make_prompt(rng)
        old, full = stale(reader, rng, prompt), prefill(reader, prompt)
        deviation = (old[CHECK_LAYER][VALUES] - full[CHECK_LAYER][VALUES]).pow(2).sum((0, 1, 3))
        most = set(deviation.topk(len(prompt.ids) // 10).indices.tolist())
        assert len(most & set(prompt.references)) >= 0.95 * len(prompt.references)


def test_script_trains_and_evaluates(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["reader.py", "train", "--out", str(tmp_path), "--steps", "1"])
    assert main() == 0
    made = {file.name for file in FOLDER.iterdir()} - {"README.md"}
    assert {file.name for file in tmp_path.iterdir()} == made
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["reader.py", "evaluate", str(tmp_path), "--prompts", "1"])
    assert main() == 0
    assert set(json.loads(capsys.readouterr().out)) == {"full", "stale", "refreshed"}

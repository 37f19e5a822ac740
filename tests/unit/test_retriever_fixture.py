"""The retriever fixture finds facts in long texts, and only where they stand."""

import json
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from retriever import answers_right, evaluate, load, main, make_batch
from retriever_attention import attention_facts
from retriever_data import (
    FOLLOWERS,
    ID,
    MAX_POSITIONS,
    PASSKEY,
    RECALL,
    STOP,
    TASKS,
    VOCABULARY,
    make_prompt,
)
from retriever_forward import forward
from transformers import AutoTokenizer

FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "retriever"


@pytest.fixture(scope="module")
def retriever():
    torch.set_num_threads(1)
    return load(FOLDER)


def test_words_are_told_apart():
    assert len(ID) == len(VOCABULARY)


@pytest.mark.parametrize("task", TASKS)
def test_prompts_come_from_the_seed_alone(task):
    first = make_prompt(task, 700, seed=5)
    assert first == make_prompt(task, 700, seed=5) != make_prompt(task, 700, seed=6)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [300, 1001, 8192])
def test_answers_stand_in_prompts_of_the_length_asked_for(task, length):
    prompt = make_prompt(task, length, depth=0.3, seed=7, questions=1 if task == PASSKEY else 3)
    for index, fact in enumerate(prompt.asked):
        assert len(prompt.ids(index)) == length
        statement = list(prompt.context[fact.start : fact.stop])
        assert statement[-len(prompt.answer(index)) :] == prompt.answer(index)
        assert fact.key in statement
        assert fact.key in prompt.question(index)
        assert prompt.context.count(fact.key) == 1
        assert prompt.answer(index) == [*fact.value, STOP]


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
def test_the_needle_stands_at_the_depth_asked_for(depth):
    assert make_prompt(PASSKEY, 2048, depth).depth() == pytest.approx(depth, abs=1e-3)
    assert make_prompt(RECALL, 2048, depth).depth() == pytest.approx(depth, abs=0.1)


def test_recall_states_many_facts_and_as_many_as_wanted():
    assert [len(make_prompt(RECALL, n).facts) for n in (2048, 4096, 8192)] == [32, 64, 128]
    prompt = make_prompt(RECALL, 2048, facts=100, questions=9)
    assert len(prompt.facts) == 100
    assert len({fact.key for fact in prompt.asked}) == 9
    assert all(2 <= len(fact.value) <= 4 for fact in prompt.facts)
    assert all(a.stop <= b.start for a, b in pairwise(prompt.facts))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        make_prompt(RECALL, 256, facts=100)
    with pytest.raises(ValueError, match="do not fit"):
        make_prompt(PASSKEY, 256, questions=2)


def test_filler_is_varied_and_follows_its_chain():
    prompt = make_prompt(PASSKEY, 4096, depth=1)
    filler = prompt.context[1 : prompt.facts[0].start]
    assert len(set(filler)) > 150
    # The last sentence may be cut short.
    assert all(after in FOLLOWERS[before] for before, after in pairwise(filler[:-1]))


def test_torn_texts_have_positions_that_grow():
    batch = make_batch(Random(3), 256, 4)
    for ids, positions in zip(batch.ids, batch.positions, strict=True):
        steps = positions[ids != ID["<pad>"]].diff()
        assert (steps > 0).all()
        assert positions.max() < MAX_POSITIONS


def test_folder_is_small_and_its_words_survive_the_tokenizer():
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 3.2e6
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] == MAX_POSITIONS
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    prompt = make_prompt(RECALL, 400)
    assert tokenizer(prompt.text()).input_ids == prompt.ids()
    assert tokenizer.convert_ids_to_tokens(range(len(VOCABULARY))) == list(VOCABULARY)


@torch.no_grad()
def test_forward_is_that_of_transformers(retriever):
    ids = torch.tensor([make_prompt(RECALL, 300).ids()])
    hidden = forward(retriever, ids, torch.arange(ids.shape[1])[None])
    torch.testing.assert_close(
        retriever.lm_head(hidden), retriever(ids).logits, rtol=1e-3, atol=1e-3
    )


@torch.no_grad()
def test_greedy_decoding_says_the_pass_key(retriever):
    prompt = make_prompt(PASSKEY, 1024, depth=0.4, seed=8)
    made = retriever.generate(
        torch.tensor([prompt.ids()]), max_new_tokens=len(prompt.answer()), do_sample=False
    )
    assert made[0, 1024:].tolist() == prompt.answer()


def test_nearly_all_answers_are_right(retriever):
    scores = evaluate(retriever, lengths=[1024, 2048], prompts=5, seed=100)
    for task in TASKS:
        assert all(found["right"] >= 0.95 for found in scores[task].values())


@pytest.mark.parametrize("task", TASKS)
def test_without_its_statement_no_question_is_answered(retriever, task):
    prompts = [make_prompt(task, 1024, depth, seed=9) for depth in (0.2, 0.5, 0.8)]
    assert all(all(answers_right(retriever, prompt)) for prompt in prompts)
    without = [prompt.without() for prompt in prompts]
    assert not any(any(answers_right(retriever, prompt)) for prompt in without)
    assert all(len(w.ids()) == len(p.ids()) for w, p in zip(without, prompts, strict=True))


@pytest.mark.parametrize("task", TASKS)
def test_several_tokens_of_the_statement_answer_to_the_question(retriever, task):
    """Sparse attention looks at few keys of a block, so that it needs more than one to be seen."""
    (heads,) = attention_facts(retriever, [2048], prompts=3, seed=10)[task].values()
    for layer in (1, 2):
        best = max((heads[f"layer {layer} head {h}"] for h in range(4)), key=lambda f: f["mass"])
        assert best["mass"] > 0.5
        assert best["raised"] >= 5
        together = heads[f"layer {layer} together"]
        assert together["block_rank"] < 3
        assert together["centre_rank"] < together["blocks"] / 10


def test_script_trains_evaluates_and_looks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("retriever.CURRICULUM", ((1, 128, 2),))
    monkeypatch.setattr("sys.argv", ["retriever.py", "train", "--out", str(tmp_path)])
    assert main() == 0
    made = {file.name for file in FOLDER.iterdir()} - {"README.md"}
    assert {file.name for file in tmp_path.iterdir()} == made
    for command in ("evaluate", "attention"):
        capsys.readouterr()
        options = ["--lengths", "512", "--prompts", "1"]
        monkeypatch.setattr("sys.argv", ["retriever.py", command, str(tmp_path), *options])
        assert main() == 0
        assert set(json.loads(capsys.readouterr().out)) == set(TASKS)

"""The scenes fixture: its data says what the images show, and the committed model answers."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from scenes import main, scenes, write_data
from scenes_batches import IGNORED, QUESTIONS, ROW, TALK, Scenes, collate, row_of
from scenes_data import (
    DESCRIBE,
    DIGITS,
    HELD_OUT,
    ID,
    KINDS,
    SHAPES,
    VOCABULARY,
    WORDS,
    make_scene,
)
from scenes_draw import CELL, COLOURS, IMAGE, MARGIN
from scenes_evaluate import evaluate, held_out, pixels_of, prompt_ids
from scenes_forward import patch_states, read_image, row_logits
from scenes_model import EOS, IMAGE_TOKEN, PATCHES, load
from transformers import AutoProcessor

QUESTION_KINDS = {"color", "what", "count", "where", "digit", "word", "exists", "size"}
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom")
          for column in ("left", "center", "right")]  # fmt: skip
NUMBERS = ["zero", "one", "two", "three", "four"]
SINGULAR = {
    "things": "thing",
    "circles": "circle",
    "squares": "square",
    "triangles": "triangle",
    "diamonds": "diamond",
    "crosses": "cross",
    "digits": "digit",
    "words": "word",
}
LARGEST_BYTES = 4e6


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return load(scenes())


@pytest.fixture(scope="module")
def drawn():
    return [make_scene(seed) for seed in range(60)]


def see(image: Image.Image) -> dict[str, tuple[str, int]]:
    """Read colour and width in pixels of what stands in each cell from the pixels alone."""
    pixels = np.asarray(image).astype(int)
    light = np.median(pixels) > 125
    shown = pixels.min(-1) < 165 if light else pixels.max(-1) > 100
    names, palette = list(COLOURS), np.array(list(COLOURS.values()))
    seen = {}
    for index, place in enumerate(PLACES):
        top, left = (MARGIN + CELL * at for at in divmod(index, 3))
        cell = np.s_[top : top + CELL, left : left + CELL]
        if (where := shown[cell]).any():
            mean = pixels[cell][where].mean(0)
            columns = np.flatnonzero(where.any(0))
            nearest = int(np.abs(palette - mean).sum(-1).argmin())
            seen[place] = names[nearest], int(columns[-1] - columns[0] + 1)
    return seen


def told(description: str) -> dict[str, dict[str, str]]:
    """Read a description: what it says of each place."""
    pattern = r"in the (\w+) row at the (\w+) there is a ([\w ]+) \."
    found = {}
    for row, column, words in re.findall(pattern, description):
        first, second, third = words.split()
        shape = first in ("small", "large")
        colour, kind, detail = (second, third, first) if shape else (first, second, third)
        found[f"{row} {column}"] = {"colour": colour, "kind": kind, "detail": detail}
    return found


def answer(question: str, things: dict[str, dict[str, str]]) -> str:
    """Answer a question as a person would who was told what stands where."""

    def those(words: str) -> list[tuple[str, dict[str, str]]]:
        wanted = {SINGULAR.get(word, word) for word in words.split()} - {"thing"}
        return [(p, t) for p, t in things.items() if wanted <= {t["colour"], t["kind"]}]

    def only(words: str) -> tuple[str, dict[str, str]]:
        [one] = those(words)
        return one

    if found := re.fullmatch(r"what is at the (\w+ \w+) \?", question):
        if (thing := things.get(found[1])) is None:
            return "nothing"
        parts = ("detail", "colour", "kind") if thing["kind"] in SHAPES else (
            "colour", "kind", "detail")  # fmt: skip
        return " ".join(["a", *(thing[part] for part in parts)])
    if found := re.fullmatch(r"what color is the thing at the (\w+ \w+) \?", question):
        return things[found[1]]["colour"]
    if found := re.fullmatch(r"what color is the (\w+) \?", question):
        return only(found[1])[1]["colour"]
    if found := re.fullmatch(r"how many (.+) are there \?", question):
        return NUMBERS[len(those(found[1]))]
    if found := re.fullmatch(r"where is the (\w+ \w+) \?", question):
        return only(found[1])[0]
    if found := re.fullmatch(r"how large is the (\w+ \w+) \?", question):
        return only(found[1])[1]["detail"]
    if found := re.fullmatch(r"which (\w+) is written \?", question):
        return only(found[1])[1]["detail"]
    found = re.fullmatch(r"is there a (\w+ \w+) \?", question)
    return "yes" if those(found[1]) else "no"


def test_pixels_show_what_the_description_says(drawn):
    for scene in drawn:
        seen, said = see(scene.image), told(scene.description)
        assert {place: colour for place, (colour, _) in seen.items()} == {
            place: thing["colour"] for place, thing in said.items()
        }
        widths = {"small": 17, "large": 29}
        shapes = {place: t for place, t in said.items() if t["kind"] in SHAPES}
        assert {p: seen[p][1] for p in shapes} == {
            p: widths[t["detail"]] for p, t in shapes.items()
        }


def test_answers_are_those_of_a_reader_of_the_description(drawn):
    for scene in drawn:
        said = told(scene.description)
        assert len(said) == len(scene.things)
        for question in scene.questions:
            assert answer(question.text, said) == question.answer, (scene.seed, question)


def test_scenes_come_from_the_seed_alone():
    first, again, other = make_scene(5), make_scene(5), make_scene(6)
    assert first.image.tobytes() == again.image.tobytes() != other.image.tobytes()
    assert first.questions == again.questions != other.questions
    assert first.description == again.description


def test_scenes_are_varied_and_descriptions_long(drawn):
    assert {len(scene.things) for scene in drawn} == {1, 2, 3, 4}
    assert {thing.kind for scene in drawn for thing in scene.things} == set(KINDS)
    assert {q.kind for scene in drawn for q in scene.questions} == QUESTION_KINDS
    assert {q.answer for s in drawn for q in s.questions if q.kind == "exists"} == {"yes", "no"}
    assert {scene.image.size for scene in drawn} == {(IMAGE, IMAGE)}
    assert all(len(s.description.split()) >= 50 for s in drawn if len(s.things) >= 3)


def test_digits_and_words_are_told_apart_by_their_pixels():
    """A font with two like glyphs would ask what cannot be answered."""
    from scenes_draw import text_mask

    for texts in (DIGITS, WORDS):
        masks = {text_mask(text, 2, (64, 64))[0].tobytes() for text in texts}
        assert len(masks) == len(texts)


def test_words_fit_the_tokenizer_and_the_image_stands_early(drawn):
    assert len(ID) == len(VOCABULARY) <= 256
    processor = AutoProcessor.from_pretrained(scenes())
    question = drawn[0].questions[0].text
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    made = processor(text=text, images=drawn[0].image, return_tensors="pt")
    assert made.input_ids[0].tolist() == prompt_ids(question)
    assert made.input_ids[0].tolist().count(IMAGE_TOKEN) == PATCHES == 256
    torch.testing.assert_close(made.pixel_values, pixels_of([drawn[0].image]))
    for scene in drawn:
        ids = processor.tokenizer(scene.description).input_ids
        assert processor.tokenizer.decode(ids) == scene.description


def test_training_rows_ask_for_answers_and_ends_only():
    batch = collate([Scenes(0, 4, kept=80)[index] for index in range(4)])
    assert batch.asked.shape == batch.asked_wanted.shape == (4, QUESTIONS, ROW)
    assert batch.talk.shape == (4, 1, TALK)
    scene = make_scene(0)
    question = scene.questions[0]
    row, wanted = batch.asked[0, 0].tolist(), batch.asked_wanted[0, 0].tolist()
    said, answered = question.text.split(), question.answer.split()
    assert row[: len(said) + len(answered)] == [ID[word] for word in said + answered]
    assert [w for w in wanted if w != IGNORED] == [*(ID[word] for word in answered), EOS]
    assert all(
        nxt == want
        for want, (_, nxt) in zip(wanted[:-1], pairwise(row), strict=True)
        if want != IGNORED
    )
    with pytest.raises(ValueError, match="do not fit"):
        row_of([(DESCRIBE, scene.description)], ROW)


def test_patches_of_things_are_kept_first_and_training_stops_before_the_held_out():
    for index in range(4):
        _, truth, kept, *_ = Scenes(0, 4, kept=120)[index]
        assert set(np.flatnonzero(truth[:, 0] > 0)) <= set(kept)
        assert (np.diff(kept) > 0).all()
    with pytest.raises(ValueError, match="held-out"):
        Scenes(HELD_OUT - 1, 2)


def test_folder_is_small_and_has_the_names_that_vllm_wants():
    assert sum(file.stat().st_size for file in scenes().iterdir()) <= LARGEST_BYTES
    config = json.loads((scenes() / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["text_config"]["num_hidden_layers"] >= 5
    with safe_open(scenes() / "model.safetensors", "pt") as weights:
        tower = {name for name in weights.keys() if "vision_tower" in name}  # noqa: SIM118
        assert tower
        assert all("vision_tower.vision_model." in name for name in tower)
        assert {str(weights.get_tensor(name).dtype) for name in tower} == {"torch.float16"}


@torch.no_grad()
def test_rows_are_computed_as_transformers_computes_them(model):
    scene = held_out(1, seed=900)[0]
    rows = [row_of([(q.text, q.answer)], ROW)[0] for q in scene.questions[:2]]
    images = torch.from_numpy(np.asarray(scene.image).transpose(2, 0, 1)[None].copy())
    kept = torch.arange(PATCHES)[None]
    read = read_image(model, patch_states(model, images, kept), kept)
    found = row_logits(model, read, torch.tensor([rows]))
    for index, row in enumerate(rows):
        ids = torch.tensor([[*prompt_ids(""), *row]])
        pixels = pixels_of([scene.image])
        whole = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids))
        expected = whole.logits[0, -ROW:]
        torch.testing.assert_close(found[0, index], expected, rtol=1e-3, atol=1e-3)


def test_model_answers_and_describes_held_out_scenes(model):
    scores = evaluate(model, held_out(24))
    words_right, words = scores.pop("words of descriptions")
    scores.pop("whole descriptions")
    assert set(scores) == QUESTION_KINDS
    right, asked = (sum(column) for column in zip(*scores.values(), strict=True))
    assert right / asked >= 0.9
    assert words_right / words >= 0.95


def test_model_needs_the_image(model):
    """The same questions with another scene's image: what a model that guesses would get."""
    import dataclasses

    some = held_out(12, seed=100)
    swapped = [
        dataclasses.replace(scene, image=other.image)
        for scene, other in zip(some, some[1:] + some[:1], strict=True)
    ]
    scores = evaluate(model, swapped)
    right, asked = (sum(scores[kind][i] for kind in ("color", "what", "where")) for i in (0, 1))
    assert right / asked < 0.4


def test_data_is_written_in_the_llava_layout(tmp_path):
    path = write_data(tmp_path / "some", images=12, seed=3, long_share=0.5)
    samples = json.loads(path.read_text())
    assert [sample["image"] for sample in samples] == [f"{i:04d}.png" for i in range(1, 13)]
    for sample in samples:
        assert set(sample) == {"id", "image", "conversations"}
        turns = sample["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert "".join(turn["value"] for turn in turns).count("<image>") == 1
        with Image.open(path.parent / sample["image"]) as image:
            assert image.size == (IMAGE, IMAGE)
    asked = [sample["conversations"][0]["value"].removeprefix("<image>\n") for sample in samples]
    assert 0 < asked.count(DESCRIBE) < len(samples)
    again = write_data(tmp_path / "again", images=12, seed=3, long_share=0.5)
    assert again.read_bytes() == path.read_bytes()
    assert (again.parent / "0001.png").read_bytes() == (path.parent / "0001.png").read_bytes()


@pytest.mark.parametrize(("share", "described"), [(0.0, 0), (1.0, 5)])
def test_long_share_chooses_how_many_describe(tmp_path, share, described):
    samples = json.loads(write_data(tmp_path, 5, 4, share).read_text())
    asked = [sample["conversations"][0]["value"] for sample in samples]
    assert sum(DESCRIBE in value for value in asked) == described


def test_script_trains_evaluates_and_draws(tmp_path, monkeypatch, capsys):
    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["scenes.py", *words])
        capsys.readouterr()
        assert main() == 0
        return capsys.readouterr().out

    out = tmp_path / "model"
    small = ("--layers", "1", "--hidden", "64", "--batch", "2", "--steps", "3")
    run("train", "--out", str(out), *small)
    made = {file.name for file in scenes().iterdir()} - {"README.md"}
    assert {file.name for file in out.iterdir()} == made
    assert "whole descriptions" in run("evaluate", str(out), "--images", "1")
    path = run("data", str(tmp_path / "data"), "--images", "1", "--seed", "5").strip()
    assert len(json.loads((tmp_path / "data" / "scenes.json").read_text())) == 1
    assert path.endswith("scenes.json")

"""Image-text samples: what is read, what is refused, and what becomes of it as tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vision import IMAGE_TOKEN, PATCHES, tiny_llava

from tests.training_samples import write_samples
from vllm_plugins.errors import PluginError
from vllm_plugins.training.batches import Collator, Order
from vllm_plugins.training.data import Sample, Turn, load_image, read_samples, split_samples
from vllm_plugins.training.pictures import check_pictures
from vllm_plugins.training.processes import Processes

ASKED = {"from": "human", "value": "<image>\nt7 t8"}
TOLD = {"from": "gpt", "value": "t9 t10 t11"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10), (9, 8, 7)).save(tmp_path / "images" / "a.png")
    return tmp_path


def read(folder: Path, entries, images="images", **options) -> list[Sample]:
    path = folder / "data.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return read_samples(path, folder / images if images else None, **options)


def entry(**changes):
    return {"id": "x1", "image": "a.png", "conversations": [ASKED, TOLD]} | changes


def test_an_entry_is_read_with_its_marker_taken_out(folder):
    asked = {"from": "human", "value": "t1 t2\n<image>"}
    first, last = read(folder, [entry(), entry(conversations=[asked, TOLD, *[ASKED_2, TOLD]])])
    assert first.image == folder.resolve() / "images" / "a.png"
    assert first.turns == (Turn("t7 t8", "t9 t10 t11"),)
    assert first.image_first and not last.image_first
    assert [turn.question for turn in last.turns] == ["t1 t2", "t5"]


ASKED_2 = {"from": "human", "value": "t5"}


def test_turns_without_a_loss_are_left_out_as_llava_does(folder):
    turns = [TOLD, ASKED, TOLD, ASKED_2]
    (sample,) = read(folder, [entry(conversations=turns)])
    assert sample.turns == (Turn("t7 t8", "t9 t10 t11"),)


def test_samples_of_text_are_kept_or_left_out(folder):
    entries = [entry(), {"id": "y", "conversations": [ASKED_2, TOLD]}]
    assert [s.image is None for s in read(folder, entries)] == [False, True]
    assert len(read(folder, entries, images_only=True)) == 1
    with pytest.raises(PluginError, match="has no sample with an image"):
        read(folder, entries[1:], images_only=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": "../a.png"}, "leads out of the image folder"),
        ({"image": "/etc/passwd"}, "leads out of the image folder"),
        ({"image": "b.png"}, "is not in"),
        ({"image": ["a.png", "a.png"]}, "image is not one path"),
        ({"image": None}, "must stand nowhere"),
        ({"conversations": [ASKED_2, TOLD]}, "must stand once, in the first question"),
        ({"conversations": [ASKED_2, TOLD, ASKED, TOLD]}, "must stand once"),
        ({"conversations": [{"from": "human", "value": "a <image> b"}, TOLD]}, "inside"),
        ({"conversations": [ASKED, ASKED_2, TOLD]}, "do not take turns"),
        ({"conversations": [ASKED]}, "no question with an answer"),
        ({"conversations": "t1"}, "no question with an answer"),
        ({"conversations": [ASKED, {"from": "system", "value": "t1"}]}, "not human's or gpt's"),
        ({"conversations": [ASKED, {"from": "gpt", "value": 3}]}, "not human's or gpt's"),
    ],
)
def test_a_bad_entry_is_refused_by_number_and_name(folder, changes, reason):
    with pytest.raises(PluginError, match=reason) as refused:
        read(folder, [entry(), entry(**changes)])
    assert "entry 1 (id 'x1')" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_link_out_of_the_folder_is_refused(folder):
    (folder / "secret.png").write_bytes((folder / "images" / "a.png").read_bytes())
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    with pytest.raises(PluginError, match="leads out of the image folder"):
        read(folder, [entry(image="link.png")])


@pytest.mark.parametrize(
    ("text", "reason"), [("[{]", "is not JSON"), ('{"a": 1}', "is not a list"), ("[3]", "entry 0")]
)
def test_a_bad_file_is_refused(folder, text, reason):
    with pytest.raises(PluginError, match=reason):
        read(folder, text)


def test_missing_files_are_refused(folder):
    with pytest.raises(PluginError, match="cannot be read"):
        read_samples(folder / "none.json", folder / "images")
    with pytest.raises(PluginError, match="is not a folder"):
        read(folder, [entry()], images="nowhere")
    with pytest.raises(PluginError, match="--images"):
        read(folder, [entry()], images=None)


def test_a_picture_over_the_bound_or_broken_is_refused(folder):
    (sample,) = read(folder, [entry()])
    assert load_image(sample, 200).size == (20, 10)
    with pytest.raises(PluginError, match=r"entry 0 .*20 x 10 pixels, over 199"):
        load_image(sample, 199)
    sample.image.write_bytes(b"not a picture")
    with pytest.raises(PluginError, match=r"entry 0 .*cannot be decoded"):
        load_image(sample)


def test_pictures_are_checked_before_training(folder):
    """Every process looks at its share; the other one sees what follows."""
    for name in ("b", "c", "d"):
        Image.new("RGB", (20, 10), (9, 8, 7)).save(folder / "images" / f"{name}.png")
    text = {"id": "y", "conversations": [ASKED_2, TOLD]}
    samples = read(folder, [*(entry(image=f"{name}.png") for name in "abcd"), text])
    check_pictures(samples, Processes(), "cpu")
    path = samples[2].image
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(PluginError, match=r"entry 2 .*cannot be decoded .*; replace the picture"):
        check_pictures(samples, Processes(), "cpu")
    path.unlink()
    with pytest.raises(PluginError, match=r"entry 2 .*cannot be decoded"):
        check_pictures(samples, Processes(), "cpu")
    Image.new("1", (1 << 14, 1 << 13)).save(path)
    with pytest.raises(PluginError, match=r"entry 2 .*16384 x 8192 pixels, over"):
        check_pictures(samples, Processes(), "cpu")


def test_a_bad_picture_in_one_processs_share_ends_all_of_them(folder):
    class Two(Processes):
        """The second of two, told that the first one found something."""

        def sum(self, value):
            return value + 1

    samples = read(folder, [entry(), entry()])
    with pytest.raises(PluginError, match="another process found a picture"):
        check_pictures(samples, Two(1, 2), "cpu")
    samples[0].image.write_bytes(b"not a picture")
    with pytest.raises(PluginError, match=r"entry 1 .*cannot be decoded"):
        check_pictures(samples, Two(1, 2), "cpu")


def test_held_out_samples_are_chosen_by_the_seed(folder):
    samples = read(folder, [entry(id=str(i)) for i in range(10)])
    trained, held_out = split_samples(samples, 3, 5)
    assert sorted(s.where for s in trained + held_out) == sorted(s.where for s in samples)
    assert split_samples(samples, 3, 5)[1] == held_out != split_samples(samples, 3, 6)[1]
    with pytest.raises(PluginError, match="10 of 10 samples leave none"):
        split_samples(samples, 10, 0)


@pytest.fixture(scope="module")
def collator():
    from transformers import AutoProcessor

    return Collator(AutoProcessor.from_pretrained(tiny_llava()), IMAGE_TOKEN, 64)


def test_answers_and_images_are_marked_token_by_token(folder, collator):
    turns = [ASKED, TOLD, ASKED_2, {"from": "gpt", "value": "t12"}]
    text = {"id": "y", "conversations": [ASKED_2, TOLD]}
    batch = collator(read(folder, [entry(conversations=turns), text]))
    pictured = [IMAGE_TOKEN] * PATCHES + [7, 8, 9, 10, 11, 5, 12, 2]
    assert batch.input_ids[0].tolist() == pictured
    assert batch.input_ids[1, :5].tolist() == [5, 9, 10, 11, 2]
    assert batch.attention_mask.sum(1).tolist() == [len(pictured), 5]
    # The last answer includes the end that the template left out.
    marked = [batch.input_ids[i][batch.answer_mask[i]].tolist() for i in range(2)]
    assert marked == [[9, 10, 11, 12, 2], [9, 10, 11, 2]]
    assert batch.image_mask.sum(1).tolist() == [PATCHES, 0]
    assert batch.prompt_lengths.tolist() == [PATCHES + 2, 1]
    assert batch.image_seeds[0] != 0 and batch.image_seeds[1] == 0
    assert batch.pixels["pixel_values"].shape == (1, 3, 56, 56)


def test_the_mask_is_what_the_chat_template_puts_between_prompt_and_prompt(folder, collator):
    """The other way round: tokenising each prefix alone gives the same borders."""
    samples = read_samples(write_samples(folder, 6, 0), folder / "images")
    for sample in samples:
        batch = collator([sample])
        words = [PATCHES]
        for turn in sample.turns:
            words += [len(turn.question.split()), len(turn.answer.split())]
        words[-1] += 1
        expected = np.repeat([False, False, *[True, False] * 4][: len(words)], words)
        assert batch.answer_mask[0].tolist() == expected.tolist()


def test_too_long_a_sample_is_cut_and_counted(folder, collator):
    from dataclasses import replace

    (sample,) = read(folder, [entry()])
    long = replace(sample, turns=(Turn("t7", "t9 " * 80),))
    batch = collator([long, sample])
    assert batch.input_ids.shape == (2, 64) and batch.cut == 1
    short = Collator(collator._processor, IMAGE_TOKEN, 10)
    with pytest.raises(PluginError, match=r"entry 0 .*does not fit into 10 tokens"):
        short([sample])


def test_a_picture_alone_determines_its_seed(folder, collator):
    (sample,) = read(folder, [entry()])
    again, other = folder / "images" / "b.png", folder / "images" / "c.png"
    Image.open(sample.image).save(again)
    Image.new("RGB", (20, 10), (9, 8, 6)).save(other)
    names = read(folder, [entry(image=name) for name in ("a.png", "b.png", "c.png")])
    seeds = collator(names).image_seeds.tolist()
    assert seeds[0] == seeds[1] != seeds[2]


def order(count=53, size=4, ranks=1, seed=3) -> Order:
    letters = tuple(np.random.default_rng(0).integers(1, 1000, count).tolist())
    return Order(letters, size, seed, ranks)


def test_an_epoch_has_every_sample_and_is_another_each_time():
    first, second = order().epoch(0), order().epoch(1)
    flat = np.concatenate(first)
    assert set(flat) == set(range(53)) and len(flat) == 56
    assert not np.array_equal(flat, np.concatenate(second))
    assert np.array_equal(flat, np.concatenate(order().epoch(0)))


def test_batches_hold_samples_of_like_length():
    plan = order(400)
    spread = np.mean([np.ptp(np.asarray(plan.letters)[b]) for b in plan.epoch(0)])
    assert spread < 50


def test_a_run_may_stop_anywhere_and_go_on():
    plan = order()
    begun = plan.follow(0)
    whole = [next(begun).tolist() for _ in range(40)]
    for start in (0, 1, 13, 14, 15, 29):
        resumed = plan.follow(start)
        assert [next(resumed).tolist() for _ in range(40 - start)] == whole[start:]


def test_ranks_share_what_one_process_would_see():
    alone, shared = order(size=4).follow(0), order(size=4, ranks=2)
    ranks = [shared.follow(0, rank) for rank in range(2)]
    assert shared.epoch_batches() % 2 == 0
    for _ in range(shared.epoch_batches() // 2):
        for rank in ranks:
            assert next(rank).tolist() == next(alone).tolist()

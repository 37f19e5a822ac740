"""The drafter's layer against transformers, its chains against the plain reference, its files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.specvlm_models import IMAGE, drafter, make_batch, pixels, target, words
from vllm_plugins.errors import PluginError
from vllm_plugins.spec_decode.specvlm.acceptance import (
    Answered,
    accepted_lengths,
    draft_tokens,
    rounds,
)
from vllm_plugins.spec_decode.specvlm.chain import link_mask
from vllm_plugins.spec_decode.specvlm.checkpoint import load_drafter, save_drafter
from vllm_plugins.spec_decode.specvlm.drafter import DecoderLayer, DrafterShape, frequencies
from vllm_plugins.spec_decode.specvlm.reference import image_spans, reference_draft
from vllm_plugins.spec_decode.specvlm.settings import OPERATORS

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def text_config(kind: str, **changes):
    from transformers import LlamaConfig, Qwen2Config

    shape = {
        "vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6,
        "num_key_value_heads": 2, "num_hidden_layers": 1,
    }  # fmt: skip
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](**shape | changes)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"head_dim": 16}),
        ("llama", {"attention_bias": True}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("qwen2", {}),
    ],
)
def test_the_layer_is_transformers_own(kind, changes):
    """Same parameter names, same result, at positions with a gap in them."""
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    config = text_config(kind, **changes)
    config._attn_implementation = "eager"
    layer_class, rotary_class = {
        "llama": (llama.LlamaDecoderLayer, llama.LlamaRotaryEmbedding),
        "qwen2": (qwen2.Qwen2DecoderLayer, qwen2.Qwen2RotaryEmbedding),
    }[kind]
    torch.manual_seed(0)
    theirs, ours = layer_class(config, 0), DecoderLayer(DrafterShape.of_target(config))
    ours.load_state_dict(theirs.state_dict())
    rows = torch.randn(2, 9, 48)
    positions = torch.tensor([[0, 1, 2, 7, 8, 9, 40, 41, 42]]).expand(2, -1)
    mask = torch.full((9, 9), -torch.inf).triu(1).expand(2, 1, -1, -1)
    embedded = rotary_class(config)(rows, positions)
    expected = theirs(rows, mask, positions, position_embeddings=embedded)
    assert torch.allclose(ours(rows, positions)[0], expected, atol=1e-5)


def test_llama3_frequencies_are_transformers_own():
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = text_config("llama", rope_parameters=LLAMA3)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert torch.allclose(frequencies(DrafterShape.of_target(config)), expected, rtol=1e-5)


def test_other_language_models_are_refused():
    from transformers import GPT2Config

    with pytest.raises(PluginError, match="target: is a gpt2; only llama and qwen2"):
        DrafterShape.of_target(GPT2Config())
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    with pytest.raises(PluginError, match="has mrope positions"):
        DrafterShape.of_target(text_config("qwen2", rope_parameters=rope))


def test_a_link_sees_the_rows_before_its_chain_and_the_chain():
    mask = link_mask(5, 2, torch.device("cpu"))
    seen = {tuple(key) for key in mask.nonzero().tolist() if key[0] == 4}
    # Row 4 ends the chain from row 2: rows 0 to 2, row 3 of step 1, itself of step 2.
    assert seen == {(4, 0), (4, 1), (4, 2), (4, 5 + 3), (4, 10 + 4)}


PROMPTS = [
    [1, *IMAGE, *words(5)],
    [*IMAGE, *words(3)],
    [1, 5, 6, *IMAGE, *words(2, 1), *IMAGE, *words(4, 2)],
    [1, *words(9)],
]


@pytest.mark.parametrize("mode", ["off", "select", "weighted", "concat"])
@pytest.mark.parametrize("prompt", range(len(PROMPTS)))
def test_chains_from_every_row_are_the_reference_from_each(mode, prompt):
    """All chains in a few passes agree with one chain at a time that recomputes everything."""
    model, steps = drafter(mode=mode), 3
    tokens = torch.tensor(PROMPTS[prompt] + words(6, 9))
    images = pixels(len(image_spans(tokens == 3)))
    length = len(PROMPTS[prompt])
    for end in range(length + 1, len(tokens)):
        rows = target()(tokens[None], None, images)
        drafts, choice = draft_tokens(model, target(), Answered(tokens, length, rows, 0), steps)
        expected = reference_draft_at(model, tokens[:end], length, images, steps, choice)
        assert drafts[:, end - 2].tolist()[: len(tokens) - end] == expected[: len(tokens) - end]


def test_an_answer_shorter_than_a_chain_is_drafted_too():
    tokens, length = torch.tensor(PROMPTS[3] + words(3, 9)), len(PROMPTS[3])
    answered = Answered(tokens, length, target()(tokens[None], None, {}), 0)
    long, short = (draft_tokens(drafter(), target(), answered, n)[0] for n in (7, 2))
    assert torch.equal(long[:2], short) and not long[3:].any()


def reference_draft_at(model, tokens, length, images, steps, choice):
    """The reference for a prompt whose last token is forced, by one row after another."""
    from vllm_plugins.spec_decode.specvlm.compact import compact, draft_span

    rows = target()(tokens[None], None, images)
    spans = image_spans(tokens == 3)
    weights = model.decide(rows.features[0], length, spans[-1][1])[1] if spans else None
    fused = model.fuse(rows.embeddings[:, 1:], rows.features[:, :-1])[0]
    made = compact(
        fused, [draft_span(*s) for s in spans], choice, model.compressor, [0] * len(spans), weights
    )
    state, positions, drafts = made.rows[None], made.positions[None], []
    for _ in range(steps):
        predicted = model(state, positions)[0][:, -1:]
        drafts.append(int(target().head(predicted)[0, 0].argmax()))
        token = target().embed(torch.tensor([[drafts[-1]]]))
        state = torch.cat([state, model.fuse(token, predicted)], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    return drafts


@pytest.mark.parametrize("choice", [None, *OPERATORS, "weighted", "concat"])
def test_the_reference_drafts_what_training_predicts(choice):
    """The first draft is the teacher-forced output at the prompt's last row."""
    mode = choice if choice in ("weighted", "concat") else "select"
    model, prompt = drafter(mode=mode), torch.tensor(PROMPTS[0])
    images = pixels(1)
    logits = reference_draft(model, target(), prompt, images, 2, choice, contents=[1])
    assert logits.shape == (2, 64) and torch.isfinite(logits).all()
    first = int(target().head(target()(prompt[None], None, images).features[0, -1]).argmax())
    batch = make_batch([PROMPTS[0]], [[first, 9, 9]])
    rows = target()(batch.input_ids, None, batch.pixels)
    answered = Answered(batch.input_ids[0], len(prompt), rows, 1)
    if choice is None or choice in ("weighted", "concat"):
        drafts, _ = draft_tokens(model, target(), answered, 1)
        assert int(drafts[0, len(prompt) - 1]) == int(logits[0].argmax())


def test_an_operator_changes_the_drafts():
    model, images = drafter(), pixels(1)
    made = [
        reference_draft(model, target(), torch.tensor(PROMPTS[0]), images, 2, choice)
        for choice in OPERATORS
    ]
    pairs = [(a, b) for a in range(5) for b in range(a)]
    assert all(not torch.allclose(made[a], made[b], atol=1e-4) for a, b in pairs)


def test_accepted_is_the_prefix_that_holds():
    tokens = torch.tensor([10, 11, 12, 13, 14, 15])
    drafts = torch.tensor([[12, 0, 14, 15, 9, 9], [13, 14, 0, 9, 9, 9], [14, 15, 9, 9, 9, 9]])
    # Row 1 is wrong at once; rows 4 and 5 have nothing left to draft.
    assert accepted_lengths(tokens, drafts).tolist() == [3, 0, 1, 1, 0, 0]


def test_rounds_play_decoding():
    # Answer tokens 4 to 9; token 4 comes free. The chain at row 3, after token 4, holds two: 5, 6
    # and the target's own 7. The one at row 6 holds none: 8. At row 7 it holds three: 9 is left.
    accepted = [0, 0, 0, 2, 9, 9, 0, 3, 0, 0]
    assert rounds(accepted, 4) == (5, 3)
    assert rounds([0] * 10, 4) == (5, 5)


def test_a_drafter_comes_back_from_its_folder(tmp_path):
    model = drafter(torch.float32, seed=7)
    save_drafter(tmp_path, model, target(torch.float32).text_config, torch.float32)
    again = load_drafter(tmp_path)
    assert again.settings == model.settings and again.shape == model.shape
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["EagleSpecVLMLlamaForCausalLM"]
    assert config["num_hidden_layers"] == 1 and config["eos_token_id"] == 2
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"fc", "layers", "compressor", "gate"}
    assert "layers.0.self_attn.q_proj.weight" in names and "embed_tokens.weight" not in names


def test_transformers_reads_the_config(tmp_path):
    from transformers import AutoConfig

    model = drafter(torch.float32)
    save_drafter(tmp_path, model, target(torch.float32).text_config, torch.float16)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.num_hidden_layers == 1 and config.specvlm["mode"] == "select"
    assert config.dtype == torch.float16


def write_drafter(folder):
    text = target(torch.float32).text_config
    save_drafter(folder, drafter(torch.float32), text, torch.float32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(architectures=["LlamaForCausalLM"]), "is not a SpecVLM drafter's"),
        (lambda c: c.update(model_type="gpt2"), "is not a SpecVLM drafter's"),
        (lambda c: c.pop("specvlm"), "has no block 'specvlm'"),
        (lambda c: c["specvlm"].update(mode="best"), r"specvlm\.mode: Input should be 'off'"),
        (lambda c: c["specvlm"].update(conv_ratio=6), r"specvlm\.conv_ratio"),
        (lambda c: c["specvlm"].update(format=2), r"specvlm\.format"),
        (lambda c: c["specvlm"].update(extra=1), r"specvlm\.extra"),
        (lambda c: c.pop("head_dim"), "lacks 'head_dim'"),
        (lambda c: c.update(hidden_size=64), "has shape"),
        (lambda c: c.update(hidden_size=1 << 20), "has shape"),
        (lambda c: c.update(hidden_size=1 << 40), "cannot be read"),
        (lambda c: c.update(num_attention_heads="4"), "cannot be read"),
        (lambda c: c["specvlm"].update(queries=5), r"resampler\.queries has shape"),
    ],
)
def test_a_folder_that_does_not_fit_together_is_refused(tmp_path, change, reason):
    write_drafter(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(PluginError, match=reason) as refused:
        load_drafter(tmp_path)
    assert "\n" not in str(refused.value)


def test_weights_that_are_missing_or_broken_are_refused(tmp_path):
    write_drafter(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if k != "fc.weight"}, path)
    with pytest.raises(PluginError, match=r"fc\.weight has shape None"):
        load_drafter(tmp_path)
    path.write_bytes(b"\x00" * 4)
    with pytest.raises(PluginError, match="cannot be read"):
        load_drafter(tmp_path)
    path.unlink()
    with pytest.raises(PluginError, match="cannot be read"):
        load_drafter(tmp_path)

"""The scenes model: a LLaVA of a CLIP tower, a projector and a Llama, and its folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scenes_data import ID, VOCABULARY
from scenes_draw import IMAGE
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

PATCH = 8
PATCHES = (IMAGE // PATCH) ** 2
"""Image tokens: 256."""
MAX_POSITIONS = 2048
HEAD = 32
"""Head size; vLLM's CPU attention takes it."""
TOWER_WIDTH, TOWER_LAYERS = 128, 4
_POSITION_SCALE = 0.2
# Standard deviation of the Llama's first weights; the usual 0.02 is for far wider models.
_SPREAD = 0.06
PAD, BOS, EOS, IMAGE_TOKEN, UNKNOWN = range(5)
# How transformers and vLLM name the tower's parameters.
_TOWER_NAMES = ("vision_tower.", "vision_tower.vision_model.")
_CHAT_TEMPLATE = (
    "{{ '<s> ' }}{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% else %}{{ '<image> ' }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s> ' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Shape:
    """Size of the language model; the committed fixture has the defaults.

    Attributes:
        layers: of the Llama.
        hidden: width of the Llama, a multiple of 64: two heads of 32 share a KV head.
    """

    layers: int = 6
    hidden: int = 128

    def __post_init__(self) -> None:
        if self.hidden % (2 * HEAD):
            raise ValueError(f"a hidden size of {self.hidden} is no multiple of {2 * HEAD}")


def make_model(shape: Shape) -> LlavaForConditionalGeneration:
    """Return an untrained model; it is drawn from torch's generator."""
    vision = CLIPVisionConfig(
        hidden_size=TOWER_WIDTH,
        intermediate_size=2 * TOWER_WIDTH,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=TOWER_WIDTH // HEAD,
        image_size=IMAGE,
        patch_size=PATCH,
        projection_dim=TOWER_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=shape.hidden,
        intermediate_size=2 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // HEAD,
        num_key_value_heads=shape.hidden // HEAD // 2,
        max_position_embeddings=MAX_POSITIONS,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
        initializer_range=_SPREAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    model = LlavaForConditionalGeneration(config)
    _lay_out_positions(model.model.vision_tower.embeddings.position_embedding.weight)
    return model


@torch.no_grad()
def _lay_out_positions(weight: torch.Tensor) -> None:
    """Start the tower's positions as waves over rows and columns, so that neighbours are alike.

    From random ones it has to learn first which patches lie beside one another.

    Args:
        weight: [1 + PATCHES, width]; the first row is that of the class token.
    """
    side, waves = IMAGE // PATCH, weight.shape[1] // 4
    lengths = 2 * side * torch.logspace(0, -1, waves)
    phase = 2 * math.pi * torch.arange(side)[:, None] / lengths
    wave = torch.cat([phase.sin(), phase.cos()], dim=1)
    rows = wave[:, None].expand(-1, side, -1)
    columns = wave[None].expand(side, -1, -1)
    weight[1:] = _POSITION_SCALE * torch.cat([rows, columns], dim=-1).flatten(0, 1)


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write config, float16 weights under vLLM's names, and the processor."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    old, new = _TOWER_NAMES
    weights = {
        name.replace(old, new) if new not in name else name: tensor.to(torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    make_processor().save_pretrained(folder)


def load(folder: Path) -> LlavaForConditionalGeneration:
    """Return the model in a folder, in float32, for evaluation."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def make_processor() -> Any:
    """Return a `LlavaProcessor` whose image token becomes `PATCHES` tokens."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    side = {"height": IMAGE, "width": IMAGE}
    pixels = CLIPImageProcessor(
        size=side,
        crop_size=side,
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT_TEMPLATE,
    )


def _tokenizer() -> Any:
    """One token a word; case is ignored and a question mark need not stand apart."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        model_max_length=MAX_POSITIONS,
        chat_template=_CHAT_TEMPLATE,
    )


def normed(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 pixels [..., 3, height, width] as the processor gives them to the tower."""
    return images.float() / 127.5 - 1

"""Tiny random vision-language models: a LLaVA, and Qwen-VLs, whose positions are M-RoPE's.

    python examples/models/vision.py

makes the LLaVA and prints its folder. Weights are random, so any wrong, missing or misplaced
embedding changes the tokens.
"""

from pathlib import Path
from typing import Any

from build_once import CACHE, build_once

IMAGE_TOKEN = 3
PIXELS = 56
PATCHES = 16
"""Embeddings of one LLaVA image of 56 by 56 pixels, in patches of 14."""
WIDTH = 128
VOCAB = 64
FORMAT = 1


def tiny_llava(
    width: int = WIDTH,
    layers: int = 2,
    positions: int = 1024,
    pixels: int = PIXELS,
    decoder: str = "llama",
) -> Path:
    """Return a tiny random LLaVA; word `t7` is token 7 and an image is token `IMAGE_TOKEN`.

    Args:
        width: Of the language model's hidden state.
        layers: Of the language model.
        positions: Longest prompt and answer, in tokens.
        pixels: Height and width of an image, which has an embedding for each 14 by 14 of them.
        decoder: Kind of the language model, "llama" or "qwen2".
    """
    shape: dict[str, Any] = {"width": width, "layers": layers, "positions": positions}
    name = f"tiny-llava-{width}-{layers}-{positions}"
    if pixels != PIXELS:
        shape["pixels"], name = pixels, f"{name}-{pixels}"
    if decoder != "llama":
        shape["decoder"], name = decoder, f"{name}-{decoder}"
    return build_once(
        CACHE / name, {"format": FORMAT, **shape}, lambda folder: _build_llava(folder, **shape)
    )


def tiny_qwen_vl(family: str = "qwen2_vl", layers: int = 2, vocab: int = VOCAB) -> Path:
    """Return a tiny random Qwen-VL, whose consumers accept images as metadata alone.

    Args:
        family: One of `QWEN_FAMILIES`.
        layers: Of the language model.
        vocab: Token ids; word `t7` is token 7, and 3 to 6 stand for parts of images and videos.
    """
    shape: dict[str, Any] = {"family": family, "layers": layers, "vocab": vocab}
    return build_once(
        CACHE / f"tiny-{family.replace('_', '-')}-{layers}-{vocab}",
        {"format": FORMAT, **shape},
        lambda folder: _build_qwen_vl(folder, **shape),
    )


def _build_llava(
    folder: Path,
    width: int,
    layers: int,
    positions: int,
    pixels: int = PIXELS,
    decoder: str = "llama",
) -> None:
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2Config
    from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=pixels,
        patch_size=14,
        projection_dim=96,
    )
    text = (LlamaConfig if decoder == "llama" else Qwen2Config)(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    _spread(model)
    config.save_pretrained(folder)
    # vLLM expects the tower under the name that transformers has since dropped.
    _save(model, folder, ("vision_tower.", "vision_tower.vision_model."))
    tokenizer = _tokenizer({"<image>": IMAGE_TOKEN})
    tokenizer.save_pretrained(folder)
    _save_llava_processor(tokenizer, folder, pixels)


def _save_llava_processor(tokenizer: Any, folder: Path, size: int) -> None:
    from transformers import CLIPImageProcessor, LlavaProcessor

    pixels = CLIPImageProcessor(
        size={"height": size, "width": size},
        crop_size={"height": size, "width": size},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor = LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)


QWEN_IMAGE, QWEN_START, QWEN_END, QWEN_VIDEO = 3, 4, 5, 6


# Beside what all share: the tower, and how sections of a key are rotated by time, height and width.
QWEN_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "name": "Qwen2VL",
        "rope": {"rope_type": "default", "mrope_section": [4, 6, 6]},
        "tower": {"embed_dim": 64, "hidden_size": WIDTH},
    },
    "qwen2_5_vl": {
        "name": "Qwen2_5_VL",
        "rope": {"rope_type": "default", "mrope_section": [4, 6, 6]},
        "tower": {"hidden_size": 64, "out_hidden_size": WIDTH, "intermediate_size": 128},
    },
    "qwen3_vl": {
        "name": "Qwen3VL",
        "rope": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        "tower": {
            "hidden_size": 64,
            "out_hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
    },
}


def _build_qwen_vl(folder: Path, family: str, layers: int, vocab: int) -> None:
    import torch
    import transformers

    described = QWEN_FAMILIES[family]
    name = described["name"]
    config = getattr(transformers, f"{name}Config")(
        text_config={
            "vocab_size": vocab,
            "hidden_size": WIDTH,
            "intermediate_size": 256,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": WIDTH // 4,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_theta": 10000.0, **described["rope"]},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config={"depth": 2, "num_heads": 2, **described["tower"]},
        image_token_id=QWEN_IMAGE,
        vision_start_token_id=QWEN_START,
        vision_end_token_id=QWEN_END,
        video_token_id=QWEN_VIDEO,
    )
    config.architectures = [f"{name}ForConditionalGeneration"]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    _spread(model)
    config.save_pretrained(folder)
    _save(model, folder)
    names = {
        "<|image_pad|>": QWEN_IMAGE,
        "<|vision_start|>": QWEN_START,
        "<|vision_end|>": QWEN_END,
        "<|video_pad|>": QWEN_VIDEO,
    }
    tokenizer = _tokenizer(names, vocab)
    tokenizer.save_pretrained(folder)
    _save_qwen_processor(folder, name, tokenizer, model.config.vision_config.patch_size)


def _save_qwen_processor(folder: Path, name: str, tokenizer: Any, patch_size: int) -> None:
    import transformers

    pixels = {"min_pixels": 56 * 56, "max_pixels": 112 * 112, "patch_size": patch_size}
    images = transformers.Qwen2VLImageProcessor(**pixels)
    videos_of = "Qwen3VLVideoProcessor" if name == "Qwen3VL" else "Qwen2VLVideoProcessor"
    videos = getattr(transformers, videos_of)(patch_size=patch_size)
    processor = getattr(transformers, f"{name}Processor")(
        image_processor=images, tokenizer=tokenizer, video_processor=videos
    )
    processor.save_pretrained(folder)


def _spread(model: Any) -> None:
    """Make weights so large that images matter to the tokens."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)


def _save(model: Any, folder: Path, rename: tuple[str, str] = ("", "")) -> None:
    from safetensors.torch import save_file

    old, new = rename
    tensors = {}
    for name, tensor in model.state_dict().items():
        renamed = name
        if old and old in name and new not in name:
            renamed = name.replace(old, new)
        tensors[renamed] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tokenizer(special: dict[str, int], vocab: int = VOCAB) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | special
    words |= {f"t{i}": i for i in range(vocab) if i not in words.values()}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}"
        "{% else %}" + _image_words(special) + "{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(special),
        chat_template=template,
    )


def _image_words(special: dict[str, int]) -> str:
    if "<image>" in special:
        return "<image> "
    return "<|vision_start|> <|image_pad|> <|vision_end|> "


if __name__ == "__main__":
    print(tiny_llava())

"""Tiny random models that see images, with their tokenizers and image processors, made on the spot."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image

from headstart.models.images import load_processor, with_reader
from small_tokenizers import word_tokenizer

WORDS = ("user", "assistant", "what", "is", "in", "two", "the", "grid", "red", "blue", "green", "left", "right", "one")
TURNS = (
    "{{% for m in messages %}}{{{{ '<start> ' + m.role + ' ' }}}}{{% for p in m.content %}}{{% if p.type == 'image' %}}"
    "{image}{{% else %}}{{{{ p.text + ' ' }}}}{{% endif %}}{{% endfor %}}{{{{ '<end> ' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<start> assistant ' }}}}{{% endif %}}"
)
SPECIAL = {
    "qwen2_5_vl": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    "idefics3": ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<row_1_col_1>"),
    "gemma3": ("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
}
IMAGE = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "idefics3": "<image>",
    "gemma3": "<start_of_image>",
}
TEXT: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = tuple(SPECIAL)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """An image of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.frombytes("RGB", (width, height), pixels.numpy().tobytes())


def png(width: int, height: int, seed: int = 0) -> bytes:
    picture(width, height, seed).save(file := io.BytesIO(), "png")
    return file.getvalue()


def image_tokenizer(family: str, words: Sequence[str] = WORDS) -> Any:
    special = ("<start>", "<end>", *SPECIAL[family])
    template = TURNS.format(image=IMAGE[family])
    tokenizer = word_tokenizer(words, special=special, template=template, pad_token="<unk>", eos_token="<eos>")
    if family == "gemma3":
        names = dict(zip(("boi_token", "eoi_token", "image_token"), SPECIAL[family], strict=True))
        tokenizer = hf.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            model_specific_special_tokens=names,
            chat_template=template,
            pad_token="<unk>",
            eos_token="<eos>",
            bos_token="<bos>",
            unk_token="<unk>",
        )
    return tokenizer


def _model(family: str, tokenizer: Any) -> Any:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL[family]}
    text = {**TEXT, "vocab_size": len(tokenizer), "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    if family == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
        config: Any = hf.Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 4}
            | {"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
            **dict(zip(names, ids.values(), strict=True)),
        )
        return hf.Qwen2_5_VLForConditionalGeneration(config)
    if family == "idefics3":
        config = hf.Idefics3Config(
            text_config={**text, "model_type": "llama"},
            vision_config={**vision, "image_size": 16, "patch_size": 4},
            image_token_id=ids["<image>"],
            scale_factor=2,
            pad_token_id=0,
        )
        return hf.Idefics3ForConditionalGeneration(config)
    config = hf.Gemma3Config(
        text_config={**text, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
        | {"layer_types": ["sliding_attention", "full_attention"]},
        vision_config={**vision, "image_size": 16, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_id=ids["<image_soft_token>"],
        boi_token_id=ids["<start_of_image>"],
        eoi_token_id=ids["<end_of_image>"],
    )
    return hf.Gemma3ForConditionalGeneration(config)


def _image_processor(family: str) -> Any:
    if family == "qwen2_5_vl":
        return hf.Qwen2VLImageProcessorPil(patch_size=4, size={"shortest_edge": 64, "longest_edge": 64 * 24})
    if family == "idefics3":
        return hf.Idefics3ImageProcessorPil(
            size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False
        )
    return hf.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})


def save_image_model(
    folder: Path, family: str, seed: int = 0, words: Sequence[str] = WORDS, dtype: torch.dtype = torch.float32
) -> Path:
    """A checkpoint of `family` as it would come from the hub."""
    torch.manual_seed(seed)
    tokenizer = image_tokenizer(family, words)
    model = _model(family, tokenizer).to(dtype).eval()
    for parameter in model.parameters():  # small weights make all logits alike, and Gemma's projection is 0
        parameter.data.mul_(3).add_(0.1 * torch.randn_like(parameter) * (parameter.abs().max() == 0))
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _image_processor(family).save_pretrained(folder)
    extra = {"idefics3": {"image_seq_len": 4}, "gemma3": {"image_seq_length": 4}}.get(family, {})
    named = {"qwen2_5_vl": "Qwen2_5_VLProcessor", "idefics3": "Idefics3Processor", "gemma3": "Gemma3Processor"}
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": named[family], **extra}))
    return folder


def reading_tokenizer(folder: Path) -> Any:
    """Its tokenizer, which carries the processor."""
    return with_reader(load_processor(str(folder)))

"""Images on their way into a model: processors, and what one makes of a prompt's text and images.

A tokenizer that belongs to a processor carries it (`reader_of`), so that whoever renders prompts shows images as well.
"""

from __future__ import annotations

import hashlib
import io
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

from headstart.errors import DataError, ModelError, TemplateError, first_line
from headstart.pictures import Picture

KEPT = 2**30
"""Bytes of pixel values that stay in memory for each model; older ones are processed again when they are needed."""
_NAME = "headstart_reader"


class Reader:
    """A model's processor: it turns text with placeholders, and images, into token ids and pixel values.

    What it makes of the same images is kept once, however many prompts and samples show them.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._pixels: OrderedDict[str, Mapping[str, Tensor]] = OrderedDict()
        self._bytes = 0

    @cached_property
    def settings(self) -> str:
        """What its pixel values depend on, as text."""
        images = self.processor.image_processor
        return f"{type(self.processor).__name__} {type(images).__name__} {images.to_json_string()}"

    @property
    def placeholders(self) -> frozenset[int]:
        """Ids that stand for an image, a video or a sound, and are never text."""
        ids = (getattr(self.processor, f"{kind}_token_id", None) for kind in ("image", "video", "audio"))
        return frozenset(int(i) for i in ids if i is not None)

    def read(self, text: str, pictures: Sequence[Picture], problem: str) -> tuple[tuple[int, ...], Shown]:
        """Token ids of rendered `text` with the images at its placeholders, and what else the model is shown.

        Raises DataError for an image that cannot be read, TemplateError where text and images do not fit together.
        """
        made = self._processed(text, pictures, problem)
        ids: Tensor = made["input_ids"]
        kinds = {name: x[0] for name, x in made.items() if "token_type" in name and x.shape == ids.shape}
        pixels = {n: x for n, x in made.items() if n not in kinds and n not in ("input_ids", "attention_mask")}
        key = hashlib.sha256(" ".join([self.settings, *(p.sha256 for p in pictures)]).encode()).hexdigest()[:16]
        self._keep(key, pixels)
        numbers = made["pixel_values"].numel() if "pixel_values" in made else 0
        return tuple(ids[0].tolist()), Shown(key, len(ids[0]), numbers, kinds, self, text, tuple(pictures), problem)

    def pixels(self, shown: Shown) -> Mapping[str, Tensor]:
        """Pixel values and whatever else describes the images, by the names the model takes them under."""
        if shown.key not in self._pixels:
            self.read(shown.text, shown.pictures, shown.problem)
        self._pixels.move_to_end(shown.key)
        return self._pixels[shown.key]

    def _keep(self, key: str, pixels: Mapping[str, Tensor]) -> None:
        if key in self._pixels:
            return
        self._pixels[key] = pixels
        self._bytes += _size(pixels)
        while self._bytes > KEPT and len(self._pixels) > 1:
            self._bytes -= _size(self._pixels.popitem(last=False)[1])

    def _processed(self, text: str, pictures: Sequence[Picture], problem: str) -> Mapping[str, Tensor]:
        images = [_opened(picture, problem) for picture in pictures]
        try:
            made = self.processor(text=[text], images=[images], add_special_tokens=False, return_tensors="pt")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TemplateError(
                f"problem {problem!r}: {type(self.processor).__name__} does not take its {len(images)} images and the "
                f"rendered text together: {first_line(error)}. Check that the chat template has a place for images, "
                "and that the text holds no placeholder of its own"
            ) from error
        return {name: x for name, x in made.items() if isinstance(x, Tensor)}


@dataclass(frozen=True)
class Shown:
    """The images of a prompt as one model is shown them, beside the prompt's first `length` token ids.

    `key` names model settings and images, and alone is compared. `kinds`: what each token is (int64 `[length]`), by the
    names the model takes them under.
    """

    key: str
    length: int = field(compare=False)
    numbers: int = field(compare=False)
    """Pixel values in all."""
    kinds: Mapping[str, Tensor] = field(compare=False, repr=False)
    reader: Reader = field(compare=False, repr=False)
    text: str = field(compare=False, repr=False)
    pictures: tuple[Picture, ...] = field(compare=False, repr=False)
    problem: str = field(compare=False, repr=False)

    @property
    def pixels(self) -> Mapping[str, Tensor]:
        return self.reader.pixels(self)


def with_reader(processor: Any) -> Any:
    """The tokenizer of `processor`, which carries it from now on."""
    tokenizer = processor.tokenizer
    if tokenizer.chat_template is None:
        tokenizer.chat_template = processor.chat_template
    setattr(tokenizer, _NAME, Reader(processor))
    return tokenizer


def as_tokenizer(given: Any) -> Any:
    """A tokenizer as it is; for a processor, its tokenizer, which carries it."""
    return with_reader(given) if hasattr(given, "image_processor") else given


def reader_of(tokenizer: Any) -> Reader | None:
    """The processor that a tokenizer belongs to; None for one of text alone."""
    return getattr(tokenizer, _NAME, None)


def load_processor(path: str, **source: Any) -> Any:
    """The checkpoint's processor. Raises ModelError where the model takes no images, or has no processor."""
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    config = AutoConfig.from_pretrained(path, **source)
    kind = type(config)
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not source.get("trust_remote_code"):
        raise ModelError(
            f"{path}: a {config.model_type} model takes no images, but prompts hold some (image_column, "
            "prompts.images): choose a model of text and images, or remove these settings"
        )
    known = PROCESSOR_MAPPING.get(kind, None)
    videos = known is not None and "video_processor" in known.get_attributes()
    try:
        # Processors of videos need torchvision, and nothing here has videos.
        if known is not None and videos and find_spec("torchvision") is None:
            processor = _stills(known).from_pretrained(path, **source)
        else:
            processor = AutoProcessor.from_pretrained(path, **source)
    except (OSError, ImportError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{path}: there is no processor that turns images into pixel values: {first_line(error)}. The folder needs "
            "preprocessor_config.json or processor_config.json of this model, and some need torchvision"
        ) from error
    if not hasattr(processor, "image_processor"):
        raise ModelError(f"{path}: {type(processor).__name__} reads text alone: the folder has no image processor")
    return processor


def _stills(kind: Any) -> Any:
    """A class of processors without that of videos."""
    names = [name for name in kind.get_attributes() if name != "video_processor"]
    return type(
        kind.__name__, (kind,), {"get_attributes": classmethod(lambda cls: names), "__module__": kind.__module__}
    )


def _opened(picture: Picture, problem: str) -> Any:
    """The image in RGB, turned as its camera says."""
    from PIL import Image, ImageOps

    content = picture.content
    try:
        data = content.read_bytes() if isinstance(content, Path) else content
        if hashlib.sha256(data).hexdigest()[:16] != picture.sha256:
            raise DataError(f"problem {problem!r}: the image {picture.name!r} has changed since it was first read")
        with Image.open(io.BytesIO(data)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"problem {problem!r}: the image {picture.name!r} is none that can be read ({first_line(error)}); convert "
            "it to PNG or JPEG, or remove the row"
        ) from error


def _size(pixels: Mapping[str, Tensor]) -> int:
    return sum(x.nbytes for x in pixels.values())

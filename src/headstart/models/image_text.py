"""A language model that sees: images are encoded apart, each prompt's once, and stand at their placeholders.

Everything goes through the model's own forward, padded and with a plain cache: the fast paths know nothing of images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from headstart.errors import ModelError
from headstart.losses.events import Events
from headstart.models.causal import CausalModel, Sight
from headstart.models.images import Reader, Shown
from headstart.models.lora import unwrap
from headstart.records import Rollout, RolloutBatch

_KINDS = tuple(f"{kind}_token_{name}" for kind in ("image", "video", "audio") for name in ("id", "index"))
_ENCODED = "mm_encoder_outputs"


class ImageTextModel(CausalModel):
    """A Hugging Face model of images and text, cut to `vocabulary` ids, with the processor that it is shown them by."""

    shifts = True

    def __init__(
        self, model: Any, vocabulary: int, pad_id: int, events: Events | None = None, *, reader: Reader
    ) -> None:
        """Raises ModelError where the model does not take images that are encoded apart."""
        super().__init__(model, vocabulary, pad_id, events)
        base = unwrap(model)
        if _ENCODED not in _parameters(self.backbone.forward) or not hasattr(self.backbone, "get_image_features"):
            raise ModelError(
                f"{base.name_or_path}: {type(base).__name__} does not take images that are encoded apart "
                f"({_ENCODED}), in this version of transformers: unsupported"
            )
        self.reader = reader
        named = (getattr(base.config, name, None) for name in _KINDS)
        self.placeholders = reader.placeholders | {int(i) for i in named if i is not None}
        self.never = tuple(sorted(i for i in self.placeholders if i < vocabulary))

    @property
    def language(self) -> Any:
        """The part of the backbone that reads embedded tokens; the others make features of images."""
        embeddings = unwrap(self.model).get_input_embeddings()
        parts = [part for part in self.backbone.children() if isinstance(part, PreTrainedModel)]
        return next((part for part in parts if part.get_input_embeddings() is embeddings), self.backbone)

    def batch(self, rollouts: Sequence[Rollout], view: Literal["student", "teacher"]) -> RolloutBatch:
        """See `CausalModel.batch`; with the images of that view."""
        shown = (r.prompt.images if view == "student" else r.prompt.teacher_images for r in rollouts)
        return replace(super().batch(rollouts, view), images_B=tuple(shown))

    def use_fast_paths(self) -> None:
        """See `CausalModel.use_fast_paths`: none is known to be right with images."""

    def seen(self, images_B: Sequence[Shown | None], ids_BT: Tensor, mask_BT: Tensor) -> Sight:
        """What a forward pass is given for these texts, padded on either side, whose prompts show these images.

        A placeholder that belongs to no image (written, not shown) is fed as padding: it would be given another
        image's features. Features of the same images are made once, with their gradient where it is asked for.
        """
        images_B = images_B or (None,) * len(ids_BT)
        T, device, first_B = ids_BT.shape[1], ids_BT.device, mask_BT.argmax(dim=1)
        length_B = torch.tensor([shown.length if shown else 0 for shown in images_B], device=device)
        place_T = torch.arange(T, device=device)
        own_BT = (place_T >= first_B[:, None]) & (place_T < (first_B + length_B)[:, None])
        strays_BT = torch.isin(ids_BT, torch.tensor(sorted(self.placeholders), device=device)) & ~own_BT
        ids_BT = ids_BT.masked_fill(strays_BT, self.pad_id)
        kinds = {name: torch.zeros_like(ids_BT) for shown in images_B if shown for name in shown.kinds}
        for b, shown in enumerate(images_B):
            for name, kind_P in shown.kinds.items() if shown else ():
                kinds[name][b, own_BT[b]] = kind_P.to(device)
        position_BT, shift_B = self._positions(images_B, ids_BT, mask_BT, own_BT)
        encoded = self._features([shown for shown in images_B if shown])
        return Sight({"input_ids": ids_BT, "position_ids": position_BT, **kinds, **encoded}, shift_B)

    def _positions(
        self, images_B: Sequence[Shown | None], ids_BT: Tensor, mask_BT: Tensor, own_BT: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Positions `[B, T]`, or `[3, B, T]` where tokens of an image have rows and columns (M-RoPE), and by how much
        those of the text behind the images differ from its places, `[B]`."""
        position_BT = (mask_BT.cumsum(dim=1) - 1).clamp_min(0)
        shift_B = torch.zeros_like(position_BT[:, 0])
        rotary = getattr(self.backbone, "get_rope_index", None)
        if rotary is None or not any(images_B):
            return position_BT, shift_B
        position_3BT, made = position_BT.repeat(3, 1, 1), dict[int, tuple[Tensor, Tensor]]()
        for b, shown in enumerate(images_B):
            if shown is None:
                continue
            if id(shown) not in made:
                given = {"input_ids": ids_BT[b, own_BT[b]][None], **{n: k[None] for n, k in shown.kinds.items()}}
                position_31P, delta = rotary(**self._taken(rotary, given | dict(shown.pixels)))
                made[id(shown)] = position_31P[:, 0], delta.flatten()[0]
            position_3P, shift_B[b] = made[id(shown)]
            position_3BT[:, b] += shift_B[b]
            position_3BT[:, b, own_BT[b]] = position_3P
        return position_3BT, shift_B

    def _features(self, shown: Sequence[Shown]) -> dict[str, Any]:
        """The images of all rows, in their order, as the model's forward takes them."""
        if not shown:
            return {}
        encode = self.backbone.get_image_features
        distinct = {s.key: s for s in shown}
        made = {key: encode(**self._taken(encode, s.pixels), return_dict=True) for key, s in distinct.items()}
        rows = [made[s.key] for s in shown]
        joined: dict[str, Any] = {"pooler_output": _joined([row.pooler_output for row in rows])}
        if layers := getattr(rows[0], "deepstack_features", None):
            joined["deepstack_features"] = [
                _joined([row.deepstack_features[i] for row in rows]) for i in range(len(layers))
            ]
        return {_ENCODED: {"image": type(rows[0])(**joined)}}

    def _taken(self, function: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those inputs that `function` has a name for, on this model's device."""
        names = _parameters(function)
        return {name: x.to(self.device) for name, x in inputs.items() if name in names}


def _joined(parts: Sequence[Any]) -> Any:
    """Features of several prompts: a tensor for all images, or one for each."""
    if isinstance(parts[0], Tensor):
        return torch.cat([*parts])
    return [feature for part in parts for feature in part]


def _parameters(function: Any) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], signature(function).parameters)

"""A causal language model taken apart: hidden states of completion positions, and the head that reads them.

The head is applied to completion positions only, to as many rows at a time as the caller asks for, and cut to the
shared vocabulary here and nowhere else.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from headstart.errors import ModelError, first_line
from headstart.losses.chunked import Head, default_chunk, read_logprobs
from headstart.losses.events import Events
from headstart.losses.products import FEW, few, linear, packed
from headstart.models.collate import collate
from headstart.models.decoder import FastDecoder, Prefill
from headstart.models.lora import unwrap
from headstart.models.packed import ATTENTION, pack, pack_prompts, packed_hidden
from headstart.models.stepper import Stepper
from headstart.ranks.sharding import division_of, is_sharded
from headstart.records import Packing, Prompt, Rollout, RolloutBatch

FULL, SLIDING = "full_attention", "sliding_attention"
FAILURES = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError)
"""What models raise that are not given what they expect."""


@dataclass(frozen=True, slots=True)
class Sight:
    """What a forward pass over texts with images is given in place of plain ids and positions; `shift_B` is added to
    the positions of later tokens, because tokens of an image may share theirs."""

    inputs: Mapping[str, Any]
    shift_B: Tensor


class CausalModel:
    """A Hugging Face causal language model (peft-wrapped or not) cut to `vocabulary` ids.

    `check_head` proves at load time that backbone plus head give the model's own logits, so that an architecture with
    an unusual head is refused rather than trained wrongly.
    """

    never: tuple[int, ...] = ()
    """Ids that are never sampled: they stand for images."""
    shifts: bool = False
    """Whether tokens may have other positions than their places, as those behind an image."""

    def __init__(self, model: Any, vocabulary: int, pad_id: int, events: Events | None = None) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.pad_id = pad_id
        self.events = None if events is None else events.to(self.device)
        """What this model is compared over with the other one of its pair; None where that is its vocabulary."""
        self.packs = False
        """Whether `completion_hidden` may use a batch's packing; see `use_packing`."""
        self.decoder: FastDecoder | None = None
        """Decodes and scores with less around the products than the model's own forward, where it can; see
        `use_fast_decoding`."""
        self._head_copy: Tensor | None = None
        self._stepper: Stepper | None = None
        self.caches = True
        """Whether rows decode from a cache, or their whole texts are computed for every token; see `rollout.proof`."""
        base = unwrap(model)
        self.backbone, self._projection = parts_of(base)
        self._recurrent = "cache_params" in signature(self.backbone.forward).parameters  # Mamba, without attention
        config = base.config.get_text_config()
        # Gemma's, RecurrentGemma's and xLSTM's names.
        caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        self._softcap: float | None = next((cap for name in caps if (cap := getattr(config, name, None))), None)
        # Cohere and Falcon-H1 multiply their logits; Granite divides them.
        self._scale = float(getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0)
        self._scale /= float(getattr(config, "logits_scaling", None) or 1.0)

    @property
    def language(self) -> Any:
        """The part of the backbone that reads embedded tokens; the others make features of images."""
        return self.backbone

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """The type that it computes in."""
        division = division_of(self.model)
        found: torch.dtype = next(self.model.parameters()).dtype if division is None else division.compute
        return found

    @property
    def projection(self) -> nn.Module:
        """What makes logits of hidden states."""
        found: nn.Module = self._projection
        return found

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the head that are trained."""
        return [p for p in self._projection.parameters() if p.requires_grad]

    @property
    def max_positions(self) -> int | None:
        """Tokens of prompt and completion together that the model was made for; None where it names no bound."""
        config = unwrap(self.model).config.get_text_config()
        bound = getattr(config, "max_position_embeddings", None)
        rope = getattr(config, "rope_parameters", None) or {}
        # YaRN checkpoints may keep the original bound in max_position_embeddings and stretch it by a factor.
        stretched = (rope.get("original_max_position_embeddings") or 0) * (rope.get("factor") or 0)
        return None if bound is None else max(int(bound), int(stretched))

    @property
    def layer_kinds(self) -> set[str]:
        """The kinds of layers, in transformers' words."""
        config = self.backbone.config.get_text_config()
        return set(getattr(config, "layer_types", None) or [SLIDING if self.window else FULL])

    @property
    def window(self) -> int | None:
        """How many tokens a layer of sliding attention sees; None without such layers."""
        return setting(self.backbone.config.get_text_config(), "sliding_window")

    @property
    def layers(self) -> list[nn.Module]:
        """Its layers, see `layers_of`."""
        return layers_of(unwrap(self.model), self.backbone)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything the optimizer moves."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def trained_head(self) -> Head:
        """The head as the loss needs it: with the parameters that are trained (none under LoRA), and bare if it is."""
        parameters = self.head_parameters
        bare = type(self._projection) is nn.Linear and self._projection.bias is None
        plain = bare and self._scale == 1.0 and self._softcap is None
        weight_VD = self._projection.weight[: self.vocabulary] if plain else None
        return Head(self.head, parameters, weight_VD, self.events)

    def head(self, hidden_mD: Tensor) -> Tensor:
        """Raw logits `[..., V]` in float32 (float64 stays), soft-capping, scale and bias included."""
        projection = self._projection
        if type(projection) is nn.Linear:
            bias = None if projection.bias is None else projection.bias[: self.vocabulary]
            if self._head_copy is not None and hidden_mD.dim() == 2 and len(hidden_mD) <= FEW:
                logits = few(hidden_mD, self._head_copy, bias)
            else:
                logits = linear(hidden_mD, projection.weight[: self.vocabulary], bias)
        else:
            logits = projection(hidden_mD)[..., : self.vocabulary]
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
        if self._scale != 1.0:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def batch(self, rollouts: Sequence[Rollout], view: Literal["student", "teacher"]) -> RolloutBatch:
        """`rollouts` as tensors on this model's device, from one model's view of the prompts."""
        return collate(rollouts, view, self.pad_id, self.device, packed=self.packs)

    def encode(self, fast: FastDecoder, prompts: Sequence[tuple[int, ...]], *, graph: bool = False) -> Prefill:
        """Prefill of these prompts, with its graph where weights are trained and `graph` asks for it."""
        with torch.inference_mode(False), torch.set_grad_enabled(graph):
            return fast.encode(pack_prompts(prompts, self.device))

    def prefill(self, prompts: Sequence[tuple[int, ...]], *, graph: bool = False) -> Prefill | None:
        """Prefill of these prompts for `completion_hidden`, see `encode`; None where that computes prompts itself: with
        dropout, checkpointing or padding."""
        drops = any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.model.modules())
        if self.fast is None or not self.packs or drops or self._checkpoints:
            return None
        with self.sampling_mode():
            return self.encode(self.fast, prompts, graph=graph)

    @property
    def fast(self) -> FastDecoder | None:
        """The fast decoder, unless there are hooks on the backbone: they must see everything, and may change it."""
        return None if self.backbone._forward_pre_hooks or self.backbone._forward_hooks else self.decoder

    @property
    def _checkpoints(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.backbone.modules())

    def completion_hidden(self, batch: RolloutBatch, prefill: Prefill | None = None) -> Tensor:
        """Final hidden states `[M, D]` at the positions that predict each completion token of `batch`, from `prefill`
        where that is one of just its prompts. A prefill's graph serves one backward pass."""
        packing = batch.packing
        if packing is not None and self.packs:
            fast = self.fast
            if fast is None or self._checkpoints:
                return packed_hidden(self.backbone, packing)
            if prefill is None or prefill.prompts.tokens != packing.prompts.tokens:
                prefill = fast.encode(packing.prompts)
            return fast.complete(prefill, packing)
        place_M = batch.prompt_width - 1 + batch.position_M
        return self.hidden_at(batch.input_ids_BT, batch.attention_mask_BT, batch.row_M, place_M, batch.images_B)

    def logprobs(self, rollouts: Sequence[Rollout]) -> Tensor:
        """Log-probability `[M]` of every completion token (temperature 1) as training sees it without dropout, from the
        student's view of the prompts."""
        batch, chunk = self.batch(rollouts, "student"), default_chunk(self.vocabulary)
        with self.sampling_mode():
            return read_logprobs(self.completion_hidden(batch), self.head, batch.tokens_M, chunk)

    def hidden_at(
        self, ids_BT: Tensor, mask_BT: Tensor, row_M: Tensor, place_M: Tensor, images_B: Sequence[Any] = ()
    ) -> Tensor:
        """Final hidden states `[M, D]` at these rows and places of padded texts, without a cache.

        Padding goes from the left of a row to its right, where no layer of a causal model can let it in.
        """
        T, first_B = mask_BT.shape[1], mask_BT.argmax(dim=1)
        moved_BT = (torch.arange(T, device=mask_BT.device) + first_B[:, None]) % T
        ids_BT, mask_BT = ids_BT.gather(1, moved_BT), mask_BT.gather(1, moved_BT)
        sight = self.seen(images_B, ids_BT, mask_BT)
        hidden_BTD = self.hidden(ids_BT, mask_BT, mask_BT.cumsum(dim=1) - 1, sight=sight)
        return hidden_BTD[row_M, place_M - first_B[row_M]]

    def seen(self, images_B: Sequence[Any], ids_BT: Tensor, mask_BT: Tensor) -> Sight | None:
        """What these prompts show beside their tokens; None for a model that does not see."""
        return None

    def hidden(
        self, ids_BT: Tensor, mask_BS: Any, position_BT: Tensor, cache: Any = None, *, sight: Sight | None = None
    ) -> Tensor:
        """Final hidden states `[B, T, D]` by the model's own forward. The mask covers what `cache` holds as well."""
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BS, "position_ids": position_BT}
        inputs |= {} if sight is None else sight.inputs
        if self._recurrent:  # its states have no places for a mask
            inputs["attention_mask"] = mask_BS[:, -ids_BT.shape[1] :]
        if cache is not None:
            inputs["cache_params" if self._recurrent else "past_key_values"] = cache
        return cast(Tensor, self.backbone(**inputs, use_cache=cache is not None).last_hidden_state)

    def use_fast_paths(self) -> None:
        """Score without padding and decode with fewer calls, where this architecture is seen to do both right."""
        self.use_packing()
        self.use_fast_decoding()

    def use_fast_decoding(self) -> bool:
        """Whether `FastDecoder` decodes and scores from now on; its hidden states must be the model's own. It reads
        the weights itself, so it serves a divided model while that is gathered, and is tried only then."""
        decoder = None if is_sharded(self.model) else FastDecoder.of(self.model, self.backbone)
        if decoder is None:
            return False
        ids_BT = torch.arange(14, device=self.device).view(2, 7) % self.vocabulary
        cache = DynamicCache(config=self.backbone.config)
        rows = [tuple(row) for row in ids_BT.tolist()]
        packing = pack([row[:3] for row in rows], [(*row[3:], 0) for row in rows], self.device)
        with self.sampling_mode():
            own_BTD = self.backbone(input_ids=ids_BT, use_cache=False).last_hidden_state
            self.backbone(input_ids=ids_BT[:, :6], past_key_values=cache, use_cache=True)
            position_B = torch.full((2,), 6, device=self.device)
            stepped_BD = decoder.stepper()(ids_BT[:, 6], position_B, torch.ones_like(ids_BT), cache)
            scored_MD = decoder.complete(decoder.encode(packing.prompts), packing)
        right = self.agree(stepped_BD, own_BTD[:, 6]) and self.agree(scored_MD, own_BTD[:, 2:].flatten(0, 1))
        self.decoder = decoder if right else None
        return right

    def agree(self, found: Tensor, own: Tensor) -> bool:
        """Whether hidden states differ by rounding only. Rounding grows with depth; a wrong mask or position moves
        hidden states by about their own size."""
        eps = torch.finfo(self.dtype).eps
        return bool((found.float() - own.float()).norm() <= max(1e-3, 8 * eps) * own.float().norm())

    @property
    def may_pack(self) -> bool:
        """Whether packing can be tried on this attention and these layers."""
        sdpa = unwrap(self.model).config._attn_implementation in ("sdpa", ATTENTION)  # a model may be taken apart again
        return sdpa and not self.layer_kinds - {FULL, SLIDING}

    def use_packing(self) -> bool:
        """Score without padding from now on, if this architecture does it right; whether it does.

        Tried on three completions of two prompts at load time: hidden states must agree with the padded ones. Models
        that need another attention than transformers' scaled-dot-product one (Gemma 2) keep padding, as do those
        with other layers, which know nothing of a packing.
        """
        base = unwrap(self.model)
        if not self.may_pack:
            return False
        window = self.window or 6
        pieces = [tuple(i % self.vocabulary for i in range(k, k + min(window, 30) + k)) for k in (3, 5, 7)]
        rollouts = [
            Rollout(Prompt(0, "", prompt, prompt), 0, completion, False)
            for prompt, completion in ((pieces[0], pieces[1]), (pieces[2], pieces[0]), (pieces[0], pieces[2]))
        ]
        batch = collate(rollouts, "student", self.pad_id, self.device, packed=True)
        with self.sampling_mode():
            padded = self.completion_hidden(batch)
            base.set_attn_implementation(ATTENTION)
            try:
                self.packs = self.agree(packed_hidden(self.backbone, cast(Packing, batch.packing)), padded)
            except FAILURES:
                self.packs = False
        if not self.packs:
            base.set_attn_implementation("sdpa")
        return self.packs

    @contextmanager
    def sampling_mode(self) -> Iterator[None]:
        """No gradients, no dropout, no checkpointing; the previous mode comes back afterwards."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    @contextmanager
    def copied_weights(self) -> Iterator[None]:
        """While entered, rows decode from copies of weights where those are quicker to multiply with: adapters folded
        in, laid out for the processor. No weight may change meanwhile."""
        if type(self._projection) is nn.Linear:
            self._head_copy = packed(self._projection.weight[: self.vocabulary])
        self._stepper = None if self.fast is None else self.fast.stepper(copies=True)
        try:
            yield
        finally:
            self._head_copy = self._stepper = None

    def stepper(self, fast: FastDecoder) -> Stepper:
        """What feeds tokens to rows."""
        return self._stepper or fast.stepper()

    def check_head(self, name: str) -> None:
        """Raise ModelError unless backbone plus head reproduce the model's own logits on a short probe."""
        ids = torch.arange(1, 5, device=self.device)[None] % self.vocabulary
        kind = type(unwrap(self.model)).__name__
        with self.sampling_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                own: Tensor = self.model(input_ids=ids, use_cache=False).logits[..., : self.vocabulary].float()
                ours = self.head(self.backbone(input_ids=ids, use_cache=False).last_hidden_state).float()
            except torch.OutOfMemoryError:
                raise
            except FAILURES as error:
                raise ModelError(f"{name}: {kind} cannot be run on token ids alone ({first_line(error)})") from error
        if not bool(own.isfinite().all()):
            raise ModelError(
                f"{name}: its logits on a probe are not finite; the weights are damaged, or float16 is too narrow for "
                "them (use dtype bfloat16 or float32)"
            )
        gap = float((own - ours).abs().max())
        # Scale and soft-capping, which we compute in float32, the model itself computes in its own type.
        tolerance = max(1e-3, 4 * torch.finfo(self.dtype).eps)
        if not gap <= tolerance * (1.0 + float(own.abs().max())):
            raise ModelError(
                f"{name}: the head of {kind} does more than projection, scale, bias and "
                f"soft-capping (its logits differ by {gap:.3g} from ours on a probe): this architecture is unsupported"
            )


def parts_of(base: Any) -> tuple[Any, Any]:
    """What makes hidden states in a causal language model, and what makes logits of them. ModelError without them."""
    submodels = [part for part in base.children() if isinstance(part, PreTrainedModel)]  # Llama 4 misnames its own
    backbone = getattr(base, base.base_model_prefix, submodels[0] if submodels else None)
    projection = base.get_output_embeddings()
    if backbone is None or getattr(projection, "weight", None) is None:
        lacks = "backbone" if backbone is None else "output projection"
        raise ModelError(f"{base.name_or_path}: {type(base).__name__} does not say what its {lacks} is: unsupported")
    return backbone, projection


def layers_of(base: Any, backbone: nn.Module) -> list[nn.Module]:
    """The parts that are gathered one at a time: what transformers says must stay together, without its nested ones."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in backbone.modules():
        if type(module).__name__ in names and module is not backbone and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def setting(config: Any, name: str) -> int | None:
    """A number of `config`, the largest where layers have numbers of their own; None where there is none."""
    layers = getattr(config, "per_layer_config", None) or [config]
    return max((int(number) for layer in layers if (number := getattr(layer, name, None))), default=None)

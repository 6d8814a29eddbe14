"""One decoding step of the Llama family, with everything that does not change from token to token looked up beforehand.

A token of sixteen rows of a small model is some twenty microseconds of arithmetic per operation, and Python, modules
and views around it cost as much again: half of a step was spent there. So a `Stepper` calls as little as it can, and
multiplies once where projections share an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

from headstart.losses.products import LowRank, Product, few, lays_out, linear, packed
from headstart.models.apart import SharedPrompts
from headstart.models.fused import gated, norm, rotated, signed
from headstart.models.lora import low_rank

Map = Callable[[Tensor], Tensor]
Turn = tuple[Tensor, Tensor]
"""Cosine and signed sine of each token's position, `[L, 1, d]`."""
AHEAD = 256
"""Positions whose rotation is made at once."""


class Block:
    """One layer's modules; projections of the same input share one weight, of which theirs are views."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._layer = layer
        self._qkv = _Joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self._gate_up = _Joined(mlp.gate_proj, mlp.up_proj)

    def forget(self) -> None:
        """Let go of weights that the layer has no more."""
        self._qkv.forget()
        self._gate_up.forget()

    def step(self, copies: bool) -> _Step:
        attention = self._layer.self_attn
        groups, d = attention.num_key_value_groups, attention.head_dim
        normed = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        return _Step(
            _norm(self._layer.input_layernorm),
            self._qkv.map(copies),
            None if normed is None else (normed[0].weight, normed[1].weight, normed[0].variance_epsilon),
            attention.scaling,
            groups,
            d,
            _copied([attention.o_proj], copies) or projection(attention.o_proj),
            _norm(self._layer.post_attention_layernorm),
            self._gate_up.map(copies),
            _copied([self._layer.mlp.down_proj], copies) or projection(self._layer.mlp.down_proj),
        )


@dataclass(frozen=True, slots=True)
class _Step:
    """What a layer does to one token a row: norms as weight and epsilon, projections as functions of `[B, D]`."""

    attention_norm: tuple[Tensor, float]
    qkv: Map
    qk_norm: tuple[Tensor, Tensor, float] | None
    scaling: float
    groups: int
    head_dim: int
    out: Map
    mlp_norm: tuple[Tensor, float]
    gate_up: Map
    down: Map

    def heads(self, x_BD: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, H, d]` and keys `[B, K, d]`, normed and rotated, and values `[B, K, d]`."""
        every_BAd = self.qkv(norm(x_BD, *self.attention_norm)).view(len(x_BD), -1, self.head_dim)
        K = every_BAd.shape[1] // (self.groups + 2)
        H = self.groups * K
        both_BAd = every_BAd[:, :-K]
        if self.qk_norm is not None:
            q_weight, k_weight, eps = self.qk_norm
            both_BAd = norm(both_BAd, None, eps)
            both_BAd[:, :H].mul_(q_weight)
            both_BAd[:, H:].mul_(k_weight)
        both_BAd = rotated(both_BAd, *turn)
        return both_BAd[:, :H], both_BAd[:, H:], every_BAd[:, -K:]


class Stepper:
    """Feeds one token to every row of a batch. It is good for as long as the weights stay where they are; with `copies`
    of some of them, for as long as they stay what they are."""

    def __init__(self, backbone: Any, blocks: Sequence[Block], *, copies: bool = False) -> None:
        self._embed, self._rotary, self._norm = backbone.embed_tokens, backbone.rotary_emb, _norm(backbone.norm)
        self._layers = tuple(block.step(copies) for block in blocks)
        self._turns: Turn | None = None

    def __call__(
        self, token_B: Tensor, position_B: Tensor, mask_BT: Tensor, cache: Any, shared: SharedPrompts | None = None
    ) -> Tensor:
        """Final hidden states `[B, D]` after `token_B`; keys and values go into `cache`, which has those of all T
        tokens, or those that follow `shared`.

        T counts the new token, and no position reaches it. The mask is 0 where a row has no token.
        """
        x_BD = self._embed(token_B)
        B, T = mask_BT.shape
        self.reach(x_BD, T)
        turn = self._turn(position_B)
        # As numbers, once: attention would make them of a bool mask again in every layer.
        mask_B11T = torch.zeros_like(mask_BT, dtype=x_BD.dtype).masked_fill_(mask_BT == 0, -torch.inf)[:, None, None]
        for i, (layer, kept) in enumerate(zip(self._layers, cache.layers, strict=True)):
            q_BHd, k_BKd, v_BKd = layer.heads(x_BD, turn)
            keys, values = kept.update(k_BKd[:, :, None], v_BKd[:, :, None])
            # One query a row: the heads of a group stand where queries would, and nothing is repeated.
            q_BKgd = q_BHd.view(B, -1, layer.groups, layer.head_dim)
            if shared is None:
                o_BKgd = attend(q_BKgd, keys, values, mask_B11T, scale=layer.scaling)
            else:
                o_BKgd = shared.attend(i, q_BKgd, keys, values, layer.scaling)
            x_BD = x_BD + layer.out(o_BKgd.flatten(1))
            gate, up = layer.gate_up(norm(x_BD, *layer.mlp_norm)).chunk(2, dim=-1)
            x_BD = x_BD + layer.down(gated(gate, up))
        return norm(x_BD, *self._norm)

    def reach(self, like: Tensor, T: int) -> None:
        """Be ready for positions below T. What is captured for a shorter reach must not be used any more."""
        if self._turns is None or len(self._turns[0]) < T:
            self._turns = turned(self._rotary, like, torch.arange(-(-T // AHEAD) * AHEAD, device=like.device))

    def _turn(self, position_B: Tensor) -> Turn:
        """Cosine and signed sine at every row's position, `[B, 1, d]`."""
        assert self._turns is not None
        cos_T1d, sin_T1d = self._turns
        return cos_T1d.index_select(0, position_B), sin_T1d.index_select(0, position_B)


class _Joined:
    """Projections of one input as one: their weights become views of one tensor, so nothing is copied and nothing needs
    to follow when they are trained. One after the other where one of them is not plain, or unlike the others."""

    def __init__(self, *modules: Any) -> None:
        self._modules = modules
        self._places: list[int] = []
        self._weight: Tensor
        self._bias: Tensor | None

    def map(self, copies: bool) -> Map:
        modules = self._modules
        if (found := _copied(modules, copies)) is not None:
            return found
        kinds = {(type(m), m.bias is None, m.weight.dtype) for m in modules}
        if len(kinds) > 1 or type(modules[0]) is not nn.Linear:
            maps = [projection(module) for module in modules]
            return lambda x: torch.cat([each(x) for each in maps], dim=-1)
        if self._places != [m.weight.data_ptr() for m in modules]:  # new, moved, or turned to another type
            self._weight = _views([m.weight for m in modules])
            self._bias = None if modules[0].bias is None else _views([m.bias for m in modules])
            self._places = [m.weight.data_ptr() for m in modules]
        weight, bias = self._weight, self._bias
        return lambda x: linear(x, weight, bias)

    def forget(self) -> None:
        if self._places:
            self._places = []
            del self._weight, self._bias


def _views(parameters: Sequence[Any]) -> Tensor:
    """One tensor of which all `parameters` become views; no inference tensor, as they may be trained."""
    with torch.inference_mode(False):
        whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, torch.split(whole, [len(p) for p in parameters]), strict=True):
        parameter.data = part
    return whole


def product(module: Any) -> Product | None:
    """What `module` computes, where it is a plain projection or one with a plain adapter."""
    return Product(module.weight, module.bias) if type(module) is nn.Linear else low_rank(module)


def projection(module: Any) -> Map:
    """Without the module's own call where it is a plain projection or one with a plain adapter."""
    if type(module) is nn.Linear:
        return lambda x: linear(x, module.weight, module.bias)
    return (lambda x: (low_rank(module) or module)(x)) if hasattr(module, "lora_A") else module


def copied_bytes(backbone: Any) -> int:
    """Bytes of the copies that a `Stepper` with copies makes of a backbone's weights, about."""
    found = [known for module in backbone.modules() if (known := product(module)) is not None]
    copied = [p.weight for p in found if isinstance(p, LowRank) or lays_out(p.weight.numel())]
    return sum(weight.nbytes for weight in {id(weight): weight for weight in copied}.values())


def _copied(modules: Sequence[Any], copies: bool) -> Map | None:
    """A product with a copy of the weights of `modules`, which share an input: side by side, adapters folded in, laid
    out for the processor. None where such a copy cannot be made or is not quicker."""
    parts = [found for module in modules if (found := product(module)) is not None]
    if not copies or len(parts) < len(modules) or len({part.bias is None for part in parts}) > 1:
        return None
    folds, weights = any(isinstance(part, LowRank) for part in parts), [part.weight for part in parts]
    if not folds and not lays_out(sum(w.numel() for w in weights)):
        return None
    whole = weights[0].new_empty(sum(map(len, weights)), weights[0].shape[1])
    for part, place in zip(parts, torch.split(whole, [len(w) for w in weights]), strict=True):
        part.folded(place) if isinstance(part, LowRank) else place.copy_(part.weight)
    biases = [part.bias for part in parts if part.bias is not None]
    bias = torch.cat(biases) if biases else None
    laid_out = packed(whole)
    return (lambda x: linear(x, whole, bias)) if laid_out is None else (lambda x: few(x, laid_out, bias))


def turned(rotary: Any, like: Tensor, position_L: Tensor) -> Turn:
    """The rotation at these positions, for heads of the type of `like`."""
    cos_1Ld, sin_1Ld = rotary(like, position_L[None])
    return cos_1Ld[0, :, None], signed(sin_1Ld[0, :, None])


def _norm(module: Any) -> tuple[Tensor, float]:
    return module.weight, module.variance_epsilon

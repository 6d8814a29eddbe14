"""The forward pass of the Llama family (Llama, Qwen2, Qwen3) shaped for short rollouts: little between the products.

It does the arithmetic of the model's own forward on the very modules and weights of the model, adapters included, with
three differences. What surrounds the products takes fewer passes over memory (`fused`). Projections of the same input
are one product when few rows are decoded: their weights become views of one tensor, so nothing is copied and nothing
needs to follow when they are trained. And prompts and completions are two passes: of a prompt nothing is needed but its
keys, its values and its last token's hidden state, so in the last layer its other tokens stop at keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attend

from headstart.models.fused import gated, norm, rotated, signed
from headstart.models.lora import unwrap
from headstart.models.packed import Attend, padded
from headstart.numerics.products import FEW, linear
from headstart.records import PackedPrompts, Packing

FAMILY = ("llama", "qwen2", "qwen3")
Map = Callable[[Tensor], Tensor]
Turn = tuple[Tensor, Tensor]
"""Cosine and signed sine of each token's position, `[L, 1, d]`."""


@dataclass(frozen=True, slots=True)
class PromptPass:
    """What completions need of their prompts: rotated keys and values of every layer, `[L, K, d]` each, and the final
    hidden states of the last tokens `[U, D]`. It has a graph if it was made with gradients."""

    prompts: PackedPrompts
    kept: tuple[tuple[Tensor, Tensor], ...]
    hidden_UD: Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one layer does, as functions of `[L, D]`; `qk_norm` where the model norms q and k per head."""

    attention_norm: Map
    q: Map
    k: Map
    v: Map
    qkv: Map | None
    qk_norm: tuple[Any, Any] | None
    out: Map
    mlp_norm: Map
    gate: Map
    up: Map
    gate_up: Map | None
    down: Map
    scaling: float
    head_dim: int
    groups: int

    def heads(self, h_LD: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[L, H, d]` and keys `[L, K, d]`, both normed and rotated, and values `[L, K, d]`."""
        return self.queries(h_LD, turn), *self.keys_values(h_LD, turn)

    def few_heads(self, h_LD: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """The same for few rows without gradients, all three as one."""
        if self.qkv is None or len(h_LD) > FEW:
            return self.heads(h_LD, turn)
        every_LAd = self._split(self.qkv(h_LD))
        K = every_LAd.shape[1] // (self.groups + 2)
        both_LAd = every_LAd[:, :-K]
        if self.qk_norm is not None:
            q, k = self.qk_norm
            weight_Ad = torch.cat([q.weight.expand(self.groups * K, -1), k.weight.expand(K, -1)])
            both_LAd = norm(both_LAd, None, q.variance_epsilon).mul_(weight_Ad)
        both_LAd = rotated(both_LAd, *turn)
        return both_LAd[:, :-K], both_LAd[:, -K:], every_LAd[:, -K:]

    def queries(self, h_LD: Tensor, turn: Turn) -> Tensor:
        q_LHd = self._split(self.q(h_LD))
        return rotated(q_LHd if self.qk_norm is None else _normed(self.qk_norm[0], q_LHd), *turn)

    def keys_values(self, h_LD: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        k_LKd = self._split(self.k(h_LD))
        return rotated(k_LKd if self.qk_norm is None else _normed(self.qk_norm[1], k_LKd), *turn), self._split(
            self.v(h_LD)
        )

    def rest(self, x_LD: Tensor, o_LHd: Tensor, *, few: bool = False) -> Tensor:
        """What follows the attention."""
        x_LD = x_LD + self.out(o_LHd.flatten(1))
        h_LD = self.mlp_norm(x_LD)
        if few and self.gate_up is not None and len(h_LD) <= FEW:
            return x_LD + self.down(gated(*self.gate_up(h_LD).chunk(2, dim=-1)))
        return x_LD + self.down(gated(self.gate(h_LD), self.up(h_LD)))

    def _split(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.head_dim)


@dataclass(frozen=True, slots=True)
class FastDecoder:
    """Makes the same hidden states as the model's own forward, up to rounding."""

    embed: Map
    rotary: Callable[..., tuple[Tensor, Tensor]]
    layers: tuple[_Layer, ...]
    norm: Map
    head_dim: int

    @classmethod
    def of(cls, model: Any, backbone: Any) -> FastDecoder | None:
        """None for another family, and for anything that does not look as expected."""
        config = unwrap(model).config
        if config.model_type not in FAMILY or config.hidden_act != "silu" or getattr(config, "attention_dropout", 0.0):
            return None
        if any(getattr(layer.self_attn, "sliding_window", None) for layer in backbone.layers):
            return None
        layers = tuple(_layer(layer) for layer in backbone.layers)
        return cls(backbone.embed_tokens, backbone.rotary_emb, layers, _norm(backbone.norm), layers[0].head_dim)

    def step(self, token_B: Tensor, position_B: Tensor, mask_BT: Tensor, cache: Any) -> Tensor:
        """Final hidden states `[B, D]` after `token_B`; keys and values go into `cache`. T counts the new token."""
        x_BD = self.embed(token_B)
        turn = self._turn(x_BD, position_B)
        # As numbers, once: attention would make them of a bool mask again in every layer.
        mask_B11T = torch.zeros_like(mask_BT, dtype=x_BD.dtype).masked_fill_(mask_BT == 0, -torch.inf)[:, None, None]
        for layer, kept in zip(self.layers, cache.layers, strict=True):
            q_BHd, k_BKd, v_BKd = layer.few_heads(layer.attention_norm(x_BD), turn)
            keys, values = kept.update(k_BKd[:, :, None], v_BKd[:, :, None])
            # One query a row: the heads of a group stand where queries would, and nothing is repeated.
            q_BKgd = q_BHd.view(len(q_BHd), -1, layer.groups, self.head_dim)
            o_BKgd = attend(q_BKgd, keys, values, mask_B11T, scale=layer.scaling)
            x_BD = layer.rest(x_BD, o_BKgd.flatten(1, 2), few=True)
        return self.norm(x_BD)

    def encode(self, prompts: PackedPrompts) -> PromptPass:
        x_LD = self.embed(prompts.ids_L)
        turn = self._turn(x_LD, prompts.position_L)
        kept = []
        *layers, last = self.layers
        for layer in layers:
            q_LHd, k_LKd, v_LKd = layer.heads(layer.attention_norm(x_LD), turn)
            kept.append((k_LKd, v_LKd))
            x_LD = layer.rest(x_LD, Attend(layer.scaling).prompts(q_LHd, k_LKd, v_LKd, prompts))
        h_LD, ends = last.attention_norm(x_LD), prompts.last_U
        k_LKd, v_LKd = last.keys_values(h_LD, turn)
        kept.append((k_LKd, v_LKd))
        q_UHd = last.queries(h_LD[ends], (turn[0][ends], turn[1][ends]))
        x_UD = last.rest(x_LD[ends], Attend(last.scaling).last(q_UHd, k_LKd, v_LKd, prompts))
        return PromptPass(prompts, tuple(kept), self.norm(x_UD))

    def complete(self, prompts: PromptPass, packing: Packing) -> Tensor:
        """Final hidden states `[M, D]` at the places that predict each completion token."""
        hidden = [prompts.hidden_UD]
        if len(packing.ids_L):
            x_LD = self.embed(packing.ids_L)
            turn = self._turn(x_LD, packing.position_L)
            for layer, kept in zip(self.layers, prompts.kept, strict=True):
                heads = layer.heads(layer.attention_norm(x_LD), turn)
                before = padded(kept[0], packing.prompts), padded(kept[1], packing.prompts)
                x_LD = layer.rest(x_LD, Attend(layer.scaling).completions(*heads, before, packing))
            hidden.append(self.norm(x_LD))
        return torch.cat(hidden).index_select(0, packing.predicts_M)

    def _turn(self, x_LD: Tensor, position_L: Tensor) -> Turn:
        cos_1Ld, sin_1Ld = self.rotary(x_LD, position_L[None])
        return cos_1Ld[0, :, None], signed(sin_1Ld[0, :, None])


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        attention_norm=_norm(layer.input_layernorm),
        q=_linear(attention.q_proj),
        k=_linear(attention.k_proj),
        v=_linear(attention.v_proj),
        qkv=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
        qk_norm=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
        out=_linear(attention.o_proj),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        gate_up=_joined(mlp.gate_proj, mlp.up_proj),
        down=_linear(mlp.down_proj),
        scaling=attention.scaling,
        head_dim=attention.head_dim,
        groups=attention.num_key_value_groups,
    )


def _linear(module: nn.Module) -> Map:
    """Without the module's own call where it is a plain projection; adapters go through theirs."""
    if type(module) is not nn.Linear:
        return module
    return lambda x: linear(x, module.weight, module.bias)


def _joined(*modules: nn.Module) -> Map | None:
    """One product for projections of the same input; None where one of them is not plain, or unlike the others."""
    if any(type(m) is not nn.Linear for m in modules) or len({(m.bias is None, m.weight.dtype) for m in modules}) > 1:
        return None
    return _Joined(modules)


class _Joined:
    """Projections of one input as one: their weights are views of one tensor."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules
        self._join()

    def _join(self) -> None:
        weights, biases = [m.weight for m in self._modules], [m.bias for m in self._modules]
        self._weight, self._bias = _views(weights), None if biases[0] is None else _views(biases)
        self._places = [weight.data_ptr() for weight in weights]

    def __call__(self, x: Tensor) -> Tensor:
        if [m.weight.data_ptr() for m in self._modules] != self._places:  # moved, or turned to another type
            self._join()
        return linear(x, self._weight, self._bias)


def _views(parameters: Sequence[Any]) -> Tensor:
    """One tensor of which all `parameters` become views."""
    whole = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, torch.split(whole, [len(p) for p in parameters]), strict=True):
        parameter.data = part
    return whole


def _norm(module: Any) -> Map:
    return partial(_normed, module)


def _normed(module: Any, x: Tensor) -> Tensor:
    return norm(x, module.weight, module.variance_epsilon)

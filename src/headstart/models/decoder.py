"""The forward pass of the Llama family (Llama, Qwen2, Qwen3) shaped for short rollouts: little between the products.

It does the arithmetic of the model's own forward on the very modules and weights of the model, adapters included, with
three differences. What surrounds the products takes fewer passes over memory (`fused`). A decoding step has a form of
its own (`stepper`). And prompts and completions are two passes: of a prompt nothing is needed but its keys, its values
and its last token's hidden state, so in the last layer its other tokens stop at keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headstart.models.fused import gated, gated_product, norm, normed_products, rotated
from headstart.models.lora import unwrap
from headstart.models.packed import Attend
from headstart.models.stepper import Block, Map, Stepper, Turn, product, projection, turned
from headstart.progress import through
from headstart.records import PackedPrompts, Packing

FAMILY = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class Prefill:
    """What completions need of their prompts: rotated keys and values of every layer, `[L, K, d]` each, and the final
    hidden states of the last tokens `[U, D]`. It has a graph if it was made with gradients, for one backward pass."""

    prompts: PackedPrompts
    kept: tuple[tuple[Tensor, Tensor], ...]
    hidden_UD: Tensor


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one layer does to `[L, D]`. Modules are read at every call: they may be moved or gathered in between."""

    attention_norm: Any
    qkv: tuple[Any, Any, Any]
    qk_norm: tuple[Any, Any] | None
    """Where the model norms q and k per head."""
    out: Map
    mlp_norm: Any
    gate_up: tuple[Any, Any]
    down: Any
    scaling: float
    head_dim: int

    def heads(self, x_LD: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[L, H, d]` and keys `[L, K, d]`, both normed and rotated, and values `[L, K, d]`."""
        q, k, v = _normed_products(self.attention_norm, x_LD, self.qkv)
        return self._turned(q, 0, turn), self._turned(k, 1, turn), self._split(v)

    def queries(self, x_LD: Tensor, turn: Turn) -> Tensor:
        (q,) = _normed_products(self.attention_norm, x_LD, self.qkv[:1])
        return self._turned(q, 0, turn)

    def keys_values(self, x_LD: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        k, v = _normed_products(self.attention_norm, x_LD, self.qkv[1:])
        return self._turned(k, 1, turn), self._split(v)

    def rest(self, x_LD: Tensor, o_LHd: Tensor) -> Tensor:
        """What follows the attention."""
        x_LD = x_LD + self.out(o_LHd.flatten(1))
        gate, up = _normed_products(self.mlp_norm, x_LD, self.gate_up)
        down = product(self.down)
        if down is not None and _by_hand(x_LD):
            return x_LD + gated_product(gate, up, down)
        return x_LD + projection(self.down)(gated(gate, up))

    def _turned(self, x: Tensor, which: int, turn: Turn) -> Tensor:
        heads = self._split(x)
        return rotated(heads if self.qk_norm is None else _normed(self.qk_norm[which], heads), *turn)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self.head_dim)


@dataclass(frozen=True, slots=True)
class FastDecoder:
    """Makes the same hidden states as the model's own forward, up to rounding."""

    backbone: Any
    layers: tuple[_Layer, ...]
    blocks: tuple[Block, ...]
    """The same layers as a `Stepper` wants them."""

    @classmethod
    def of(cls, model: Any, backbone: Any) -> FastDecoder | None:
        """None for another family, and for anything that does not look as expected."""
        config = unwrap(model).config
        if config.model_type not in FAMILY or config.hidden_act != "silu" or getattr(config, "attention_dropout", 0.0):
            return None
        if any(getattr(layer.self_attn, "sliding_window", None) for layer in backbone.layers):
            return None
        if getattr(backbone.rotary_emb, "rope_type", "default") in ("dynamic", "longrope"):
            return None  # whose rotation depends on how long the longest row is
        return cls(backbone, tuple(map(_layer, backbone.layers)), tuple(map(Block, backbone.layers)))

    def stepper(self, *, copies: bool = False) -> Stepper:
        """Decodes tokens of rows. To be made again when weights may have moved; with `copies`, or changed."""
        return Stepper(self.backbone, self.blocks, copies=copies)

    def forget(self) -> None:
        """Let go of the weights of a divided model that is not gathered any more."""
        for block in self.blocks:
            block.forget()

    def encode(self, prompts: PackedPrompts) -> Prefill:
        x_LD = self.backbone.embed_tokens(prompts.ids_L)
        turn = turned(self.backbone.rotary_emb, x_LD, prompts.position_L)
        kept = []
        *layers, last = self.layers
        for layer in through(layers, f"encoding {len(prompts.tokens):,} prompts"):
            q_LHd, k_LKd, v_LKd = layer.heads(x_LD, turn)
            kept.append((k_LKd, v_LKd))
            x_LD = layer.rest(x_LD, Attend(layer.scaling).prompts(q_LHd, k_LKd, v_LKd, prompts))
        ends = prompts.last_U
        k_LKd, v_LKd = last.keys_values(x_LD, turn)
        kept.append((k_LKd, v_LKd))
        q_UHd = last.queries(x_LD[ends], (turn[0][ends], turn[1][ends]))
        x_UD = last.rest(x_LD[ends], Attend(last.scaling).last(q_UHd, k_LKd, v_LKd, prompts))
        return Prefill(prompts, tuple(kept), _normed(self.backbone.norm, x_UD))

    def complete(self, prompts: Prefill, packing: Packing) -> Tensor:
        """Final hidden states `[M, D]` at the places that predict each completion token."""
        hidden = [prompts.hidden_UD]
        if len(packing.ids_L):
            x_LD = self.backbone.embed_tokens(packing.ids_L)
            turn = turned(self.backbone.rotary_emb, x_LD, packing.position_L)
            for layer, kept in zip(self.layers, prompts.kept, strict=True):
                heads = layer.heads(x_LD, turn)
                x_LD = layer.rest(x_LD, Attend(layer.scaling).completions(*heads, kept, packing))
            hidden.append(_normed(self.backbone.norm, x_LD))
        return torch.cat(hidden).index_select(0, packing.predicts_M)


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        attention_norm=layer.input_layernorm,
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        qk_norm=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
        out=projection(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm,
        gate_up=(mlp.gate_proj, mlp.up_proj),
        down=mlp.down_proj,
        scaling=attention.scaling,
        head_dim=attention.head_dim,
    )


def _normed_products(norm: Any, x_LD: Tensor, modules: Sequence[Any]) -> Sequence[Tensor]:
    """`module(norm(x))` of all `modules`."""
    products = [product(module) for module in modules]
    if _by_hand(x_LD) and (known := [p for p in products if p is not None]) and len(known) == len(products):
        return normed_products(x_LD, norm.weight, norm.variance_epsilon, known)
    h_LD = _normed(norm, x_LD)
    return [projection(module)(h_LD) for module in modules]


def _by_hand(x: Tensor) -> bool:
    """Whether gradients of larger pieces are written down: on a CPU, where what a pass keeps is most of the memory."""
    return torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _normed(module: Any, x: Tensor) -> Tensor:
    return norm(x, module.weight, module.variance_epsilon)

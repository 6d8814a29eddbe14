"""The forward pass of the Llama family (Llama, Qwen2, Qwen3) shaped for short rollouts: little between the products.

It does the arithmetic of the model's own forward on the very modules and weights of the model, adapters included, with
three differences. What surrounds the products takes fewer passes over memory (`fused`). A decoding step has a form of
its own (`stepper`). And prompts and completions are two passes: of a prompt nothing is needed but its keys, its values
and its last token's hidden state, so in the last layer its other tokens stop at keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headstart.models.fused import gated, norm, rotated
from headstart.models.lora import unwrap
from headstart.models.packed import Attend
from headstart.models.stepper import Block, Map, Stepper, Turn, projection, turned
from headstart.records import PackedPrompts, Packing

FAMILY = ("llama", "qwen2", "qwen3")


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
    qk_norm: tuple[Any, Any] | None
    out: Map
    mlp_norm: Map
    gate: Map
    up: Map
    down: Map
    scaling: float
    head_dim: int

    def heads(self, h_LD: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[L, H, d]` and keys `[L, K, d]`, both normed and rotated, and values `[L, K, d]`."""
        return self.queries(h_LD, turn), *self.keys_values(h_LD, turn)

    def queries(self, h_LD: Tensor, turn: Turn) -> Tensor:
        q_LHd = self._split(self.q(h_LD))
        return rotated(q_LHd if self.qk_norm is None else _normed(self.qk_norm[0], q_LHd), *turn)

    def keys_values(self, h_LD: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        k_LKd = self._split(self.k(h_LD))
        return rotated(k_LKd if self.qk_norm is None else _normed(self.qk_norm[1], k_LKd), *turn), self._split(
            self.v(h_LD)
        )

    def rest(self, x_LD: Tensor, o_LHd: Tensor) -> Tensor:
        """What follows the attention."""
        x_LD = x_LD + self.out(o_LHd.flatten(1))
        h_LD = self.mlp_norm(x_LD)
        return x_LD + self.down(gated(self.gate(h_LD), self.up(h_LD)))

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

    def stepper(self) -> Stepper:
        """Decodes tokens of rows; to be made again when weights may have changed."""
        return Stepper(self.backbone, self.blocks)

    def forget(self) -> None:
        """Let go of the weights of a divided model that is not gathered any more."""
        for block in self.blocks:
            block.forget()

    def encode(self, prompts: PackedPrompts) -> PromptPass:
        x_LD = self.backbone.embed_tokens(prompts.ids_L)
        turn = turned(self.backbone.rotary_emb, x_LD, prompts.position_L)
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
        return PromptPass(prompts, tuple(kept), _normed(self.backbone.norm, x_UD))

    def complete(self, prompts: PromptPass, packing: Packing) -> Tensor:
        """Final hidden states `[M, D]` at the places that predict each completion token."""
        hidden = [prompts.hidden_UD]
        if len(packing.ids_L):
            x_LD = self.backbone.embed_tokens(packing.ids_L)
            turn = turned(self.backbone.rotary_emb, x_LD, packing.position_L)
            for layer, kept in zip(self.layers, prompts.kept, strict=True):
                heads = layer.heads(layer.attention_norm(x_LD), turn)
                x_LD = layer.rest(x_LD, Attend(layer.scaling).completions(*heads, kept, packing))
            hidden.append(_normed(self.backbone.norm, x_LD))
        return torch.cat(hidden).index_select(0, packing.predicts_M)


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        attention_norm=_norm(layer.input_layernorm),
        q=projection(attention.q_proj),
        k=projection(attention.k_proj),
        v=projection(attention.v_proj),
        qk_norm=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
        out=projection(attention.o_proj),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate=projection(mlp.gate_proj),
        up=projection(mlp.up_proj),
        down=projection(mlp.down_proj),
        scaling=attention.scaling,
        head_dim=attention.head_dim,
    )


def _norm(module: Any) -> Map:
    return partial(_normed, module)


def _normed(module: Any, x: Tensor) -> Tensor:
    return norm(x, module.weight, module.variance_epsilon)

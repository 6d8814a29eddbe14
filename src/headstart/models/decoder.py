"""One decoding step of the Llama family (Llama, Qwen2, Qwen3) with little between the matrix products.

With a few rows the products of a step are small, and much of its time goes into what surrounds them. This does the same
arithmetic in fewer calls, on the very modules and weights of the model, adapters included: decoding 16 rows of a 1.3 M
model takes 1.4 ms a token on one CPU core instead of 2.4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from torch.nn.functional import scaled_dot_product_attention as attend

from headstart.models.lora import unwrap

FAMILY = ("llama", "qwen2", "qwen3")
Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Layer:
    """What one layer does, as functions of `[B, D]`; q and k are normed per head where the model does that."""

    attention_norm: Map
    q: Map
    k: Map
    v: Map
    q_norm: Map
    k_norm: Map
    out: Map
    mlp_norm: Map
    gate: Map
    up: Map
    down: Map
    activation: Map
    scaling: float


@dataclass(frozen=True, slots=True)
class FastDecoder:
    """The next token of B rows. Makes the same hidden states as the model's own forward, up to rounding."""

    embed: Map
    rotary: Callable[..., tuple[Tensor, Tensor]]
    layers: tuple[_Layer, ...]
    norm: Map
    head_dim: int

    @classmethod
    def of(cls, model: Any, backbone: Any) -> FastDecoder | None:
        """None for another family, for sliding windows, and for anything that does not look as expected."""
        config = unwrap(model).config
        sliding = any(getattr(layer.self_attn, "sliding_window", None) for layer in getattr(backbone, "layers", ()))
        if config.model_type not in FAMILY or sliding:
            return None
        layers = tuple(_layer(layer) for layer in backbone.layers)
        head_dim = backbone.layers[0].self_attn.head_dim
        return cls(backbone.embed_tokens, backbone.rotary_emb, layers, _norm(backbone.norm), head_dim)

    def step(self, token_B: Tensor, position_B: Tensor, mask_BT: Tensor, cache: Any) -> Tensor:
        """Final hidden states `[B, D]` after `token_B`; keys and values go into `cache`. T counts the new token."""
        x_BD = self.embed(token_B)
        cos_B1d, sin_B1d = self.rotary(x_BD, position_B[:, None])
        sin_B1d = _signed(sin_B1d)
        seen_B11T = mask_BT[:, None, None].bool()
        B, d = len(token_B), self.head_dim
        for layer, kept in zip(self.layers, cache.layers, strict=True):
            h_BD = layer.attention_norm(x_BD)
            q_BHd = layer.q_norm(layer.q(h_BD).view(B, -1, d))
            k_BKd = layer.k_norm(layer.k(h_BD).view(B, -1, d))
            v_BKd = layer.v(h_BD).view(B, -1, d)
            q_BHd, k_BKd = _rotated(q_BHd, cos_B1d, sin_B1d), _rotated(k_BKd, cos_B1d, sin_B1d)
            keys, values = kept.update(k_BKd[:, :, None], v_BKd[:, :, None])
            # One query a row: the heads of a group stand where queries would, and nothing is repeated.
            q_BKgd = q_BHd.view(B, k_BKd.shape[1], -1, d)
            o_BKgd = attend(q_BKgd, keys, values, seen_B11T, scale=layer.scaling)
            x_BD = x_BD + layer.out(o_BKgd.reshape(B, -1))
            h_BD = layer.mlp_norm(x_BD)
            x_BD = x_BD + layer.down(layer.activation(layer.gate(h_BD)) * layer.up(h_BD))
        return self.norm(x_BD)


def _rotated(x_BHd: Tensor, cos_B1d: Tensor, signed_B1d: Tensor) -> Tensor:
    """Rotary embedding: the two halves of a head trade places, the first with the other sign (in the sine)."""
    return (x_BHd * cos_B1d).addcmul_(x_BHd.roll(x_BHd.shape[-1] // 2, -1), signed_B1d)


def _signed(sin_B1d: Tensor) -> Tensor:
    signed_B1d = sin_B1d.clone()
    signed_B1d[..., : sin_B1d.shape[-1] // 2].neg_()
    return signed_B1d


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        attention_norm=_norm(layer.input_layernorm),
        q=_linear(attention.q_proj),
        k=_linear(attention.k_proj),
        v=_linear(attention.v_proj),
        q_norm=_norm(getattr(attention, "q_norm", None)),
        k_norm=_norm(getattr(attention, "k_norm", None)),
        out=_linear(attention.o_proj),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        activation=mlp.act_fn,
        scaling=attention.scaling,
    )


def _linear(module: nn.Module) -> Map:
    """Without the module's own call where it is a plain projection; adapters go through theirs."""
    if type(module) is not nn.Linear:
        return module
    return lambda x: linear(x, module.weight, module.bias)


def _norm(module: Any) -> Map:
    if module is None:
        return lambda x: x
    return lambda x: rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)

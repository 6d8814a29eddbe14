"""How the weights of a model lie on one rank: bytes held, gathered for a pass, and gathered whole for generation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from headstart.models.causal import CausalModel
from headstart.models.lora import is_adapter, unwrap

MASTER = 4
"""Bytes of a sharded trained weight, of its gradient and of each of its averages: float32 masters."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of one model's weights on one rank, whole or sharded over `shards` ranks (FSDP2).

    Sharded: trained weights are held in float32 (masters) whatever type the model computes in; adapters are replicated.
    """

    resident: int
    """There all the time, buffers included."""
    gradients: int
    """Of everything that is trained."""
    gathered: int = 0
    """Whole copies while the model computes: embedding, head and final norm, one layer, and the next one."""
    backward: int = 0
    """Beside them in a backward pass: gradients of one layer, embedding and head before they are divided."""
    whole: int = 0
    """All weights gathered, in the type the model computes in; 0 where they are not sharded."""
    head: int = 0
    """The output head gathered; 0 where it is not sharded."""

    @classmethod
    def of(cls, model: CausalModel, shards: int | None = None) -> Weights:
        """`shards` ranks hold one copy together; None is no sharding: every rank holds all."""
        named = dict(model.model.named_parameters())
        buffers = sum(b.numel() * b.element_size() for b in model.model.buffers())
        if shards is None:
            return cls(_bytes(named.values()) + buffers, _bytes(p for p in named.values() if p.requires_grad))
        size = unwrap(model.model).dtype.itemsize
        adapters = [p for name, p in named.items() if is_adapter(name)]
        whole = {id(p) for p in adapters}
        sharded = [p for p in named.values() if id(p) not in whole]
        trained = sum(p.numel() for p in sharded if p.requires_grad)
        total, head = sum(p.numel() for p in sharded), model.head_weight
        layers = [sum(p.numel() for p in layer.parameters() if id(p) not in whole) for layer in model.layers()]
        tied = head is model.backbone.get_input_embeddings().weight
        # A tied weight is gathered twice: as the embedding by FSDP, as the head by the loss.
        root, layer = total - sum(layers) + (head.numel() if tied else 0), max(layers, default=0)
        return cls(
            resident=-(-(trained * MASTER + (total - trained) * size) // shards) + _bytes(adapters) + buffers,
            gradients=-(-trained * MASTER // shards) + _bytes(p for p in adapters if p.requires_grad),
            gathered=(root + 2 * layer) * size,
            backward=(root + layer) * size if trained else 0,
            whole=total * size,
            head=head.numel() * size,
        )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)

"""How the weights of a model lie on one rank: bytes held, gathered for a pass, and gathered whole for generation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from headstart.models.causal import CausalModel
from headstart.models.lora import is_adapter
from headstart.ranks.sharding import division_of

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
    largest: int
    """The largest gradient."""
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
        """`shards` ranks hold one copy together, by default as many as `model` is divided over."""
        division = division_of(model.model)
        shards = division.mesh.size(division.mesh.ndim - 1) if division is not None else shards
        named = dict(model.model.named_parameters())
        buffers = _bytes(model.model.buffers())
        if shards is None:
            own = [p for p in named.values() if p.requires_grad]
            return cls(_bytes(named.values()) + buffers, _bytes(own), max(map(_size, own), default=0))
        size = model.dtype.itemsize
        adapters = [p for name, p in named.items() if is_adapter(name)]
        whole = {id(p) for p in adapters}
        sharded = [p for p in named.values() if id(p) not in whole]
        masters = [-(-p.numel() * MASTER // shards) for p in sharded if p.requires_grad]
        trained = sum(p.numel() for p in sharded if p.requires_grad)
        total, head = sum(p.numel() for p in sharded), cast(Tensor, model.projection.weight)
        layers = [sum(p.numel() for p in layer.parameters() if id(p) not in whole) for layer in model.layers]
        tied = head is model.backbone.get_input_embeddings().weight
        # A tied weight is gathered twice: as the embedding by FSDP, as the head by the loss.
        root, layer = total - sum(layers) + (head.numel() if tied else 0), max(layers, default=0)
        return cls(
            resident=-(-(trained * MASTER + (total - trained) * size) // shards) + _bytes(adapters) + buffers,
            gradients=-(-trained * MASTER // shards) + _bytes(p for p in adapters if p.requires_grad),
            largest=max((*masters, *(_size(p) for p in adapters if p.requires_grad)), default=0),
            gathered=(root + 2 * layer) * size,
            backward=(root + layer) * size if trained else 0,
            whole=total * size,
            head=head.numel() * size,
        )


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(map(_size, tensors))

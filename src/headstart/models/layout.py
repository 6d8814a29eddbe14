"""How the weights of a model lie on one rank: bytes held, gathered for a pass, and gathered whole for generation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from headstart.models.causal import CausalModel
from headstart.models.lora import is_adapter, unwrap


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of one model's weights on one rank, whole or sharded over `shards` ranks (FSDP2).

    Sharded: trained weights are held in float32 (masters) whatever type the model computes in; adapters are replicated.
    """

    resident: int
    """There all the time, buffers included."""
    gradients: int
    """Of everything that is trained."""
    gathered: int
    """Whole copies while the model computes: embedding, head and final norm, one layer, and the next one."""
    backward: int
    """Beside them in a backward pass: gradients of one layer, embedding and head before they are divided."""
    whole: int
    """All weights gathered, in the type the model computes in; 0 where they are not sharded."""
    head: int
    """The output head gathered; 0 where it is not sharded."""

    @classmethod
    def of(cls, model: CausalModel, shards: int | None = None) -> Weights:
        """`shards` ranks hold one copy together; None is no sharding: every rank holds all."""
        parameters = list(model.model.parameters())
        buffers = sum(b.numel() * b.element_size() for b in model.model.buffers())
        trained = [p for p in parameters if p.requires_grad]
        if shards is None:
            held = sum(p.numel() * p.element_size() for p in parameters)
            return cls(held + buffers, sum(p.numel() * p.element_size() for p in trained), 0, 0, 0, 0)
        size = unwrap(model.model).dtype.itemsize
        replicated = [p for n, p in model.model.named_parameters() if is_adapter(n)]
        alike = {id(p) for p in replicated}
        sharded = [p for p in parameters if id(p) not in alike]
        masters = sum(p.numel() * (4 if p.requires_grad else size) for p in sharded)
        copies = sum(p.numel() * p.element_size() for p in replicated)
        layers = [sum(p.numel() for p in layer.parameters() if id(p) not in alike) for layer in model.layers()]
        total, largest = sum(p.numel() for p in sharded), max(layers, default=0)
        root, learns = total - sum(layers), any(p.requires_grad for p in sharded)
        return cls(
            resident=-(-masters // shards) + copies + buffers,
            gradients=-(-sum(4 * p.numel() for p in sharded if p.requires_grad) // shards)
            + sum(p.numel() * p.element_size() for p in replicated if p.requires_grad),
            gathered=(root + 2 * largest) * size,
            backward=(root + largest) * size if learns else 0,
            whole=total * size,
            head=model.head_weight.numel() * size,
        )

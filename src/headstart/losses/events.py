"""Logits over one vocabulary joined into logits over events that two vocabularies have in common.

An event's probability is the sum over its ids. The stop class of one vocabulary is the smallest case: its ids are one
event and every other id is an event of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

REMOVED = -1e30
"""The logit of what does not take part. Finite, so that differences of two removed ones are never NaN."""
BLOCK = 2**19
"""Logits whose exponentials are summed at once on a CPU, 2 MiB."""


@dataclass(frozen=True, slots=True, eq=False)
class Events:
    """The event (int64 `[V]`) of every id of one vocabulary, -1 for ids that take no part.

    `size` events in all; `rest` is the event of what the other vocabulary cannot express (None without one). With
    `renormalised` that event is read and then left out of both distributions.
    """

    event_V: Tensor
    size: int
    rest: int | None
    renormalised: bool
    one_C: Tensor
    """An id of each event (0 where there is none)."""
    many_C: Tensor
    """Events of several ids, int64."""
    none_C: Tensor
    """Events of no id, int64."""

    @classmethod
    def of(cls, event_V: Tensor, size: int, rest: int | None = None, *, renormalised: bool = False) -> Events:
        part = event_V >= 0
        count_C = torch.bincount(event_V[part], minlength=size)
        one_C = torch.zeros(size, dtype=torch.int64, device=event_V.device)
        ids = torch.arange(len(event_V), device=event_V.device)
        one_C[event_V[part]] = ids[part]
        many_C, none_C = (count_C > 1).nonzero()[:, 0], (count_C == 0).nonzero()[:, 0]
        return cls(event_V, size, rest, renormalised, one_C, many_C, none_C)

    @classmethod
    def of_stops(cls, stop_ids: tuple[int, ...], vocabulary: int) -> Events | None:
        """All `stop_ids` one event, in the place of the first; None where there is nothing to join."""
        unique = tuple(dict.fromkeys(stop_ids))
        if len(unique) < 2:
            return None
        kept = torch.ones(vocabulary, dtype=torch.bool)
        kept[list(unique[1:])] = False
        event_V = kept.cumsum(0) - 1
        event_V[list(unique[1:])] = int(event_V[unique[0]])
        return cls.of(event_V, int(kept.sum()))

    @property
    def identity(self) -> bool:
        """Whether every id is the event of its own number."""
        return self.size == len(self.event_V) and bool(
            (self.event_V == torch.arange(self.size, device=self.event_V.device)).all()
        )

    def to(self, device: torch.device) -> Events:
        tensors = ("event_V", "one_C", "many_C", "none_C")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    def of_tokens(self, tokens_M: Tensor) -> Tensor:
        """The event of each token; 0 for tokens that take no part."""
        return self.event_V[tokens_M].clamp_min(0)

    def ids(self, events: Tensor) -> Tensor:
        """An id of each event; -1 for REST and for events without ids."""
        ids = self.one_C[events].masked_fill(torch.isin(events, self.none_C), -1)
        return ids if self.rest is None else ids.masked_fill(events == self.rest, -1)

    def join(self, logits_mV: Tensor) -> Tensor:
        """Event logits `[m, size]`: the log of the sum of the exponentials of each event's ids, float32 at least.

        Exact for events of one id. Sums are taken beside the row's maximum, and where all of them vanish there, beside
        the event's own.
        """
        logits_mV = logits_mV if logits_mV.dtype == torch.float64 else logits_mV.float()
        joined_mC = logits_mV.index_select(-1, self.one_C)
        if len(self.many_C):
            # On a CPU a few rows at a time: what is added up then stays in the processor's cache (half the time).
            size = max(1, BLOCK // logits_mV.shape[-1]) if logits_mV.device.type == "cpu" else max(1, len(logits_mV))
            sums = [self._sums(rows_mV) for rows_mV in torch.split(logits_mV, size)]
            joined_mC.index_copy_(-1, self.many_C, torch.cat(sums))
        return joined_mC.index_fill_(-1, self.none_C, REMOVED) if len(self.none_C) else joined_mC

    def share(self, logits_mV: Tensor, joined_mC: Tensor) -> Tensor:
        """Each id's part of its event's probability, `[m, V]`: d joined / d logits. 0 for ids that take no part."""
        share_mV = (logits_mV - joined_mC.index_select(-1, self.event_V.clamp_min(0))).exp_()
        return share_mV.masked_fill_(self.event_V < 0, 0.0)

    def spread(self, gradient_mC: Tensor, share_mV: Tensor) -> Tensor:
        """The gradient of the ids' logits from that of the events'; `share_mV` is overwritten."""
        return share_mV.mul_(gradient_mC.index_select(-1, self.event_V.clamp_min(0)))

    def _sums(self, logits_mV: Tensor) -> Tensor:
        """The joined logits of the events in `many_C`."""
        room = (*logits_mV.shape[:-1], self.size + 1)  # the last takes what takes no part
        index_mV = torch.where(self.event_V < 0, self.size, self.event_V).expand_as(logits_mV)
        top_m1 = logits_mV.amax(-1, keepdim=True)
        sums_mC = logits_mV.new_zeros(room).scatter_add_(-1, index_mV, (logits_mV - top_m1).exp_())
        sums_mK = sums_mC.index_select(-1, self.many_C)
        if bool((sums_mK > 0).all()):
            return sums_mK.log_().add_(top_m1)
        top_mC = logits_mV.new_full(room, REMOVED).scatter_reduce_(-1, index_mV, logits_mV, "amax")
        beside_mV = (logits_mV - top_mC.gather(-1, index_mV)).exp_()
        sums_mC = logits_mV.new_zeros(room).scatter_add_(-1, index_mV, beside_mV)
        return (sums_mC.log_() + top_mC).index_select(-1, self.many_C)


class _Join(torch.autograd.Function):
    """`Events.join` that can be differentiated."""

    @staticmethod
    def forward(ctx, events: Events, logits_mV: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        joined_mC = events.join(logits_mV)
        ctx.events = events
        ctx.save_for_backward(logits_mV, joined_mC)
        return joined_mC

    @staticmethod
    def backward(ctx, gradient_mC: Tensor) -> tuple[None, Tensor]:  # type: ignore[no-untyped-def]
        logits_mV, joined_mC = ctx.saved_tensors
        share_mV = ctx.events.share(logits_mV.to(joined_mC.dtype), joined_mC)
        return None, ctx.events.spread(gradient_mC, share_mV).to(logits_mV.dtype)


def join(events: Events | None, logits_mV: Tensor) -> Tensor:
    """Event logits with their gradient; the logits themselves without events."""
    return logits_mV if events is None else _Join.apply(events, logits_mV)  # type: ignore[no-untyped-call]

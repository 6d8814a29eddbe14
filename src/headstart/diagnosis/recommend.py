"""From the readings to a horizon: a range, its reasons, and what speaks against it. Pure: no model, no file.

No single rule is right (docs/explanation/teacher-decay.md). The damage share says where the student's errors are made,
the coverage of the divergence where the teacher disagrees, the prefix gift whether a correct opening is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

from headstart.diagnosis.curve import DecayCurve, DecayPoint, Plateau, Share
from headstart.stats import MOSTLY, Estimate, cut_note

FORMAT = 1
DONE = 0.9
"""Share of the damage that is done within the horizon."""
PROVEN = 0.5
"""Lower bound that the damage share at the horizon must reach, or the measurement is too coarse to choose by it."""
SHORT = 0.5
"""A horizon is short when it is at most this share of a typical response: a longer one saves less than half."""
SPREAD = 0.4
"""Half of the divergence within less than this share of a median response is an early signal (even: 0.5)."""
REACH = 4
"""The range's lower bound is at least N divided by this: divergence in the very first tokens may be style only."""
UNSUPPORTED = "No short horizon is supported by this evidence"


@dataclass(frozen=True, slots=True)
class StepCost:
    """One optimizer step with rollouts of up to `tokens`: seconds (None where it could not be timed) and peak GiB."""

    tokens: int
    seconds: float | None
    gib: float


@dataclass(frozen=True, slots=True)
class Window:
    """Horizons (tokens) that the evidence supports, and the one to start with."""

    low: int
    tokens: int
    high: int


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to train with. `window` is None where no short horizon is supported; `plateau` is predicted accuracy."""

    window: Window | None
    sentence: str
    reasons: tuple[str, ...]
    plateau: Plateau | None = None
    costs: tuple[StepCost, ...] = ()

    def to_json(self) -> dict[str, Any]:
        window = self.window
        return {
            "format": FORMAT,
            "supported": window is not None,
            **(asdict(window) if window else dict.fromkeys(Window.__slots__)),
            "sentence": self.sentence,
            "reasons": list(self.reasons),
            "plateau": asdict(self.plateau.gift) if self.plateau else None,
            "shortfall": asdict(self.plateau.shortfall) if self.plateau else None,
            "costs": [asdict(cost) for cost in self.costs],
        }


def horizon_window(decay: DecayCurve, coverage: Mapping[str, int]) -> Window | None:
    """The range of horizons, or None when the evidence supports no short one; it never does where the teacher's
    responses were mostly cut: what there is to win is not known then.

    `tokens` is the first measured length where nine tenths of the damage are done. It is not interpolated: a horizon
    that ends just before a decision teaches nothing of it, one that ends after it costs a little more. The range goes
    down to where 40% of the divergence lie or where the damage may be done within its interval, and up to where 50% of
    the divergence lie or the damage is surely done, always among short horizons and never below a quarter of the start.
    `coverage` maps a share of all divergence to the number of tokens that hold it (`positions.coverage`).
    """
    longest = int(SHORT * decay.typical_tokens)
    points = [p for p in decay.points if 0 < p.prefix_tokens <= longest and p.damage.value is not None]
    done = [p.prefix_tokens for p in points if (p.damage.value or 0.0) >= DONE and p.damage.low >= PROVEN]
    if not done or decay.teacher_cut >= MOSTLY:
        return None
    tokens = done[0]
    possible = next(p.prefix_tokens for p in points if p.damage.high >= DONE)
    certain = next((p.prefix_tokens for p in points if p.damage.low >= DONE), longest)
    signal = [coverage[share] for share in ("0.4", "0.5") if coverage[share] > 0] or [tokens]
    return Window(
        low=max(min(possible, signal[0], tokens), -(-tokens // REACH)),
        tokens=tokens,
        high=max(tokens, min(max(certain, signal[-1]), longest)),
    )


def recommend(
    decay: DecayCurve,
    coverage: Mapping[str, int],
    plateau: Plateau | None = None,
    costs: Sequence[StepCost] = (),
    spread: Mapping[str, Sequence[int]] | None = None,
) -> Recommendation:
    """The advice in words. `plateau` and `costs` (of which the last is a full rollout's) belong to the window's
    horizons; `spread` holds the intervals of `coverage`."""
    window = horizon_window(decay, coverage)
    reasons = [_lead(decay), _damage(decay, window), _signal(decay, coverage, spread)]
    if plateau:
        reasons.append(_gift(decay, plateau))
    if costs:
        short = [f"N = {cost.tokens}: {_cost(cost)}" for cost in costs[:-1]]
        full = f"full rollouts, {costs[-1].tokens} tokens: {_cost(costs[-1])}"
        reasons.append(f"Cost of a step: {'; '.join([*short, full])}.")
    sentence = _sentence(decay, window, plateau)
    return Recommendation(window, sentence, (*reasons, *_doubts(decay)), plateau, tuple(costs))


def _sentence(decay: DecayCurve, window: Window | None, plateau: Plateau | None) -> str:
    if window is None:
        if note := _cut(decay, MOSTLY):
            return f"{UNSUPPORTED}, nor are full rollouts: {note}, then diagnose again."
        remedy = "use full rollouts, or let a pilot decide (headstart diagnose --pilot)"
        return f"{UNSUPPORTED}: {_why_not(decay)}; {remedy}."
    point = next(p for p in decay.points if p.prefix_tokens == window.tokens)
    others = "no other" if window.low == window.high else f"{window.low} to {window.high}"
    text = (
        f"Start with N = {window.tokens}; this evidence supports {others}. The "
        f"student's first {window.tokens} tokens cost {_percent(point.damage)} of the teacher's lead, of a median "
        f"response of {decay.typical_tokens}."
    )
    if plateau is not None and plateau.falls_short:
        text += (
            f" Warning: a correct opening is not enough for this student; expect a plateau near "
            f"{plateau.gift.value:.0%}, below the teacher's {decay.teacher.mean:.0%}."
        )
    note = _cut(decay, MOSTLY)
    return f"{text} Warning: {note}, then diagnose again." if note else text


def _cut(decay: DecayCurve, least: float = 0.0) -> str:
    """What the accuracies are worth, by the model whose responses were cut most; empty for a share below `least`."""
    who, share = max(("student", decay.student_cut), ("teacher", decay.teacher_cut), key=lambda cut: cut[1])
    note = cut_note(share, decay.max_tokens, "diagnosis.max_tokens", f"the {who}'s responses")
    return note if share >= least else ""


def _why_not(decay: DecayCurve) -> str:
    """The first thing that stands against every short horizon."""
    if decay.points[0].damage.value is None:
        teacher, student = decay.teacher.mean, decay.student.mean
        return f"the teacher ({teacher:.0%}) is not better than the student ({student:.0%}) beyond noise"
    short = [p for p in decay.points if 0 < p.prefix_tokens <= SHORT * decay.typical_tokens]
    if not short:
        return f"no prefix shorter than half a response ({decay.typical_tokens} tokens) was measured"
    tokens, damage = short[-1].prefix_tokens, short[-1].damage
    if any(p.damage.high >= DONE for p in short):
        return (
            f"the share of the damage done within {tokens} tokens, {_percent(damage)}, is too uncertain; "
            "probe more problems (diagnosis.problems)"
        )
    if damage.high < PROVEN:
        return f"the teacher still repairs most of what the student does in its first {tokens} tokens"
    return (
        f"the damage is spread over the response, {_percent(damage)} of it within {tokens} of "
        f"{decay.typical_tokens} tokens"
    )


def _lead(decay: DecayCurve) -> str:
    lead = decay.teacher.mean - decay.student.mean
    kind = "is right" if decay.labelled else "agrees with its own majority"
    return (
        f"Lead: the teacher {kind} on {_percent(decay.teacher)} of {decay.prompts} problems, the student on "
        f"{_percent(decay.student)}; {100 * lead:.0f} points to win."
    )


def _damage(decay: DecayCurve, window: Window | None) -> str:
    if decay.points[0].damage.value is None:
        return "Damage: not defined without a lead beyond noise."
    values = ", ".join(f"{_percent(p.damage)} at {p.prefix_tokens}" for p in decay.points if p.prefix_tokens > 0)
    end = f"90% of it first at {window.tokens}" if window else "90% of it at no short length"
    return f"Damage: share of the lead that the student's first N tokens cost: {values}; {end}."


def _signal(decay: DecayCurve, coverage: Mapping[str, int], spread: Mapping[str, Sequence[int]] | None) -> str:
    first, half = coverage["0.4"], coverage["0.5"]
    if half == 0:
        return "Signal: the two models do not differ on the student's responses."
    text = "Signal: 40 to 50% of the divergence lies within the first "
    text += f"{half} tokens" if first == half else f"{first} to {half} tokens"
    if spread is not None:
        (a, b), (c, d) = spread["0.4"], spread["0.5"]
        text += f" (95% intervals {a} to {b} and {c} to {d})"
    if half >= SPREAD * decay.median_tokens:
        text += ": spread over the response, so much of what the teacher can say lies beyond a short horizon"
    return f"{text}."


def _gift(decay: DecayCurve, plateau: Plateau) -> str:
    text = (
        f"Opening: after the teacher's first {plateau.tokens} tokens the student is right on {_percent(plateau.gift)}"
    )
    if not plateau.falls_short:
        return f"{text}, the teacher on {decay.teacher.mean:.0%}: a correct opening is enough, as far as this can tell."
    points = Estimate(*(100 * (x or 0.0) for x in astuple(plateau.shortfall)))
    return (
        f"{text}, {points:.1f} points less than the teacher: a correct opening is not enough, "
        "expect a plateau there unless training also changes the later tokens; compare with full rollouts."
    )


def _doubts(decay: DecayCurve) -> list[str]:
    """What makes these readings worth less than they look."""
    doubts = []
    if note := _cut(decay):
        doubts.append(f"{note[0].upper()}{note[1:]}.")
    if not decay.labelled:
        doubts.append(
            "Without reference answers all of this measures agreement with the teacher's majority answer, not truth; "
            "prompts.answer_column or diagnosis.task would measure truth."
        )
    if decay.left_out:
        doubts.append(f"{decay.left_out} problems could not be judged and were left out.")
    controls: tuple[tuple[str, Share, Callable[[DecayPoint], Share]], ...] = (
        ("teacher", decay.teacher, lambda p: p.after_own),
        ("student", decay.student, lambda p: p.student_continues),
    )
    for who, level, control in controls:
        point = next((p for p in decay.points if control(p).high < level.low), None)
        if point:
            doubts.append(
                f"A control is off: the {who} continuing its own first {point.prefix_tokens} tokens is right on "
                f"{_percent(control(point))} instead of {_percent(level)}, and that should change nothing; check the "
                "prompts' views with headstart preflight."
            )
    return doubts


def _percent(share: Share | Estimate) -> str:
    """A share with its interval; by noise an estimate can lie outside 0 to 1, where no share can."""
    middle = share.mean if isinstance(share, Share) else share.value or 0.0
    return format(Estimate(*(min(max(x, 0.0), 1.0) for x in (middle, share.low, share.high))), ".0%")


def _cost(cost: StepCost) -> str:
    return f"{'not timed' if cost.seconds is None else f'{cost.seconds:.2g} s'}, {cost.gib:.2g} GiB"

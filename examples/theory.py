"""Both sides of every statement of docs/explanation/theory.md, by summing over all responses of a small world.

    python -m examples.theory        # two seconds, no sampling

Responses have `length` tokens. The teacher is any table of next-token distributions, one for each context (prefix); the
student's logits are linear in its parameters, so that contexts may share them. Everything is exact in float64.
Letters of shapes: C contexts, shorter first, V tokens, D parameters, Y whole responses, T decisions, M schedules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

F64 = torch.float64
Levels = list[Tensor]
"""One tensor for each prefix length 0, 1, ...; the prefixes of a length in lexicographic order."""


@dataclass(frozen=True)
class World:
    """A teacher, a grade for each response and how a student's parameters make its logits."""

    vocabulary: int
    length: int
    features_CVD: Tensor
    """The student's logits are features_CVD @ theta_D; an identity where every logit has a parameter of its own."""
    teacher_CV: Tensor
    """The teacher's log-probabilities."""
    right_Y: Tensor
    """1 where a response is right, else 0."""

    @property
    def depth(self) -> Tensor:
        """Tokens before each context."""
        return torch.cat([torch.full((self.vocabulary**t,), t) for t in range(self.length)])

    def student(self, theta_D: Tensor) -> Tensor:
        """Log-probabilities [C, V]."""
        return torch.log_softmax(self.features_CVD @ theta_D, -1)

    def levels(self, value_C: Tensor) -> Levels:
        return list(value_C.split([self.vocabulary**t for t in range(self.length)]))


def random_world(seed: int, vocabulary: int, length: int, parameters: int | None = None) -> tuple[World, Tensor]:
    """A world and a student's parameters; without `parameters` every logit has its own and nothing is shared."""
    draw = torch.Generator().manual_seed(seed)
    C = sum(vocabulary**t for t in range(length))
    if parameters is None:
        features_CVD = torch.eye(C * vocabulary, dtype=F64).view(C, vocabulary, -1)
    else:
        features_CVD = torch.randn(C, vocabulary, parameters, generator=draw, dtype=F64) / parameters**0.5
    teacher_CV = torch.log_softmax(1.5 * torch.randn(C, vocabulary, generator=draw, dtype=F64), -1)
    right_Y = (torch.rand(vocabulary**length, generator=draw) < 0.4).double()
    theta_D = torch.randn(features_CVD.shape[-1], generator=draw, dtype=F64)
    return World(vocabulary, length, features_CVD, teacher_CV, right_Y), theta_D


def visits(world: World, logp_CV: Tensor) -> Levels:
    """Probability of every prefix of 0 .. length tokens."""
    found = [torch.ones(1, dtype=F64)]
    for rows in world.levels(logp_CV):
        found.append((found[-1][:, None] * rows.exp()).reshape(-1))
    return found


def expected(world: World, logp_CV: Tensor, cost_C: Tensor, end_Y: Tensor) -> Levels:
    """From every prefix on: the expected sum of `cost_C` over the contexts to come, its own included, and `end_Y`."""
    found = [end_Y]
    for rows, cost in zip(reversed(world.levels(logp_CV)), reversed(world.levels(cost_C)), strict=True):
        found.append(cost + (rows.exp() * found[-1].view(-1, world.vocabulary)).sum(-1))
    return found[::-1]


def divergence(world: World, logp_CV: Tensor) -> Tensor:
    """Reverse KL of student and teacher in each context [C], nats."""
    return (logp_CV.exp() * (logp_CV - world.teacher_CV)).sum(-1)


# --- (a) what a window leaves out ------------------------------------------------------------------------------------


def trained_gradient(world: World, theta_D: Tensor, first: int, end: int) -> Tensor:
    """The gradient that is trained, of the positions first .. end - 1: of the expected sum of the divergences there,
    no gradient through the distribution of contexts. By automatic differentiation."""
    theta_D = theta_D.detach().requires_grad_()
    logp_CV = world.student(theta_D)
    weight_C = torch.cat(visits(world, logp_CV)[:-1]).detach()
    weight_C = weight_C * (world.depth >= first) * (world.depth < end)
    return torch.autograd.grad((weight_C * divergence(world, logp_CV)).sum(), theta_D)[0]


def sequence_gradient(world: World, theta_D: Tensor, tokens: int) -> Tensor:
    """The gradient of the KL between whole distributions of the first `tokens` tokens. By automatic differentiation of
    the sum over all of them: the chain rule is not used."""
    theta_D = theta_D.detach().requires_grad_()
    p, q = visits(world, world.student(theta_D))[tokens], visits(world, world.teacher_CV)[tokens]
    return torch.autograd.grad((p * (p / q).log()).sum(), theta_D)[0]


@dataclass(frozen=True)
class LeftOut:
    """What the N-token window leaves out of the full sequence gradient [D]: that of predictions after N, and that of
    choosing the tokens from which later divergence follows (of which `early_choice_D` acts on contexts before N)."""

    later_D: Tensor
    choice_D: Tensor
    early_choice_D: Tensor


def left_out(world: World, theta_D: Tensor, horizon: int) -> LeftOut:
    """In closed form: the right-hand sides of (a)."""
    logp_CV = world.student(theta_D)
    p_CV, kl_C = logp_CV.exp(), divergence(world, logp_CV)
    reach_C, late_C = torch.cat(visits(world, logp_CV)[:-1]), world.depth >= horizon
    residual_CV = p_CV * (logp_CV - world.teacher_CV - kl_C[:, None])
    to_come = expected(world, logp_CV, kl_C * late_C, torch.zeros(world.vocabulary**world.length, dtype=F64))
    next_CV = torch.cat(to_come[1:]).view(-1, world.vocabulary)
    advantage_CV = p_CV * (next_CV - (p_CV * next_CV).sum(-1, keepdim=True))

    def through(rows_CV: Tensor, weight_C: Tensor) -> Tensor:
        return torch.einsum("c,cv,cvd->d", weight_C, rows_CV, world.features_CVD)

    return LeftOut(
        through(residual_CV, reach_C * late_C),
        through(advantage_CV, reach_C),
        through(advantage_CV, reach_C * ~late_C),
    )


# --- (b) accuracy ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Readings:
    """The diagnosis' four accuracies at one N, and what they are means of."""

    student: float
    recoverability: float
    gift: float
    teacher: float
    ratio: float
    """The largest quotient of a prefix's probability with the teacher and with the student, where the teacher finishes
    it better."""

    @property
    def lead(self) -> float:
        return self.teacher - self.student

    @property
    def damage(self) -> float:
        return (self.teacher - self.recoverability) / self.lead

    @property
    def gift_at_least(self) -> float:
        """The right-hand side of (b2)."""
        return self.teacher - self.ratio * (1 - self.damage) * self.lead


def values(world: World, logp_CV: Tensor, tokens: int) -> Tensor:
    """Probability of a right response from each prefix of `tokens` tokens on."""
    return expected(world, logp_CV, torch.zeros(len(logp_CV), dtype=F64), world.right_Y)[tokens]


def readings(world: World, theta_D: Tensor, horizon: int) -> Readings:
    logp_CV = world.student(theta_D)
    p, q = visits(world, logp_CV)[horizon], visits(world, world.teacher_CV)[horizon]
    own, taught = values(world, logp_CV, horizon), values(world, world.teacher_CV, horizon)
    means = [float((weight * value).sum()) for weight in (p, q) for value in (own, taught)]
    return Readings(*means, ratio=float((q / p * (taught > own)).max()))


def accuracy(world: World, theta_D: Tensor) -> float:
    """By summing over whole responses."""
    return float((visits(world, world.student(theta_D))[-1] * world.right_Y).sum())


@dataclass(frozen=True)
class AfterTraining:
    """Accuracy after training as gift + opening + tail, exact, and the bound on |opening|."""

    gift: float
    opening: float
    """The trained student's openings instead of the teacher's, finished by the student as it was before."""
    tail: float
    """The change of how the student finishes the openings that it now writes."""
    opening_at_most: float


def after_training(world: World, before_D: Tensor, after_D: Tensor, horizon: int) -> AfterTraining:
    new, old = world.student(after_D), world.student(before_D)
    p, q = visits(world, new)[horizon], visits(world, world.teacher_CV)[horizon]
    value, now = values(world, old, horizon), values(world, new, horizon)
    kl = float((p * (p / q).log()).sum())
    distance = min(kl / 2, 1 - math.exp(-kl)) ** 0.5
    spread = float(value.max() - value.min())
    return AfterTraining(
        float((q * value).sum()), float(((p - q) * value).sum()), float((p * (now - value)).sum()), spread * distance
    )


# --- (c) cascading alignment -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """A change of the expected divergence beyond N (sum over positions, nats)."""

    mixture: float
    within: float


def cascade(world: World, before_D: Tensor, after_D: Tensor, horizon: int) -> Parts:
    """With single contexts as modes; the parts add up to the whole change."""
    old, new = world.student(before_D), world.student(after_D)
    late_C = (world.depth >= horizon).double()
    p, p_new = (torch.cat(visits(world, logp)[:-1]) * late_C for logp in (old, new))
    kl, kl_new = divergence(world, old), divergence(world, new)
    return Parts(float(((p_new - p) * (kl + kl_new)).sum() / 2), float(((p + p_new) * (kl_new - kl)).sum() / 2))


def first_order(world: World, theta_D: Tensor, horizon: int) -> Parts:
    """The parts' rates of change along a step against the trained gradient: the right-hand sides of (c2)."""
    gradient_D, rest = trained_gradient(world, theta_D, 0, horizon), left_out(world, theta_D, horizon)
    return Parts(-float(gradient_D @ rest.choice_D), -float(gradient_D @ rest.later_D))


def alignment(world: World, theta_D: Tensor) -> Tensor:
    """For each pair of contexts what a step in one does to the other's divergence [C, C]: P(s) P(s') r_s' K r_s', with
    r the gradient of the divergence in the logits and K the inner products of the features."""
    logp_CV = world.student(theta_D)
    p_CV, reach_C = logp_CV.exp(), torch.cat(visits(world, logp_CV)[:-1])
    residual_CV = p_CV * (logp_CV - world.teacher_CV - divergence(world, logp_CV)[:, None])
    rows_CD = torch.einsum("c,cv,cvd->cd", reach_C, residual_CV, world.features_CVD)
    return rows_CD @ rows_CD.T


# --- (d) sub-mode commitment -----------------------------------------------------------------------------------------


def mode_weights(world: World, theta_D: Tensor, horizon: int) -> Tensor:
    """Weights of the first token [V] that minimise the KL over `horizon` tokens, later predictions given: (d1)."""
    logp_CV = world.student(theta_D)
    kl_C = divergence(world, logp_CV) * (world.depth >= 1) * (world.depth < horizon)
    cost_V = expected(world, logp_CV, kl_C, torch.zeros(world.vocabulary**world.length, dtype=F64))[1]
    return torch.softmax(world.teacher_CV[0] - cost_V, 0)


def blind_world(length: int, margin: float, share: float) -> World:
    """Two modes, begun by the first token, which the teacher draws with (share, 1 - share) and then repeats with log
    odds `margin`. The student has one logit z for all contexts: token 0 with sigmoid(z), whatever came before."""
    halves = [sign * margin for t in range(1, length) for sign in (1,) * 2 ** (t - 1) + (-1,) * 2 ** (t - 1)]
    logit_C = torch.tensor([math.log(share / (1 - share)), *halves], dtype=F64)
    features_CVD = torch.tensor([0.5, -0.5], dtype=F64)[None, :, None].expand(len(logit_C), 2, 1)
    teacher_CV = torch.log_softmax(torch.stack([logit_C, torch.zeros_like(logit_C)], -1), -1)
    return World(2, length, features_CVD, teacher_CV, torch.ones(2**length, dtype=F64))


def resting_points(horizon: int, margin: float, share: float) -> list[float]:
    """The z at which the trained gradient of the blind student is zero, by bisection: the equation of (d3)."""
    prior = math.log(share / (1 - share))

    def slope(z: float) -> float:
        return horizon * z - prior - (horizon - 1) * margin * math.tanh(z / 2)

    widest = margin + abs(prior) + 1.0
    grid = [widest * (2 * i / 4001 - 1) for i in range(4002)]
    found = []
    for low, high in pairwise(grid):
        if slope(low) * slope(high) <= 0:
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if slope(low) * slope(middle) > 0 else (low, middle)
            found.append(low)
    return found


def main() -> None:
    print("both sides of the statements in docs/explanation/theory.md: 3 ids, 4 tokens, N = 2")
    for name, parameters in (("nothing shared", None), ("6 parameters", 6)):
        world, start_D = random_world(0, vocabulary=3, length=4, parameters=parameters)
        rest, gradient_D = left_out(world, start_D, 2), trained_gradient(world, start_D, 0, 2)
        trained = trained_gradient(world, start_D, 2, 4)
        whole = sequence_gradient(world, start_D, 4) - sequence_gradient(world, start_D, 2)
        print(f"{name}\n  (a1) norm of the trained gradient's rest: {trained.norm():.5f} = {rest.later_D.norm():.5f}")
        print(f"  (a2) the sequence gradient's: {whole.norm():.5f} = {(rest.later_D + rest.choice_D).norm():.5f}")
        done = after_training(world, start_D, start_D - 0.5 * gradient_D, 2)
        after = accuracy(world, start_D - 0.5 * gradient_D)
        print(f"  (b1) accuracy {after:.4f} = {done.gift:.4f} {done.opening:+.4f} {done.tail:+.4f}", end="; ")
        print(f"opening at most {done.opening_at_most:.4f}")
        moved, rate = cascade(world, start_D, start_D - 1e-4 * gradient_D, 2), first_order(world, start_D, 2)
        print(f"  (c2) mixture {moved.mixture / 1e-4:+.4f} ~ {rate.mixture:+.4f}", end="; ")
        print(f"within {moved.within / 1e-4:+.4f} ~ {rate.within:+.4f}")
    free, theta_D = random_world(0, vocabulary=3, length=4)
    q, p = visits(free, free.teacher_CV)[-1], visits(free, free.student(theta_D))[-1]
    one = (torch.arange(81) == (q / p).argmax()).double()
    found = readings(replace(free, right_Y=one), theta_D, 2)
    print(f"(b2) one right response: gift {found.gift:.5f} = {found.gift_at_least:.5f}")
    for n in (1, 2, 4):
        print(f"(d1) N = {n}: weights of the modes {[round(float(w), 3) for w in mode_weights(free, theta_D, n)]}")
        print(f"(d3) N = {n}: the blind student rests at {[round(z, 3) for z in resting_points(n, 3.5, 0.5)]}")


if __name__ == "__main__":
    main()

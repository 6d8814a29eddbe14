"""Are exactly the weights trainable that the configuration names, and does a gradient reach every one of them?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headstart.config.schema import LoraTuning
from headstart.diagnose.pair import Pair
from headstart.diagnose.preflight.findings import Finding
from headstart.models.causal import CausalModel
from headstart.models.lora import adapted, unwrap
from headstart.records import Rollout

CHECK = "trainable weights"
SHOWN = 3
LARGE = 0.25
"""Share of the weights in fused experts without an adapter from which a warning is said."""


def trainable(pair: Pair) -> list[Finding]:
    """What is trainable against what `tuning` asks for; the output head's tie is told."""
    trained = pair.student.trainable()
    count = sum(p.numel() for p in trained.values())
    total = sum(p.numel() for p in pair.student.model.parameters())
    base = unwrap(pair.student.model)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    figures: dict[str, Any] = {"trainable": count, "parameters": total, "tensors": len(trained), "tied_head": tied}
    lora = isinstance(pair.config.tuning, LoraTuning)
    wrong = _surplus(trained) if lora else _frozen(pair.student)
    if wrong or not trained:
        kind = "beyond the adapter are trainable" if lora else "are frozen although tuning.type is full"
        return [
            Finding(
                CHECK,
                "blocking",
                f"{len(wrong)} weights {kind} ({', '.join(wrong[:SHOWN])})" if trained else "no weight is trainable",
                "load the student through headstart.build, or reset requires_grad to what tuning asks for",
                figures | {"wrong": wrong[:10]},
            )
        ]
    text = f"{count:,} of {total:,} parameters are trainable, in {len(trained)} tensors; {_head_told(pair, tied)}"
    if not isinstance(pair.config.tuning, LoraTuning):
        return [Finding(CHECK, "ok", text, None, figures)]
    told, shares = _beside_adapters(pair.student.model)
    found = Finding(CHECK, "ok", f"{text}; {told}", None, figures | shares)
    if shares["fused_without_adapter"] > LARGE:
        message, remedy = (
            f"no adapter changes the fused experts; {told}",
            "set tuning.type=full, or train the rest alone",
        )
        found = replace(found, severity="warning", message=message, remedy=remedy)
    return [found, *_targets(pair.config.tuning, pair.student.model)]


def gradients(pair: Pair, rollouts: Sequence[Rollout]) -> Finding:
    """One backward of the rollouts' mean negative log-likelihood: every trainable tensor must get a finite gradient
    that is not zero.

    The likelihood, not the divergence: that is rightly zero where student and teacher agree. A LoRA A whose B is still
    zero gets none, which is its normal start.
    """
    student = pair.student
    batch = student.batch(rollouts, "student")
    trained = student.trainable()
    with torch.enable_grad():
        logits_MV = student.head(student.completion_hidden(batch))
        loss = torch.nn.functional.cross_entropy(logits_MV, batch.tokens_M)
        found: tuple[Tensor | None, ...] = (None,) * len(trained)
        if loss.requires_grad:  # else it depends on no trainable weight at all
            found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    broken = [name for name, g in zip(trained, found, strict=True) if g is not None and not bool(g.isfinite().all())]
    waiting = _waiting(trained)
    dead = [name for name, g in zip(trained, found, strict=True) if _zero(g) and name not in waiting]
    figures = {"tensors": len(trained), "waiting": len(waiting), "zero": dead[:10], "not_finite": broken[:10]}
    if broken:
        return Finding(
            "gradients",
            "blocking",
            f"the gradient of {len(broken)} weights is not finite ({', '.join(broken[:SHOWN])})",
            "use student.dtype=bfloat16 or float32 instead of float16, or student.attention=eager",
            figures,
        )
    if dead:
        return Finding(
            "gradients",
            "blocking" if len(dead) + len(waiting) == len(trained) else "warning",
            f"no gradient reaches {len(dead)} of {len(trained)} trainable weights ({', '.join(dead[:SHOWN])})",
            "leave them out (tuning.targets), or check that the checkpoint's code uses them; experts of a mixture that "
            "no token of this small batch chose are harmless",
            figures,
        )
    note = f" ({len(waiting)} LoRA matrices follow once their partner has moved from zero)" if waiting else ""
    return Finding("gradients", "ok", f"a finite gradient reaches all {len(trained)} weights{note}", None, figures)


def _surplus(trained: dict[str, nn.Parameter]) -> list[str]:
    return [name for name in trained if ".lora_" not in name]


def _frozen(student: CausalModel) -> list[str]:
    return [name for name, p in student.model.named_parameters() if not p.requires_grad]


def _targets(tuning: LoraTuning, model: Any) -> list[Finding]:
    """Targets that fit no module: as long as one of the list fits, peft says nothing of the others."""
    if isinstance(tuning.targets, str):
        return []
    modules, sought = adapted(model), model.peft_config["default"].target_modules  # without parts of fused experts
    missing = [t for t in tuning.targets if t in sought and not any(name.endswith(f".{t}") for name in modules)]
    if not missing:
        return []
    return [
        Finding(
            CHECK,
            "blocking",
            f"tuning.targets names {', '.join(missing)}, which fits no layer of the student: it is not adapted",
            "correct the name; adapted are " + ", ".join(sorted({name.rpartition(".")[2] for name in modules})),
            {"missing": missing},
        )
    ]


def _beside_adapters(model: Any) -> tuple[str, dict[str, Any]]:
    """Shares of the base weights with an adapter beside them and without, by kind of module: told, and as figures."""
    adapters = {id(weight) for weight in adapted(model).values()}
    shares: dict[bool, dict[str, float]] = {True: defaultdict(float), False: defaultdict(float)}
    weights = [(name, weight) for name, weight in model.named_parameters() if ".lora_" not in name]
    total, fused = sum(weight.numel() for _, weight in weights), 0.0
    for name, weight in weights:
        beside, modules = id(weight) in adapters, name.replace(".base_layer", "").split(".")[:-1]
        shares[beside][next(m for m in reversed(modules) if not m.isdigit())] += weight.numel() / total
        fused += 0 if beside or weight.dim() < 3 else weight.numel() / total
    told = [
        f"{sum(kinds.values()):.0%} ({', '.join(f'{kind} {n:.0%}' for kind, n in kinds.items() if n > 0.005)})"
        for kinds in shares.values()
    ]
    figures = {"adapted": dict(shares[True]), "without_adapter": dict(shares[False]), "fused_without_adapter": fused}
    return f"adapters stand beside {told[0]} of the weights, not beside {told[1]}", figures


def _waiting(trained: dict[str, nn.Parameter]) -> set[str]:
    """Names of adapter matrices whose partner is all zero: B of a linear layer, A of an embedding."""
    partners = {n: n.replace("_A.", "_B.") if "_A." in n else n.replace("_B.", "_A.") for n in trained}
    return {name for name, other in partners.items() if other in trained and not bool(trained[other].any())}


def _zero(gradient: Tensor | None) -> bool:
    return gradient is None or not bool(gradient.any())


def _head_told(pair: Pair, tied: bool) -> str:
    if not pair.student.trained_head().parameters:
        return "the output head stays as it is"
    return "the output head is trained" + (", tied to the input embeddings (one weight)" if tied else "")

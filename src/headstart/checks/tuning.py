"""Are exactly the weights trainable that the configuration names, and does a gradient reach every one of them?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from headstart.assemble.pair import Pair
from headstart.checks.findings import Finding, Severity
from headstart.config.schema import LoraTuning
from headstart.models.lora import adapted, unwrap
from headstart.records import Rollout

CHECK = "trainable weights"
SHOWN = 3
LARGE = 0.25
"""Share of the weights in fused experts without an adapter that is worth a warning."""


def trainable(pair: Pair, rollouts: Sequence[Rollout] = ()) -> list[Finding]:
    """What is trainable against what `tuning` asks for; with `rollouts` also whether a gradient reaches it."""
    trained, tuning = pair.student.trainable(), pair.config.tuning
    base = unwrap(pair.student.model)
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    total, count = (sum(p.numel() for p in ps) for ps in (pair.student.model.parameters(), trained.values()))
    figures: dict[str, Any] = {"trainable": count, "parameters": total, "tensors": len(trained), "tied_head": tied}
    if isinstance(tuning, LoraTuning):
        wrong, kind = [name for name in trained if ".lora_" not in name], "beyond the adapter are trainable"
    else:
        wrong = [name for name, p in pair.student.model.named_parameters() if not p.requires_grad]
        kind = "are frozen although tuning.type is full"
    if not trained or wrong:
        message = f"{len(wrong)} weights {kind} ({', '.join(wrong[:SHOWN])})" if trained else "no weight is trainable"
        remedy = "load the student through headstart.Pair, or reset requires_grad to what tuning asks for"
        findings = [Finding(CHECK, "blocking", message, remedy, figures | {"wrong": wrong[:10]})]
    else:
        head = "stays as it is"
        if pair.student.head_parameters:
            head = "is trained, tied to the input embeddings (one weight)" if tied else "is trained"
        text = f"{count:,} of {total:,} parameters are trainable, in {len(trained)} tensors; the output head {head}"
        if isinstance(tuning, LoraTuning):
            findings = [_beside_adapters(pair.student.model, text, figures), *_targets(tuning, pair.student.model)]
        else:
            findings = [Finding(CHECK, "ok", text, None, figures)]
    return [*findings, _gradients(pair, trained, rollouts)] if trained and rollouts else findings


def _gradients(pair: Pair, trained: dict[str, nn.Parameter], rollouts: Sequence[Rollout]) -> Finding:
    """One backward of the rollouts' mean negative log-likelihood: every trainable tensor must get a finite gradient
    that is not zero.

    The likelihood, not the divergence: that is rightly zero where student and teacher agree. A LoRA A whose B is still
    zero gets none, which is its normal start.
    """

    def finding(severity: Severity, message: str, remedy: str | None = None) -> Finding:
        return Finding("gradients", severity, message, remedy, figures)

    student = pair.student
    batch = student.batch(rollouts, "student")
    with torch.enable_grad():
        loss = cross_entropy(student.head(student.completion_hidden(batch)), batch.tokens_M)
        gradients: tuple[Tensor | None, ...] = (None,) * len(trained)
        if loss.requires_grad:  # else it depends on no trainable weight at all
            gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    of = dict(zip(trained, gradients, strict=True))
    waiting = _waiting(trained)
    broken = [name for name, g in of.items() if g is not None and not bool(g.isfinite().all())]
    dead = [name for name, g in of.items() if (g is None or not bool(g.any())) and name not in waiting]
    figures = {"tensors": len(trained), "waiting": len(waiting), "zero": dead[:10], "not_finite": broken[:10]}
    if broken:
        return finding(
            "blocking",
            f"the gradient of {len(broken)} weights is not finite ({', '.join(broken[:SHOWN])})",
            "use student.dtype=bfloat16 or float32 instead of float16, or student.attention=eager",
        )
    if dead:
        return finding(
            "blocking" if len(dead) + len(waiting) == len(trained) else "warning",
            f"no gradient reaches {len(dead)} of {len(trained)} trainable weights ({', '.join(dead[:SHOWN])})",
            "leave them out (tuning.targets), or check that the checkpoint's code uses them; experts of a mixture that "
            "no token of this small batch chose are harmless",
        )
    note = f" ({len(waiting)} LoRA matrices follow once their partner has moved from zero)" if waiting else ""
    return finding("ok", f"a finite gradient reaches all {len(trained)} weights{note}")


def _targets(tuning: LoraTuning, model: Any) -> list[Finding]:
    """Targets that fit no module: as long as one of the list fits, peft says nothing of the others."""
    if isinstance(tuning.targets, str):
        return []
    modules, sought = adapted(model), model.peft_config["default"].target_modules  # without parts of fused experts
    missing = [t for t in tuning.targets if t in sought and not any(name.endswith(f".{t}") for name in modules)]
    if not missing:
        return []
    message = f"tuning.targets names {', '.join(missing)}, which fits no layer of the student: it is not adapted"
    remedy = "correct the name; adapted are " + ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
    return [Finding(CHECK, "blocking", message, remedy, {"missing": missing})]


def _beside_adapters(model: Any, text: str, figures: dict[str, Any]) -> Finding:
    """Shares of the base weights with an adapter beside them and without, by kind of module, after `text`."""
    adapters = {id(weight) for weight in adapted(model).values()}
    shares: dict[bool, dict[str, float]] = {True: defaultdict(float), False: defaultdict(float)}
    weights = [(name, weight) for name, weight in model.named_parameters() if ".lora_" not in name]
    total, fused = sum(weight.numel() for _, weight in weights), 0.0
    for name, weight in weights:
        beside, modules = id(weight) in adapters, name.replace(".base_layer", "").split(".")[:-1]
        shares[beside][next(m for m in reversed(modules) if not m.isdigit())] += weight.numel() / total
        fused += 0 if beside or weight.dim() < 3 else weight.numel() / total
    beside_of, without = (
        f"{sum(kinds.values()):.0%} ({', '.join(f'{kind} {n:.0%}' for kind, n in kinds.items() if n > 0.005)})"
        for kinds in shares.values()
    )
    where = f"adapters stand beside {beside_of} of the weights, not beside {without}"
    figures = figures | {"adapted": dict(shares[True]), "without_adapter": dict(shares[False])}
    figures["fused_without_adapter"] = fused
    if fused > LARGE:
        message, remedy = (
            f"no adapter changes the fused experts; {where}",
            "set tuning.type=full, or train the rest alone",
        )
        return Finding(CHECK, "warning", message, remedy, figures)
    return Finding(CHECK, "ok", f"{text}; {where}", None, figures)


def _waiting(trained: dict[str, nn.Parameter]) -> set[str]:
    """Names of adapter matrices whose partner is all zero: B of a linear layer, A of an embedding."""
    partners = {n: n.replace("_A.", "_B.") if "_A." in n else n.replace("_B.", "_A.") for n in trained}
    return {name for name, other in partners.items() if other in trained and not bool(trained[other].any())}

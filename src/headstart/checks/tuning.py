"""Are exactly the weights trainable that the configuration names, and does a gradient reach every one of them?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headstart.assemble.pair import Pair
from headstart.checks.findings import Finding
from headstart.config.schema import LoraTuning
from headstart.models.causal import CausalModel
from headstart.models.lora import unwrap
from headstart.records import Rollout

CHECK = "trainable weights"
SHOWN = 3


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
                "load the student through headstart.Pair, or reset requires_grad to what tuning asks for",
                figures | {"wrong": wrong[:10]},
            )
        ]
    head = _head_told(pair, tied)
    text = f"{count:,} of {total:,} parameters are trainable, in {len(trained)} tensors; {head}"
    found = [Finding(CHECK, "ok", text, None, figures)]
    if isinstance(pair.config.tuning, LoraTuning):
        found += _targets(pair.config.tuning, trained)
    return found


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
    note = f" ({len(waiting)} LoRA A matrices follow once their B has moved from zero)" if waiting else ""
    return Finding("gradients", "ok", f"a finite gradient reaches all {len(trained)} weights{note}", None, figures)


def _surplus(trained: dict[str, nn.Parameter]) -> list[str]:
    return [name for name in trained if ".lora_" not in name]


def _frozen(student: CausalModel) -> list[str]:
    return [name for name, p in student.model.named_parameters() if not p.requires_grad]


def _targets(tuning: LoraTuning, trained: dict[str, nn.Parameter]) -> list[Finding]:
    """Targets that fit no module: as long as one of the list fits, peft says nothing of the others."""
    if isinstance(tuning.targets, str):
        return []
    adapted = {name.split(".lora_")[0] for name in trained}
    missing = [t for t in tuning.targets if not any(module.endswith(f".{t}") for module in adapted)]
    if not missing:
        return []
    return [
        Finding(
            CHECK,
            "blocking",
            f"tuning.targets names {', '.join(missing)}, which fits no layer of the student: it is not adapted",
            "correct the name; adapted are " + ", ".join(sorted({name.rpartition(".")[2] for name in adapted})),
            {"missing": missing},
        )
    ]


def _waiting(trained: dict[str, nn.Parameter]) -> set[str]:
    """Names of LoRA A matrices whose B is all zero."""
    pairs = {name: name.replace(".lora_A.", ".lora_B.") for name in trained if ".lora_A." in name}
    return {a for a, b in pairs.items() if b in trained and not bool(trained[b].any())}


def _zero(gradient: Tensor | None) -> bool:
    return gradient is None or not bool(gradient.any())


def _head_told(pair: Pair, tied: bool) -> str:
    if not pair.student.trained_head().parameters:
        return "the output head stays as it is"
    return "the output head is trained" + (" and tied to the input embeddings, which move with it" if tied else "")

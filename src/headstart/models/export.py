"""The final model as anyone can load it: Hugging Face format, tokenizer, generation config and a model card."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined

from headstart.config.schema import Config
from headstart.models.images import reader_of
from headstart.models.lora import folded_weights, merge, save_adapter, unwrap
from headstart.models.quiet import quiet
from headstart.ranks.shards import whole_copy
from headstart.records import EvalReport

CARD = """\
---
library_name: transformers
pipeline_tag: {{ 'image-text-to-text' if config.sees else 'text-generation' }}
{% if on_hub %}base_model: {{ config.student.path }}
{% endif %}tags: [distillation, on-policy-distillation, early-stopping-rollout, headstart]
---
# {{ config.student.path }}, distilled from {{ teachers | map(attribute="path") | join(" and ") }}

On-policy distillation with Headstart {{ version }}: the student sampled
its own responses, the teacher scored every sampled position, and the student minimised the
{{ config.divergence.type }} divergence there.

| | |
|---|---|
| student | {{ config.student.path }}{{ " @ " + config.student.revision if config.student.revision else "" }} |
{% for teacher in teachers -%}
| teacher | {{ teacher.path }}{{ " @ " + teacher.revision if teacher.revision else "" }} |
{% endfor -%}
| tuning | {{ tuning }} |
| horizon | {{ horizon }} |
| divergence | {{ config.divergence.type }}, support {{ config.divergence.support.type }} |
| rollouts | temperature {{ config.rollout.temperature }}, top-p {{ config.rollout.top_p }}, top-k \
{{ config.rollout.top_k or "off" }}, {{ config.rollout.samples_per_prompt }} per prompt |
| steps | {{ config.training.steps }} with {{ config.training.prompts_per_step }} prompts each, \
peak learning rate {{ config.learning_rate }} |
| prompts | {{ config.prompts.source }} |
| generated tokens | {{ generated_tokens }} |
| seed | {{ config.training.seed }} |
| weights | {{ weights }} |
{% if after %}| accuracy | {{ "%.1f%%" | format(100 * after.accuracy) }} \
[{{ "%.1f" | format(100 * after.interval[0]) }}, {{ "%.1f" | format(100 * after.interval[1]) }}] on {{ after.task }} \
({{ after.problems }} problems x {{ after.samples }}) |
{% endif %}
Generation stops at token ids {{ stop_ids | join(", ") }}. The student's and the teacher's licences apply.
{% if adapter_only %}
This folder holds a LoRA adapter; load it with `peft.AutoPeftModelForCausalLM.from_pretrained`.
{% endif %}"""


def model_card(
    config: Config,
    version: str,
    generated_tokens: int,
    after: EvalReport | None,
    stop_ids: tuple[int, ...],
    weights: str,
) -> str:
    """README.md of an exported model: how it was made, in enough detail to make it again. `weights` says their type."""
    t, h, student = config.tuning, config.horizon, config.student.path
    tuning = f"LoRA r {t.r}, alpha {t.alpha:g}, dropout {t.dropout:g}" if t.type == "lora" else "all weights"
    kinds = {"fixed": "first {} completion tokens", "full": "full rollouts up to {} tokens", "custom": "custom"}
    horizon = kinds.get(h.type, f"{h.type}, at most {{}} completion tokens")
    template = Environment(undefined=StrictUndefined, keep_trailing_newline=True).from_string(CARD)
    return template.render(
        config=config,
        teachers=config.teachers or (config.teacher,),
        on_hub=student.count("/") == 1 and student[0] not in "/.~" and not Path(student).exists(),  # it refuses others
        version=version,
        generated_tokens=f"{generated_tokens:,}",
        after=after,
        stop_ids=stop_ids,
        weights=weights,
        tuning=tuning,
        horizon=horizon.format(h.longest),
        adapter_only=config.output.format == "adapter",
    )


def exportable(model: Any, format: str) -> Any:
    """What `export_model` can write of the student's model: a whole copy on rank 0 where it is sharded (collective), of
    its adapter alone where nothing else is written; else the model itself."""
    return whole_copy(model, trained_only=format == "adapter")


def written_dtype(model: Any, asked: str, stored: torch.dtype | None) -> torch.dtype:
    """The type that merged weights are written in: the one `asked` for; with auto the trained one, or the one `stored`
    in the student's checkpoint where that is smaller. Float16 that cannot hold every weight is the trained one."""
    trained: torch.dtype = unwrap(model).dtype
    dtype: torch.dtype = trained if asked == "auto" else getattr(torch, asked)
    if asked == "auto" and stored is not None and stored.itemsize < trained.itemsize:
        dtype = stored
    if dtype == torch.float16 and any(p.abs().max() > torch.finfo(dtype).max for p in unwrap(model).parameters()):
        warnings.warn(f"some weights are too large for float16: model/ is written in {trained}", stacklevel=2)
        return trained
    return dtype


def _cast(model: Any, dtype: torch.dtype) -> None:
    """Floating-point weights in `dtype`, but for those that the architecture keeps in float32."""
    kept = {*(model._keep_in_fp32_modules_strict or ()), *(model._keep_in_fp32_modules or ())}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not kept.intersection(name.split(".")):
            parameter.data = parameter.data.to(dtype)


def export_model(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    format: str,
    stop_ids: tuple[int, ...],
    card: str,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the student to `folder`: merged weights (in `dtype`), the adapter, or both (the adapter in `adapter/`).

    The generation config stops at every id of the shared stop class. Merging changes `model` in place, so this is the
    last thing a run does.
    """
    folder.mkdir(parents=True)
    _stop_at(unwrap(model).generation_config, stop_ids)
    with quiet():
        if format != "merged":
            save_adapter(model, folder if format == "adapter" else folder / "adapter")
        if format != "adapter":
            merged = merge(model)
            _say_untied(merged)
            if dtype is not None:
                _cast(merged, dtype)
            merged.save_pretrained(folder)
        else:
            unwrap(model).generation_config.save_pretrained(folder)
        reader = reader_of(tokenizer)
        (tokenizer if reader is None else reader.processor).save_pretrained(folder)
    # After the adapter, whose own README (an empty form) it replaces.
    (folder / "README.md").write_text(card, encoding="utf-8")


def save_weights(model: Any, folder: Path) -> None:
    """Write the student as a whole checkpoint, an adapter folded in, and leave the model as it is."""
    base = unwrap(model)
    _say_untied(base)
    with quiet():
        base.save_pretrained(folder, state_dict=folded_weights(model))


def _say_untied(model: Any) -> None:
    """A checkpoint may hold both embeddings although its configuration ties them; whoever ties them loses one."""
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def _stop_at(generation_config: Any, stop_ids: tuple[int, ...]) -> None:
    generation_config.eos_token_id = list(stop_ids)
    try:
        generation_config.validate(strict=True)
    except ValueError:
        # Some checkpoints name a temperature but not do_sample, which transformers reads and then refuses to write.
        generation_config.do_sample = True

"""The part of the schema that says how rollouts are sampled, and where. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from headstart.config.horizon import needs_probes
from headstart.config.section import Count, Section, Share
from headstart.records import Sampling

if TYPE_CHECKING:
    from headstart.config.schema import Config


class MixConfig(Section):
    """Who writes the responses that are trained on, as shares of the prompts."""

    student: Share | None = None
    """The student samples: on-policy distillation. Null is what the others leave."""
    teacher: Share = 0.0
    """The teacher samples, once for each prompt; the text is kept in the run folder."""
    given: Share = 0.0
    """The text that comes with the prompt: prompts.completion_column, or the reference solution of a benchmark."""

    @property
    def own(self) -> float:
        """The student's share."""
        return max(0.0, 1.0 - self.teacher - self.given) if self.student is None else self.student


class RolloutConfig(Section):
    temperature: Annotated[float, Field(ge=0.0)] = 0.7
    """Sampling temperature; 0 is greedy. The divergence always uses raw logits (temperature 1)."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Keep the smallest set of tokens with this much probability; 1 keeps all."""
    top_k: Count = 0
    """Keep the k most probable tokens; 0 keeps all."""
    samples_per_prompt: PositiveInt = 1
    """Rollouts per prompt; the prompt is encoded once for all of them."""
    batch_size: PositiveInt | None = None
    """Rollouts decoded at once; null decodes the whole step together."""
    mix: MixConfig = MixConfig()
    """Who writes the responses that are trained on, as shares of the prompts. Every text is cut at the horizon."""
    engine: Literal["in_process", "server"] = "in_process"
    """Where a run's rollouts and evaluations are sampled: from the weights that are trained, or by vLLM servers that
    get them after every step. Probes, and the readings of diagnose and explain, always sample in process."""
    urls: tuple[str, ...] = ()
    """Replicas of the server, such as [http://node7:8000]; requests go round, and each gets the weights."""
    sync: Literal["adapter", "checkpoint"] | None = None
    """How servers get the weights: a LoRA adapter's folder, or a whole checkpoint's; null is adapter with LoRA."""
    sync_dir: Path | None = None
    """Folder for the weights on their way, which trainer and servers must see under the same path."""
    timeout: PositiveFloat | None = None
    """Seconds that a server may take for one rollout; null is 600."""

    @property
    def sampling(self) -> Sampling:
        """How a token of a rollout is drawn."""
        return Sampling(self.temperature, self.top_p, self.top_k)


def server_problems(rollout: RolloutConfig, tuning: str) -> Iterator[str]:
    """What is wrong with the settings of a rollout server beside `tuning` (lora or full), one line each."""
    if rollout.engine == "in_process":
        for name, value in (
            ("urls", rollout.urls),
            *((n, getattr(rollout, n)) for n in ("sync", "sync_dir", "timeout")),
        ):
            if value:
                shown = list(value) if name == "urls" else value
                yield f"rollout.{name}: found {shown} beside engine in_process; leave it out, or set engine server"
        return
    if not rollout.urls:
        yield "rollout.urls: found none beside engine server; name the servers, such as [http://localhost:8000]"
    if rollout.sync_dir is None:
        yield (
            "rollout.sync_dir: found null beside engine server; name a folder that trainer and servers see under the "
            "same absolute path (a shared file system, or any folder on one machine)"
        )
    bad = [url for url in rollout.urls if not url.startswith(("http://", "https://"))]
    if bad:
        yield f"rollout.urls: found {', '.join(bad)}; give them as http://host:port"
    if rollout.sync == "adapter" and tuning != "lora":
        yield "rollout.sync: adapter needs tuning.type lora (found full); use sync checkpoint"


def mix_problems(config: Config) -> Iterator[str]:
    """What is wrong with text that the student did not write, and with training on nothing but its tokens."""
    mix, d, columns = config.rollout.mix, config.divergence, [s.completion_column for s in config.prompts.sources]
    own = mix.own
    if not isclose(total := own + mix.teacher + mix.given, 1.0, abs_tol=1e-6):
        shares = f"student {own:g}, teacher {mix.teacher:g}, given {mix.given:g}"
        yield f"rollout.mix: the shares must sum to 1, and these sum to {total:g} ({shares})"
    if not mix.given and any(columns):
        yield "prompts.completion_column: found, but no prompt is trained on its text; set rollout.mix={given: 1}"
    if d.type == "sft" and own:
        yield (
            f"divergence.type: sft trains on the text of others, and the student writes {own:.0%} of it; set "
            "rollout.mix to {given: 1}, {teacher: 1} or both in part, or use reverse_kl"
        )
    if d.type == "sft" and (needs_probes(config.horizon) or config.horizon.type == "overlap" or config.probes.every):
        yield (
            f"divergence.type: sft asks no teacher, but horizon {config.horizon.type} with probes.every "
            f"{config.probes.every} goes by one; use horizon {{type: fixed}} without probes"
        )
    if d.type == "sft" and config.selection.type == "top" and "teacher_entropy" in config.selection.by:
        yield "selection.by: teacher_entropy is not known with divergence sft; use another signal"
    if own == 1.0:
        return
    if getattr(d.support, "type", "full") == "sampled" or getattr(d.support, "tail", "bucket") == "unbiased":
        yield (
            f"divergence.support: found {d.support.type} beside rollout.mix, which is right in the mean only for "
            "tokens that the student drew; use {type: full}, or {type: top_k, tail: bucket}"
        )
    if config.teacher.type == "server":
        yield "rollout.mix: a teacher at a URL scores only what the student drew; load it here (teacher.path)"
    if config.rollout.engine == "server":
        yield "rollout.mix: found beside rollout.engine server; use engine in_process, or leave mix out"
    if config.probes.every or needs_probes(config.horizon):
        kind = f"horizon {config.horizon.type} with probes.every {config.probes.every}"
        yield f"rollout.mix: found beside {kind}; probes finish what the student wrote: use horizon {{type: fixed}}"
    if mix.teacher and config.horizon.longest is None:
        yield "horizon.arguments: the teacher writes text as long as this horizon can ask for; give it max_tokens"
    if mix.given and config.rollout.samples_per_prompt > 1:
        samples = config.rollout.samples_per_prompt
        yield f"rollout.samples_per_prompt: found {samples}, but rollout.mix.given has one text to a prompt; set 1"

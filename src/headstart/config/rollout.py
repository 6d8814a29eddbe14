"""The part of the schema that says how rollouts are sampled, and where. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from headstart.config.section import Count, Section
from headstart.records import Sampling


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

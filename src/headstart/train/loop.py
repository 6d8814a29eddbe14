"""The training loop: evaluate, step, record, checkpoint; stop in good order; leave a model behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError

from headstart.config.differences import differences
from headstart.errors import CheckpointError, Interrupted, RunFolderError, ServerError, StopRequested
from headstart.files import atomic_folder, write_atomic, write_json
from headstart.models.causal import CausalModel
from headstart.models.export import exportable
from headstart.progress import doing, shown
from headstart.ranks.shards import any_sharded
from headstart.records import EvalReport
from headstart.tracking import evaluation_fields
from headstart.train.checkpoint import Checkpoint, ShardedCheckpoint, rotate, save_checkpoint, weights_sha256
from headstart.train.folder import RunFolder
from headstart.train.parts import Parts
from headstart.train.samples import save_samples_if_due
from headstart.train.sharded import restore_sharded, save_sharded, weights_in
from headstart.train.signals import StopSignals
from headstart.train.step import train_step


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands; all that a checkpoint keeps beside weights, optimizer and horizon."""

    step: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_accuracy: float = -1.0


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished run left: its folder, its last progress, and the evaluations before and after training."""

    path: Path
    progress: Progress
    before: EvalReport | None
    after: EvalReport | None
    model: Any = field(default=None, repr=False, compare=False)
    """The trained model, where the student was in memory: the same object, trained in place."""

    def __str__(self) -> str:
        p = self.progress
        change = f"{self.before.accuracy:.1%} -> {self.after.accuracy:.1%}; " if self.before and self.after else ""
        return f"{self.path}: {change}{p.step} steps, {p.generated_tokens:,} generated tokens, {p.seconds:.1f} s"

    def to_json(self) -> dict[str, Any]:
        evaluations = {"before": self.before, "after": self.after}
        return {
            "path": str(self.path),
            **asdict(self.progress),
            **{name: None if e is None else {**asdict(e), "rows": []} for name, e in evaluations.items()},
        }


def run(parts: Parts, checkpoint: Checkpoint | ShardedCheckpoint | None = None) -> RunResult:
    """Train from the start, or from `checkpoint`, to the configured number of steps and export the model.

    Raises Interrupted after a signal and ServerError after a server's failure, with a checkpoint written;
    NonFiniteError with the last one intact.
    """
    try:
        return _run(parts, restore(parts, checkpoint) if checkpoint else Progress())
    finally:
        parts.tracker.close()
        if parts.folder is not None:
            parts.folder.close()


def _run(parts: Parts, progress: Progress) -> RunResult:
    steps = parts.config.training.steps
    evaluations: dict[int, EvalReport] = {}
    reading = ""
    with StopSignals() as signals, shown("training") as training:
        _stop_if_asked(parts, progress, signals)
        while True:
            try:
                progress = _evaluate_if_due(parts, progress, evaluations, signals)
            except StopRequested:
                _stop_if_asked(parts, progress, signals)
            if progress.step >= steps:
                break
            training(progress.step, steps, reading)
            try:
                with doing(f"step {progress.step + 1}"):
                    report, readings = train_step(parts, progress.step, progress.generated_tokens)
            except ServerError as error:
                _stop_for_server(parts, progress, error)
            progress = replace(
                progress,
                step=report.step,
                generated_tokens=report.metrics["generated_tokens"],
                seconds=progress.seconds + report.metrics["seconds"],
            )
            training(progress.step, steps, reading := f"loss {report.metrics['loss']:.4f} nats/token")
            parts.tracker.step(report)
            save_samples_if_due(parts, progress.step, readings)
            _stop_if_asked(parts, progress, signals)
            if progress.step % parts.config.checkpoint.every == 0 or progress.step == steps:
                save(parts, progress)
        try:
            parts.runtime.gather_unless_stopped(lambda: _export(parts, progress, evaluations.get(steps), signals))
        except StopRequested:
            _stop_if_asked(parts, progress, signals)
    before = read_evaluation(parts.folder, 0, _measured(parts, 0)) if parts.folder else None
    return RunResult(parts.folder.path if parts.folder else Path(), progress, before, evaluations.get(steps))


def finished(folder: RunFolder, steps: int) -> RunResult:
    """What a complete run of `steps` left, from its folder; what cannot be read there is left out."""
    progress = Progress(steps)
    with suppress(OSError, ValueError, TypeError, KeyError):
        newest = max(folder.checkpoints.glob("step_*/state.json"))
        progress = Progress(**json.loads(newest.read_text(encoding="utf-8"))["progress"])
    return RunResult(folder.path, progress, read_evaluation(folder, 0), read_evaluation(folder, steps))


def restore(parts: Parts, checkpoint: Checkpoint | ShardedCheckpoint) -> Progress:
    """Put weights, optimizer and horizon back as they were; the progress so far."""
    check_fits(parts.student, checkpoint)
    weights = parts.student.trainable()
    before, now = ({t.dtype for t in tensors.values()} for tensors in (weights_in(checkpoint), weights))
    if before != now:  # sharded weights that are trained are kept in float32, whatever they are computed in
        parts.tracker.message(f"weights were kept in {_types(before)} so far and are in {_types(now)} from here on")
    restore_sharded(checkpoint, weights, parts.optimizer)
    parts.horizon.load_state_dict(checkpoint.state["horizon"])
    budget = checkpoint.state.get("memory_budget", {})
    if budget.get("asked") == _asked(parts):
        parts.budget.bytes = budget["bytes"]
    return Progress(**checkpoint.state["progress"])


def check_fits(student: CausalModel, checkpoint: Checkpoint | ShardedCheckpoint) -> None:
    """Raises CheckpointError when the checkpoint holds other weights than are trained now, on however many ranks."""
    stored, now = weights_in(checkpoint), student.trainable()
    if {name: p.shape for name, p in now.items()} != {name: tensor.shape for name, tensor in stored.items()}:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} holds other weights than config.yaml trains now (tuning, or the "
            "student itself, has changed); put config.yaml back as it was, or start a new run with --out"
        )


@doing("writing a checkpoint")
def save(parts: Parts, progress: Progress) -> None:
    """Write a checkpoint (rank 0, or all where the student is sharded) and drop those no longer kept."""
    budget = {"asked": _asked(parts), "bytes": parts.budget.agree(parts.runtime)}
    state = {"progress": asdict(progress), "horizon": parts.horizon.state_dict(), "memory_budget": budget}
    weights = parts.student.trainable()
    if any_sharded(weights.values()):
        place = parts.folder.checkpoints if parts.folder else None
        save_sharded(place, progress.step, weights, parts.optimizer, state, parts.runtime)
    elif parts.folder is not None:
        model = {name: p.detach() for name, p in weights.items()}
        save_checkpoint(parts.folder.checkpoints, Checkpoint(progress.step, model, parts.optimizer.state_dict(), state))
    if parts.folder is None:
        return
    c = parts.config.checkpoint
    rotate(parts.folder.checkpoints, c.keep_last, progress.best_step if c.keep_best else None)


def _types(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _asked(parts: Parts) -> list[Any]:
    """What the configuration says of micro-batches: a budget found under another word is not taken up."""
    return [parts.config.training.micro_batch, parts.config.training.memory_budget_gib]


def _evaluate_if_due(
    parts: Parts, progress: Progress, evaluations: dict[int, EvalReport], signals: StopSignals
) -> Progress:
    """Evaluate before the first step, after each leg, and every `evaluation.every` steps; stored results count."""
    config, step = parts.config.evaluation, progress.step
    if parts.evaluator is None or config is None:
        return progress
    if not (step in (0, *parts.config.legs) or (config.every and step % config.every == 0)):
        return progress
    _stop_if_asked(parts, progress, signals)  # since the step: the others would evaluate first
    made_of = _measured(parts, step)
    known = parts.runtime.gather(read_evaluation(parts.folder, step, made_of) if parts.folder else None)[0]
    with shown(f"evaluation at step {step}"):
        report = known or parts.evaluator.evaluate(step, signals.interruptible)
    if known is None and parts.folder is not None:
        if (old := _figures(parts.folder, step)).exists():
            parts.tracker.message(f"{old} was damaged or of other weights or settings: evaluated again")
        report = replace(report, settings={**report.settings, **made_of})
        write_evaluation(parts.folder, report)
    # Log a stored evaluation again: resume truncated metrics.jsonl to before it.
    parts.tracker.evaluation(report)
    evaluations[step] = report
    if step == 0 or report.accuracy <= progress.best_accuracy:
        return progress
    progress = replace(progress, best_step=step, best_accuracy=report.accuracy)
    if parts.config.checkpoint.keep_best:
        save(parts, progress)
    return progress


def write_evaluation(folder: RunFolder, report: EvalReport) -> None:
    """`eval/step_000000.json` (figures) and `.jsonl` (one graded response per line)."""
    path = _figures(folder, report.step)
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in report.rows]
    write_atomic(path.with_suffix(".jsonl"), "".join(line + "\n" for line in lines))
    write_json(path, evaluation_fields(report))


def read_evaluation(folder: RunFolder, step: int, made_of: Mapping[str, Any] | None = None) -> EvalReport | None:
    """An evaluation's figures, without its rows; None unless it is whole, and of the settings and weights `made_of`."""
    path = _figures(folder, step)
    try:
        report = TypeAdapter(EvalReport).validate_json(path.read_bytes(), strict=True)
        rows = path.with_suffix(".jsonl").read_bytes().count(b"\n")
    except (OSError, ValueError):
        return None
    whole = (report.step, report.problems * report.samples) == (step, rows)
    alike = made_of is None or not differences({key: report.settings.get(key) for key in made_of}, made_of)
    return report if whole and alike else None


def _figures(folder: RunFolder, step: int) -> Path:
    return folder.eval / f"step_{step:06d}.json"


def _measured(parts: Parts, step: int) -> dict[str, Any]:
    """What the figures of an evaluation at `step` depend on, for rank 0; a sharded student is gathered from all ranks.
    The untrained student is what it was loaded from."""
    weights = parts.student.trainable()
    if parts.folder is None and not any_sharded(weights.values()):
        return {}
    return {**parts.measured, "weights_sha256": weights_sha256(weights) if step else "untrained"}


def _stop_if_asked(parts: Parts, progress: Progress, signals: StopSignals) -> None:
    """End the run on every rank, with a checkpoint, when a signal has reached any of them."""
    number = max(n or 0 for n in parts.runtime.gather(signals.requested))
    if not number:
        return
    if progress.step > 0:
        save(parts, progress)
    parts.runtime.barrier()  # whoever left now would have torchrun end the rank that writes
    if parts.runtime.world_size > 1:
        signals.ignore()
    where = parts.folder.path if parts.folder else "the run folder"
    raise Interrupted(f"stopped after step {progress.step}; continue with: headstart distill --resume {where}", number)


def _stop_for_server(parts: Parts, progress: Progress, error: ServerError) -> NoReturn:
    """End the run on every rank with a checkpoint: a step whose scores do not come is not made."""
    if parts.runtime.world_size > 1 and not error.everywhere:
        raise error  # of this rank alone: its message ends the others, and a checkpoint needs all ranks
    if progress.step > 0:
        save(parts, progress)
    parts.runtime.barrier()
    where = parts.folder.path if parts.folder else "the run folder"
    stopped = ServerError(
        f"stopped after step {progress.step}: {error.problem}",
        f"{error.remedy}; then continue with: headstart distill --resume {where}",
        status=error.status,
    )
    stopped.everywhere = True
    raise stopped from error


@doing("writing the model")
def _export(parts: Parts, progress: Progress, after: EvalReport | None, signals: StopSignals) -> None:
    """Write `model/` (rank 0), so that a folder of that name is always whole. A sharded student is gathered first, by
    all ranks, which no signal cuts short."""
    model = exportable(parts.student.model, parts.config.output.format)
    if parts.folder is None:
        return
    try:
        with atomic_folder(parts.folder.model) as unfinished, signals.interruptible():
            parts.export(model, unfinished, progress.generated_tokens, after)
    except (OSError, SafetensorError) as error:
        raise RunFolderError(
            f"the model cannot be written to {parts.folder.model}: {error}. All {progress.step} steps are in the "
            f"last checkpoint: free space, then write it with --resume {parts.folder.path}"
        ) from error
    parts.tracker.message(f"model written to {parts.folder.model}")

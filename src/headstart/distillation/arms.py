"""One run of a comparison: an ordinary run in its own folder, resumed there after a kill, never with other settings."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headstart.config import loader
from headstart.config.differences import described, differences
from headstart.config.render import resolved
from headstart.config.schema import Config, OutputConfig
from headstart.distillation.run import Loaded, distill
from headstart.errors import Interrupted, NonFiniteError, RunFolderError
from headstart.files import make_folder, write_atomic
from headstart.reports.run import failure_file
from headstart.train.folder import RunFolder


def arm_config(config: Config, **changes: dict[str, Any]) -> Config:
    """`config` with some settings changed, as in `arm_config(config, training={"seed": 1})`. No checkpoint is kept as
    the best: the problems that are reported must choose nothing."""
    changes = {"checkpoint": {"keep_best": False, "keep_last": 1}, **changes}
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=settings) for name, settings in changes.items()}
    )


def bare_config(config: Config, **changes: dict[str, Any]) -> Config:
    """The same for a run of which only metrics and evaluations are kept."""
    tracking = {"rollouts_every": 0, "tensorboard": False, "wandb": None, "trackio": None}
    return arm_config(config.model_copy(update={"output": OutputConfig()}), tracking=tracking, **changes)


@dataclass(frozen=True, slots=True)
class ArmRun:
    """One run of a comparison; messages call it `name`."""

    name: str
    folder: Path
    config: Config

    @property
    def finished(self) -> bool:
        return RunFolder(self.folder).model.exists() or self.failed

    @property
    def failed(self) -> bool:
        """Whether its loss or gradient was no longer finite."""
        return failure_file(self.folder).exists()

    @property
    def log(self) -> Path:
        """Where its output goes: beside its folder."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def other_settings(self) -> list[str]:
        """The settings in which the run that was started in the folder differs: `training.steps: 6 -> 4`."""
        stored = RunFolder(self.folder).config
        old = loader.load(stored) if stored.exists() else self.config
        return described(differences(old.model_dump(mode="json"), self.config.model_dump(mode="json")))

    def refuse_other_settings(self) -> None:
        """Raises RunFolderError when the folder holds a run with other settings."""
        if other := self.other_settings():
            raise RunFolderError(
                f"{self.folder} holds a run with other settings than {self.name} has now ({'; '.join(other)}); choose "
                "another folder with --out, or remove that one"
            )

    def train(self, shared: Loaded | None = None, allow_changed: Sequence[str] = ()) -> None:
        """Run it, or resume it; a finished run is left alone. Where its loss or gradient is no longer finite, it has
        failed, and the reason is kept beside it."""
        if self.finished:
            return
        make_folder(self.folder.parent)
        started = RunFolder(self.folder).config.exists()
        with (
            self.log.open("a", encoding="utf-8", errors="backslashreplace") as log,
            redirect_stdout(log),
            redirect_stderr(log),
        ):
            try:
                if started:
                    distill(resume=self.folder, allow_changed=allow_changed, shared=shared)
                else:
                    distill(self.config, out=self.folder, shared=shared)
            except NonFiniteError as error:
                write_atomic(failure_file(self.folder), f"{error}\n")
            except Interrupted as error:
                raise Interrupted(f"stopped in {self.name}; the same command resumes it", error.signal_number) from None

    def extend(self) -> None:
        """Give the run in the folder, finished or not, the settings that `config` has now."""
        place = RunFolder(self.folder)
        if place.config.exists():
            shutil.rmtree(place.model, ignore_errors=True)
            write_atomic(place.config, resolved(self.config))

    def share_start(self, others: Iterable[ArmRun]) -> None:
        """Where it is new, take the evaluation of the untrained student from another run of the same student."""
        if RunFolder(self.folder).config.exists():
            return
        alike = ("student", "teacher", "tuning", "prompts", "evaluation")
        for other in others:
            if all(getattr(other.config, key) == getattr(self.config, key) for key in alike):
                files = [other.folder / "eval" / f"step_000000.{end}" for end in ("jsonl", "json")]
                if all(file.exists() for file in files):
                    RunFolder.create(self.folder, self.config).close()
                    for file in files:
                        write_atomic(self.folder / "eval" / file.name, file.read_text(encoding="utf-8"))
                    return

    def clear(self) -> None:
        """Remove what a finished run needs no more: its checkpoints."""
        shutil.rmtree(RunFolder(self.folder).checkpoints, ignore_errors=True)

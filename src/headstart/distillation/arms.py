"""One arm of a comparison: an ordinary run in its own folder, resumed there after a kill, never with other settings."""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from headstart.config import loader
from headstart.config.differences import described, differences
from headstart.config.schema import Config
from headstart.distillation.run import distill
from headstart.files import make_folder
from headstart.train.folder import RunFolder


def arm_config(config: Config, **changes: dict[str, Any]) -> Config:
    """`config` with some settings changed, as in `arm_config(config, training={"seed": 1})`."""
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=settings) for name, settings in changes.items()}
    )


def log_file(folder: Path) -> Path:
    """Where the output of the arm in `folder` goes: beside it."""
    return folder.with_name(f"{folder.name}.log")


def other_settings(folder: Path, config: Config) -> list[str]:
    """The settings in which the run that was started in `folder` differs from `config`: `training.steps: 6 -> 4`."""
    stored = RunFolder(folder).config
    old = loader.load(stored) if stored.exists() else config
    return described(differences(old.model_dump(mode="json"), config.model_dump(mode="json")))


def train_arm(config: Config, folder: Path) -> None:
    """Run `config` in `folder`, or resume the run that is there; a finished one is left alone."""
    if RunFolder(folder).model.exists():
        return
    make_folder(folder.parent)
    with (
        log_file(folder).open("a", encoding="utf-8", errors="backslashreplace") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        distill(resume=folder) if RunFolder(folder).config.exists() else distill(config, out=folder)

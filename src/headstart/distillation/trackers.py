"""The trackers of a run, opened once its folder holds what it starts from."""

from __future__ import annotations

from headstart.checks.findings import Preflight
from headstart.checks.run import write_preflight
from headstart.config.schema import Config
from headstart.files import write_json
from headstart.interfaces import Tracker
from headstart.tracking import ConsoleTracker, FanTracker, JsonlTracker, TensorBoardTracker, WandbTracker
from headstart.train.folder import RunFolder
from headstart.train.inputs import Inputs


def opened(
    config: Config, folder: RunFolder | None, preflight: Preflight, record: Inputs, console: ConsoleTracker
) -> Tracker:
    """The run's trackers, once the run folder holds what the run starts from; a failure leaves no folder behind."""
    try:
        if folder is not None:
            write_preflight(folder.path, preflight)
            write_json(folder.path / "inputs.json", record.model_dump(mode="json"))
        return _tracker(config, folder, console)
    except BaseException:
        if folder is not None:
            folder.abandon()
        raise


def _tracker(config: Config, folder: RunFolder | None, console: ConsoleTracker) -> Tracker:
    if folder is None:
        return FanTracker([])
    trackers: list[Tracker] = [console, JsonlTracker(folder.metrics)]
    if config.tracking.tensorboard:
        trackers.append(TensorBoardTracker(folder.path / "tensorboard"))
    if config.tracking.wandb is not None:
        trackers.append(WandbTracker(config.tracking.wandb, config.model_dump(mode="json"), folder.path))
    return FanTracker(trackers)

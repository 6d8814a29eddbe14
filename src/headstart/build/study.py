"""A study run: every arm with every seed, as ordinary runs in processes of their own, then one record of it all.

Cells are interleaved (arm A seed 0, arm B seed 0, ...), so that a machine that slows down does so for all. A cell that
is finished is not repeated; one that was cut goes on from its last checkpoint. One whose loss or gradient is no longer
finite has failed: its reason is kept beside it, and the study goes on.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from queue import SimpleQueue

import torch

from headstart.build.training import distill
from headstart.config import loader
from headstart.config.differences import described, differences
from headstart.config.evaluation import TaskConfig
from headstart.config.loader import Study
from headstart.config.schema import Config
from headstart.config.study import slug
from headstart.errors import HeadstartError, Interrupted, NonFiniteError, RunFolderError
from headstart.files import locked, write_atomic
from headstart.report.study import Choice, choose, failure, failure_file
from headstart.train.folder import RunFolder


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study; `name` is what it is called in messages."""

    name: str
    folder: Path
    config: Config

    @property
    def finished(self) -> bool:
        return (self.folder / "model").exists() or self.failed

    @property
    def failed(self) -> bool:
        return failure(self.folder) is not None


Progress = Callable[[str, int, int], None]
"""Hears a finished cell's name (and whether it failed), how many cells are finished, and how many there are."""


def run_study(study: Study, out: Path, jobs: int | None = None, progress: Progress = lambda *_: None) -> None:
    """Run what `out` does not hold yet: the tuning trials in `out/tuning`, then the cells in `out/cells`.

    `jobs` processes at a time; None is one for each GPU, or one on a CPU. Raises RunFolderError when `out` holds a cell
    of other settings, and a cell's own error when one ends otherwise than by numbers that are not finite.
    """
    trials = trial_cells(study, out)
    done, total = 0, len(trials) + len(study.arms) * len(study.config.seeds)

    def finished(cell: Cell) -> None:
        nonlocal done
        done += 1
        progress(f"{cell.name}, failed" if cell.failed else cell.name, done, total)

    refuse_others(trials)
    _run(trials, out, jobs, finished)
    cells = final_cells(study, out, choose(study.config, out) if study.config.tuning else {})
    refuse_others(cells)
    _run(cells, out, jobs, finished)


def trial_cells(study: Study, out: Path) -> list[Cell]:
    """The tuning runs: every arm at every rate, graded on development problems."""
    t = study.config.tuning
    return [
        Cell(
            f"tuning {arm}, lr {rate:g}, seed {seed}",
            out / "tuning" / slug(arm) / f"lr-{rate:g}-seed-{seed}",
            cell_config(config, seed, rate, t.task),
        )
        for seed in (t.seeds if t else ())
        for rate in (t.rates if t else ())
        for arm, config in study.arms.items()
        if t
    ]


def final_cells(study: Study, out: Path, choices: dict[str, Choice]) -> list[Cell]:
    """The runs that are reported, one for each arm and seed."""
    return [
        Cell(
            f"{arm}, seed {seed}",
            out / "cells" / slug(arm) / f"seed-{seed}",
            cell_config(config, seed, choices[arm].rate if arm in choices else None),
        )
        for seed in study.config.seeds
        for arm, config in study.arms.items()
    ]


def cell_config(config: Config, seed: int, rate: float | None = None, task: TaskConfig | None = None) -> Config:
    """An arm's run with a seed, a tuned rate, and development problems for a trial. No checkpoint is kept as the best:
    the problems that are reported must choose nothing."""
    assert config.evaluation is not None
    update = {
        "training": config.training.model_copy(update={"seed": seed}),
        "checkpoint": config.checkpoint.model_copy(update={"keep_best": False, "keep_last": 1}),
        "optimizer": config.optimizer.model_copy(update={"lr": rate or config.optimizer.lr}),
        "evaluation": config.evaluation.model_copy(update={"task": task or config.evaluation.task}),
    }
    return config.model_copy(update=update)


def refuse_others(cells: Sequence[Cell]) -> None:
    """Raises RunFolderError when a folder holds a run with other settings than its cell has now."""
    for cell in cells:
        folder = RunFolder(cell.folder)
        old = loader.load(folder.config) if folder.config.exists() else cell.config
        if other := described(differences(old.model_dump(mode="json"), cell.config.model_dump(mode="json"))):
            raise RunFolderError(
                f"{cell.folder} holds a run with other settings than {cell.name} has now ({'; '.join(other)}); choose "
                "another folder with --out, or remove that one"
            )


def _run(cells: Sequence[Cell], out: Path, jobs: int | None, finished: Callable[[Cell], None]) -> None:
    """Run the cells in order, several at a time where there are several places to run."""
    for cell in cells:
        if cell.finished:
            finished(cell)
    waiting = [cell for cell in cells if not cell.finished]
    if not waiting:
        return
    gpus = _gpus() if waiting[0].config.training.device != "cpu" else []
    width = jobs or max(1, len(gpus))
    places: SimpleQueue[str | None] = SimpleQueue()
    for number in range(width):
        places.put(gpus[number % len(gpus)] if gpus else None)

    def run(cell: Cell) -> None:
        place = places.get()
        try:
            _share_start(cell, cells)
            _in_own_process(cell, place)
        finally:
            places.put(place)
        finished(cell)

    with locked(out), ThreadPoolExecutor(width) as threads:
        futures = [threads.submit(run, cell) for cell in waiting]
        try:
            for future in futures:
                future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in active_children():  # which write a checkpoint and end; the threads wait for them
                process.terminate()
            raise


def _in_own_process(cell: Cell, gpu: str | None) -> None:
    context = get_context("forkserver")
    context.set_forkserver_preload(["headstart.build.training"])  # torch is read once, every cell starts afresh
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            pool.submit(_train, cell, gpu).result()
    except NonFiniteError as error:
        write_atomic(failure_file(cell.folder), f"{error}\n")
    except BrokenProcessPool:
        raise RunFolderError(
            f"{cell.name} ended without a word (killed, or out of memory?): see {_log(cell)}; the same command goes on"
        ) from None
    except HeadstartError as error:
        raise RunFolderError(f"{cell.name}: {error} (its log: {_log(cell)})") from None


def _train(cell: Cell, gpu: str | None) -> None:
    """In its own process: train the cell, or go on with it. Ends in good order when the study is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(1)
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        _log(cell).open("a", encoding="utf-8", errors="backslashreplace") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        started = RunFolder(cell.folder).config.exists()
        try:
            distill(resume=cell.folder) if started else distill(cell.config, out=cell.folder)
        except Interrupted as error:
            raise RunFolderError(str(error)) from None  # that one cannot be sent to another process
    shutil.rmtree(RunFolder(cell.folder).checkpoints, ignore_errors=True)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)  # as a kill would: the run folder is whole at any moment


def _share_start(cell: Cell, cells: Sequence[Cell]) -> None:
    """Give a new cell the evaluation of the untrained student where another cell of the same student has it."""
    if RunFolder(cell.folder).config.exists():
        return
    alike = ("student", "teacher", "tuning", "prompts", "evaluation")
    for other in cells:
        if all(getattr(other.config, key) == getattr(cell.config, key) for key in alike):
            files = [other.folder / "eval" / f"step_000000.{end}" for end in ("jsonl", "json")]
            if all(file.exists() for file in files):
                RunFolder.create(cell.folder, cell.config).close()
                for file in files:
                    write_atomic(cell.folder / "eval" / file.name, file.read_text(encoding="utf-8"))
                return


def _log(cell: Cell) -> Path:
    return cell.folder.with_name(f"{cell.folder.name}.log")


def _gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]

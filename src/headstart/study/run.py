"""A study: every arm with every seed as an ordinary run in a separate process, then one record of them all.

Cells are interleaved (arm A seed 0, arm B seed 0, ...), so that a machine that slows down does so for all. A finished
cell is not repeated; one that was cut resumes from its last checkpoint. One whose loss or gradient is no longer finite
has failed: its reason is kept beside it, and the study continues.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures import wait as futures_wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from queue import SimpleQueue

import torch

from headstart.config.evaluation import TaskConfig
from headstart.config.loader import Study, load_study
from headstart.config.schema import Config
from headstart.distillation.arms import ArmRun, arm_config
from headstart.errors import HeadstartError, Interrupted, RunFolderError
from headstart.files import locked, write_atomic
from headstart.interfaces import OnProgress, silent
from headstart.progress import doing, report, shows
from headstart.records import Result
from headstart.reports.page import write
from headstart.study.page import outcome, study_page
from headstart.study.table import Choice, choose, collect, final_folder, trial_folder


@shows("compare")
def compare(
    study: Study | Path | str,
    overrides: Sequence[str] = (),
    *,
    out: Path | str | None = None,
    jobs: int | None = None,
    progress: OnProgress | None = None,
) -> Result:
    """Run every arm of a study with every seed into the folder `out`, and compare them at equal steps, tokens and
    seconds: `study.json`, and `study.html` with the same page in Markdown. The same call resumes a study that was
    stopped.

    `study` is a YAML file (with `overrides` on top), or a Study. Raises ConfigError for what is wrong in it, and what
    `run_study` raises.
    """
    path = Path(study) if isinstance(study, str | Path) else None
    loaded = load_study(path, overrides) if path is not None else study
    assert isinstance(loaded, Study)
    folder = Path(out) if out is not None else Path("runs") / (path.stem if path is not None else "study")
    run_study(loaded, folder, jobs, progress or report)
    record = collect(loaded.config, folder)
    write_atomic(folder / "study.json", json.dumps(record, ensure_ascii=False) + "\n")
    text = "" if path is None else path.read_text(encoding="utf-8") + "".join(f"# {item}\n" for item in overrides)
    write(study_page(record, text), folder / "study.html")
    return Result(record, "\n".join(outcome(record)))


def run_study(study: Study, out: Path, jobs: int | None = None, progress: OnProgress = silent) -> None:
    """Run what `out` does not hold yet: the tuning trials in `out/tuning`, then the cells in `out/cells`.

    `jobs` processes at a time; None is one for each GPU, or one on a CPU. Raises RunFolderError when `out` holds a cell
    of other settings, and a cell's own error when one ends otherwise than by numbers that are not finite.
    """
    trials = trial_cells(study, out)
    done, total = 0, len(trials) + len(study.arms) * len(study.config.seeds)

    def finished(cell: ArmRun) -> None:
        nonlocal done
        done += 1
        progress(done, total, f"{cell.name}, {'failed' if cell.failed else 'finished'}")

    _run(trials, out, jobs, finished)
    _run(final_cells(study, out, choose(study.config, out) if trials else {}), out, jobs, finished)


def trial_cells(study: Study, out: Path) -> list[ArmRun]:
    """The tuning runs: every arm at every rate, graded on development problems."""
    t = study.config.tuning
    if t is None:
        return []
    return [
        ArmRun(
            f"tuning {arm}, lr {rate:g}, seed {seed}",
            trial_folder(out, arm, rate, seed),
            cell_config(config, seed, rate, t.task),
        )
        for seed in t.seeds
        for rate in t.rates
        for arm, config in study.arms.items()
    ]


def final_cells(study: Study, out: Path, choices: dict[str, Choice]) -> list[ArmRun]:
    """The runs that are reported, one for each arm and seed."""
    rates = {arm: choice.rate for arm, choice in choices.items()}
    return [
        ArmRun(f"{arm}, seed {seed}", final_folder(out, arm, seed), cell_config(config, seed, rates.get(arm)))
        for seed in study.config.seeds
        for arm, config in study.arms.items()
    ]


def cell_config(config: Config, seed: int, rate: float | None = None, task: TaskConfig | None = None) -> Config:
    """An arm's run with a seed, a tuned rate, and development problems for a trial."""
    assert config.evaluation is not None
    return arm_config(
        config,
        training={"seed": seed},
        optimizer={"lr": rate or config.optimizer.lr},
        evaluation={"task": task or config.evaluation.task},
    )


def _run(cells: Sequence[ArmRun], out: Path, jobs: int | None, finished: Callable[[ArmRun], None]) -> None:
    """Run the unfinished cells in order, `jobs` at a time, each on one of the GPUs where there are any."""
    for cell in cells:
        cell.refuse_other_settings()
    waiting = [cell for cell in cells if not cell.finished]
    for cell in cells:
        if cell not in waiting:
            finished(cell)
    if not waiting:
        return
    gpus = _gpus() if waiting[0].config.training.device != "cpu" else []
    width = jobs or max(1, len(gpus))
    slots: SimpleQueue[str | None] = SimpleQueue()
    for number in range(width):
        slots.put(gpus[number % len(gpus)] if gpus else None)

    def run(cell: ArmRun) -> None:
        slot = slots.get()
        try:
            cell.share_start(cells)
            with doing(cell.name) as own:
                _in_own_process(cell, slot, lambda: own(0, 0, _last_line(cell.log)))
        finally:
            slots.put(slot)
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


def _in_own_process(cell: ArmRun, gpu: str | None, look: Callable[[], None]) -> None:
    """Train the cell; `look` is called every second meanwhile."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["headstart.distillation.run"])  # torch is imported once, every cell starts fresh
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            future = pool.submit(_train, cell, gpu)
            while futures_wait([future], timeout=1.0).not_done:
                look()
            future.result()
    except BrokenProcessPool:
        raise RunFolderError(
            f"{cell.name} ended without a word (killed, or out of memory?): see {cell.log}; the same command resumes it"
        ) from None
    except HeadstartError as error:
        raise RunFolderError(f"{cell.name}: {error} (its log: {cell.log})") from None


def _last_line(log: Path) -> str:
    """What a run last said, without the time since its own start."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))  # a log of days is long, and it is looked at every second
        last = file.read().decode(errors="replace").rstrip().rpartition("\n")[2]
        return last.partition("] ")[2] if last.startswith("[") else last[:200]
    return ""


def _train(cell: ArmRun, gpu: str | None) -> None:
    """In its own process: train the cell, or resume it. Ends when the study is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(1)
    try:
        cell.train()
    except Interrupted as error:
        raise RunFolderError(str(error)) from None  # Interrupted cannot be pickled
    cell.clear()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)  # as a kill would: the run folder is whole at any moment


def _gpus() -> list[str]:
    """The GPUs this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]

"""What a run's trajectory depends on, recorded in `inputs.json`, so that a resumed run knows what it resumes.

The configuration is recorded key by key; prompts, tokenizers, chat templates and model files by digest. Digests are
cheap: of a large safetensors file only the size, the header and three blocks of every tensor are read.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from headstart.config.differences import Differences, described, differences, flat
from headstart.config.loader import parse
from headstart.config.schema import Config, ModelConfig
from headstart.errors import ConfigError, ModelError, RunFolderError
from headstart.models.hub import cached_folder
from headstart.models.images import reader_of
from headstart.models.load import resolve
from headstart.models.templates import chat_template
from headstart.records import Problem, Prompt

FREE = (
    *("checkpoint", "evaluation", "output", "tracking", "diagnosis.batch_size", "diagnosis.pilot"),
    *(f"rollout.{key}" for key in ("batch_size", "urls", "sync", "sync_dir", "timeout")),
    *("training.logit_chunk", "training.memory_budget_gib", "training.micro_batch"),
    *("tuning.gradient_checkpointing", "sharding", "teacher.timeout", "teacher.deadline"),
)
"""Settings that may change: what is written, and how work is divided. Stored evaluations are checked one by one."""
SOURCES = (
    *(f"prompts.{key}" for key in ("source", "subset", "split", "column", "tools_column", "answer_column", "limit")),
    "prompts.image_column",
    *(f"{who}.{key}" for who in ("student", "teacher") for key in ("path", "revision", "adapter")),
    *("teacher.urls", "teacher.tokenizer", "student.chat_template", "teacher.chat_template", "prompts.data"),
    "horizon.folder",
)
"""Settings that only say where something lies. They may change while the same content lies there."""
KINDS = ("prompts", "student", "teacher", "tokenizer", "template", "horizon")
WHOLE, BLOCK = 64 * 2**20, 4096
"""Bytes up to which a safetensors file is read whole; bytes of a block of a tensor in a larger one."""


class Inputs(BaseModel):
    """`inputs.json`: `config` has every key, with the device as it was found; `parts` describes what was loaded, by
    names such as `student/config.json`. A kind of part that is not known yet is left out, and not compared."""

    config: dict[str, Any]
    parts: dict[str, str] = {}
    changes: list[dict[str, Any]] = []
    """What a resumed run changed, after which step, with the values before and now."""

    def differences(self, now: Inputs) -> Differences:
        """What is not as it was, by name: `training.steps`, `student/config.json`."""
        known = {kind(name) for name in self.parts} & {kind(name) for name in now.parts}
        old, new = ({name: text for name, text in x.parts.items() if kind(name) in known} for x in (self, now))
        parts = differences(old, new)
        found = differences(self.config, now.config) | parts
        if any(re.match(r"prompts(\.|/problems)|tokenizer/|template/", name) for name in found):
            found.pop("prompts/token ids", None)  # they follow from what is named already
        moved = [name for name in SOURCES if kind(name) not in {kind(part) for part in parts}]
        return {name: pair for name, pair in found.items() if name not in moved}

    def read_first(self) -> dict[str, str]:
        """The parts that every rank has read before models are loaded; the hub's files may be on some already."""
        return {name: text for name, text in self.parts.items() if kind(name) not in ("student", "teacher")}

    def accept(self, now: Inputs, allowed: Sequence[str], step: int) -> Inputs:
        """The record when the run continues with `now` after `step`.

        Raises RunFolderError naming all that differs and may not, ConfigError for an allowed name without meaning.
        """
        for name in allowed:
            if kind(name) not in KINDS and not any(_covers(name, key) for x in (self, now) for key in flat(x.config)):
                raise ConfigError(
                    f"--allow-changed: found {name!r}; name settings or sections (training.steps, schedule), or any of "
                    f"{', '.join(KINDS)}"
                )
        found = self.differences(now)
        if _legs(now)[: len(_legs(self))] == _legs(self):  # an extension: the steps that were planned stay as they were
            allowed = [*allowed, "training.steps", "schedule.restarts"]
        refused = {name: found[name] for name in found if not any(_covers(free, name) for free in (*FREE, *allowed))}
        if refused:
            kinds = {kind(name) for name in refused if "/" in name}
            names = ",".join(dict.fromkeys(kind(name) if kind(name) in kinds else name for name in refused))
            lines = "\n  ".join(described(refused))
            raise RunFolderError(
                f"this run was started otherwise:\n  {lines}\nPut that back, or continue with the change from here by "
                f"--allow-changed {names}, or start a new run with --out"
            )
        entry = [{"after_step": step, "changed": found}] if found else []
        return now.model_copy(update={"changes": [*self.changes, *entry]})


def read_inputs(folder: Path) -> Inputs | None:
    """The record in a run folder, None where there is none. Raises RunFolderError when it is damaged."""
    if not (path := folder / "inputs.json").exists():
        return None
    try:
        inputs = Inputs.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RunFolderError(
            f"{path} is damaged ({' '.join(str(error).split())[:160]}), so it cannot be checked that the run continues "
            "as it was started; restore it, or delete it to continue without that check"
        ) from error
    with suppress(ConfigError):  # settings that a later version has added were at their defaults
        inputs.config = parse(inputs.config).model_dump(mode="json")
    return inputs


def configured(config: Config, device: str) -> Inputs:
    """What is known before anything is loaded: the configuration, on `device` (cpu or cuda)."""
    found = config.model_dump(mode="json")
    found["training"]["device"] = device
    return Inputs(config=found)


def text_parts(problems: Sequence[Problem], prompts: Sequence[Prompt], **tokenizers: Any) -> dict[str, str]:
    """Digests of what the problems say (not of their ids), of the token ids both models are shown, and of each model's
    tokenizer (as loaded) and chat template."""
    content = [(p.messages, p.text, p.answer, p.meta.get("tools")) for p in problems]
    images = [[(picture.sha256, picture.turn, picture.place) for picture in p.images] for p in problems]
    named = [p.meta["teacher"] for p in problems if "teacher" in p.meta]
    ids = array("q")
    for p in prompts:
        ids.extend((p.index, len(p.token_ids), *p.token_ids, *p.teacher_token_ids))
        ids.extend(i for _, view in p.views[1:] for i in (-1, *view))
    parts = {
        "prompts/problems": f"{len(problems)} problems, sha256 {digest(repr(content) + repr(named) * bool(named))}",
        "prompts/token ids": f"{len(prompts)} prompts, sha256 {digest(ids.tobytes())}",
    }
    if count := sum(map(len, images)):
        parts["prompts/images"] = f"{count} images, sha256 {digest(repr(images))}"
    for who, tokenizer in tokenizers.items():
        if (reader := reader_of(tokenizer)) is not None:
            parts[f"tokenizer/{who} images"] = f"sha256 {digest(reader.settings)}"
        fast = getattr(tokenizer, "backend_tokenizer", None)
        text = fast.to_str() if fast is not None else repr(sorted(tokenizer.get_vocab().items()))
        parts[f"tokenizer/{who}"] = f"sha256 {digest(text + str(tokenizer.special_tokens_map))}"
        parts[f"template/{who}"] = f"sha256 {digest(chat_template(tokenizer) or '')}"
    return parts


def model_parts(who: str, model: ModelConfig) -> dict[str, str]:
    """Size and digest of the files that a model is loaded from; none while it is not downloaded from the hub yet."""
    files = _files(resolve(model.path), model.revision, model.trust_remote_code)
    adapter = _files(model.adapter) if model.adapter else {}
    if not any(name.endswith(".safetensors") for name in files) or (model.adapter and not adapter):
        return {}
    return {f"{who}/{name}": text for name, text in (files | {f"adapter/{n}": t for n, t in adapter.items()}).items()}


def digest(content: str | bytes) -> str:
    data = content.encode(errors="surrogatepass") if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]


def _files(path: str, revision: str | None = None, code: bool = False) -> dict[str, str]:
    folder = Path(path).expanduser()
    for main in () if folder.is_dir() else ("config.json", "adapter_config.json"):
        with suppress(ValueError):  # not even a hub name: loading it says so
            folder = cached_folder(path, main, revision) or folder
    names = ["config.json", "generation_config.json", "adapter_config.json", "*.safetensors*"]
    try:
        files = sorted({file for name in (*names, *["*.py"][:code]) for file in folder.glob(name)})
        return {file.name: f"{file.stat().st_size:,} bytes, sha256 {_sampled(file)}" for file in files}
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: a file cannot be read: {error}. Copy or download the checkpoint again") from error


def _sampled(path: Path) -> str:
    with path.open("rb") as file:
        if path.suffix != ".safetensors" or path.stat().st_size <= WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
        header = file.read(min(int.from_bytes(file.read(8), "little"), 10**8))
        found, base = hashlib.sha256(header), file.tell()
        for tensor in json.loads(header).values():
            first, end = tensor.get("data_offsets", (0, 0))
            for start in (first, (first + end) // 2, max(first, end - BLOCK)):
                file.seek(base + start)
                found.update(file.read(BLOCK))
        return found.hexdigest()[:16]


def kind(name: str) -> str:
    """What a name belongs to: `student` for `student.path` and `student/config.json`."""
    return re.split("[./]", name)[0]


def _legs(inputs: Inputs) -> list[int]:
    return [*inputs.config["schedule"].get("restarts", ()), inputs.config["training"]["steps"]]


def _covers(allowed: str, name: str) -> bool:
    return name == allowed or name.startswith((f"{allowed}.", f"{allowed}/"))

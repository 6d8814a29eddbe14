"""Whoever answers in `headstart chat`: a run's student before and after training, its teacher, or one model alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from headstart.assemble.pair import IN_MEMORY, frozen, on_its_own
from headstart.assemble.served import require_local
from headstart.config import loader
from headstart.config.schema import Config, ModelConfig, PromptsConfig
from headstart.errors import ConfigError, DataError
from headstart.explanation.run import trained_model
from headstart.models.collate import completion_text
from headstart.models.load import load_model, load_tokenizer
from headstart.models.templates import View, chat_template
from headstart.ranks.runtime import Runtime
from headstart.records import Problem, Prompt, Sampling
from headstart.train.folder import RunFolder


class Speaker:
    """A model that answers lines, shown to it as `view` shows prompts."""

    def __init__(self, name: str, source: ModelConfig, view: PromptsConfig, config: Config) -> None:
        self.name, self.view, self.tokenizer = name, view, load_tokenizer(source, sees=config.sees)
        model = frozen(load_model(source, Runtime.start(config.training.device).device, sees=config.sees))
        self.model, self.engine = on_its_own(model, self.tokenizer, source)

    def answer(self, line: str, sampling: Sampling, max_tokens: int) -> tuple[str, str]:
        """Who answers, with the answer's length, and what."""
        asked = {"messages": ({"role": "user", "content": line},)} if self.view.chat else {"text": line}
        ids = View.of_student(self.tokenizer, self.view).ids(Problem("line", **asked))
        room = min(max_tokens, (self.model.max_positions or sys.maxsize) - len(ids))
        if room < 1:
            raise DataError(f"the line has {len(ids):,} tokens, which leaves {self.name} no room to answer; shorten it")
        prompts, key = [Prompt(0, "line", ids, ids)], (0, "chat", 0)
        (rollout,) = self.engine.generate(prompts, samples=1, max_tokens=room, sampling=sampling, key=key)
        head = f"{self.name} ({'' if rollout.stopped else 'cut at '}{len(rollout.completion_ids)} tokens)"
        return head, completion_text(self.tokenizer, rollout).strip()


def open_speakers(model: str, overrides: Sequence[str], teacher: bool) -> tuple[Config, list[Speaker]]:
    """The configuration of the run in the folder `model`, or one that stands for it, and all who answer.

    Raises RunFolderError for a run without model, and ConfigError for a teacher that is not there.
    """
    folder = RunFolder(Path(model))
    if not folder.config.is_file():
        if teacher:
            raise ConfigError(f"--teacher goes with the folder of a run, and {model} is none")
        path = {"path": model}
        config = loader.parse({"student": path, "teacher": path, "prompts": {"source": "tiny"}}, overrides)
        tokenizer = load_tokenizer(config.student, sees=config.sees)
        view = config.prompts.model_copy(update={"chat": chat_template(tokenizer) is not None})
        return config, [Speaker(model, config.student, view, config)]
    config = loader.load(folder.config, overrides)
    view = config.prompts
    students = [("before", config.student)] if not config.student.path.endswith(IN_MEMORY) else []
    students.append(("after", trained_model(config, folder)))
    speakers = [Speaker(name, source, view, config) for name, source in students]
    if teacher:
        require_local(config, "headstart chat --teacher")
        assert isinstance(config.teacher, ModelConfig)
        own = view.teacher_view.model_dump(include={"system", "template_kwargs"}, exclude_none=True)
        theirs = view.model_copy(update=own)
        speakers.append(Speaker("teacher", config.teacher, theirs, config))
    return config, speakers

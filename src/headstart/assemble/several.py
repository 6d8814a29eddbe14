"""Several teachers beside one student: their tokenizers and views, and all of them loaded and checked."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from headstart.assemble.pair import Pair, Speaker, checked, pad_id, prepare_student, with_teacher
from headstart.assemble.served import SEVERAL, open_scorer
from headstart.config.loader import for_teacher
from headstart.config.schema import Config, ModelConfig
from headstart.errors import ConfigError, DataError, VocabularyError
from headstart.interfaces import Teacher
from headstart.models.causal import CausalModel
from headstart.models.load import load_model, load_outline
from headstart.models.memory import GIB, NEAR, MicroMemory, free_bytes
from headstart.models.templates import PromptSet, build_prompts
from headstart.models.vocabulary import SharedVocabulary
from headstart.ranks.runtime import Runtime
from headstart.records import Problem, Prompt
from headstart.teacher.several import Member, SeveralTeachers, Visitor


def shown_to_several(
    problems: Sequence[Problem], tokenizer: Any, teachers: Mapping[str, Any], config: Config
) -> PromptSet:
    """`build_prompts` with the view of every teacher that scores a problem (`Prompt.views`). Warns of teachers that
    none names; raises DataError where a row names none, or another, and as `build_prompts`."""
    if config.routed:
        _check_names(problems, list(teachers))
    views: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    prompts: dict[int, Prompt] = {}
    dropped = 0
    for name, reader in teachers.items():
        mine = [i for i, problem in enumerate(problems) if not config.routed or problem.meta["teacher"] == name]
        if mine:
            own = for_teacher(config, name).prompts
            shown = build_prompts([problems[i] for i in mine], tokenizer, reader, own)
            dropped = dropped + shown.dropped if config.routed else shown.dropped
            for prompt in shown.prompts:
                index = mine[prompt.index]
                prompts.setdefault(index, replace(prompt, index=index))
                views.setdefault(index, []).append((name, prompt.teacher_token_ids))
    made = tuple(replace(prompts[index], views=tuple(views[index])) for index in sorted(prompts))
    return PromptSet(made, dropped, max(len(prompt.token_ids) for prompt in made))


def _check_names(problems: Sequence[Problem], names: Sequence[str]) -> None:
    counts = Counter(problem.meta.get("teacher") for problem in problems)
    for name in (name for name in counts if name not in names):
        first = next(problem.id for problem in problems if problem.meta.get("teacher") == name)
        what = "name no teacher" if name is None else f"name the teacher {name!r}"
        raise DataError(
            f"{counts[name]:,} of {len(problems):,} prompts {what} (the first is {first}); teachers are called "
            f"{', '.join(names)}: correct prompts.teacher_column, or add a teacher"
        )
    if unused := [name for name in names if not counts[name]]:
        warnings.warn(
            f"no prompt names the teacher {', '.join(unused)}, which is loaded for nothing; remove it from teachers",
            stacklevel=3,
        )


def seen_by(prompts: Sequence[Prompt], name: str) -> tuple[Prompt, ...]:
    """The prompts that teacher `name` scores, as it reads them."""
    own = ((prompt, dict(prompt.views)) for prompt in prompts)
    return tuple(replace(p, teacher_token_ids=views[name], views=()) for p, views in own if name in views)


def each(pair: Pair, prompts: Sequence[Prompt]) -> list[tuple[Pair, Sequence[Prompt]]]:
    """The pair and its prompts; of several teachers each one's, where there are any."""
    own = [(one, seen_by(prompts, name)) for name, one in pair.pairs.items()]
    return [(one, theirs) for one, theirs in own if theirs] or [(pair, prompts)]


class Panel(Pair):
    """A student and several teachers. What goes by one teacher asks one of `pairs`; their students are this one, each
    cut to what it shares with its teacher."""

    @property
    def teacher(self) -> CausalModel:
        raise ConfigError(SEVERAL.format("this", ", ".join(self.pairs)))

    @property
    def models(self) -> tuple[CausalModel, ...]:
        return (self.student, *(pair.teacher for pair in self.pairs.values() if pair.endpoint is None))

    def visitor(self, name: str) -> Visitor | None:
        """What loads the teacher `name` for its part of a step; None where it stays."""
        source = self.pairs[name].config.teacher
        if self.visiting is None or not isinstance(source, ModelConfig):
            return None
        return Visitor(self.pairs[name].teacher, partial(load_model, source, self.runtime.device))

    def scorer(self) -> Teacher:
        """All teachers as they score rollouts."""
        members = []
        for teacher in self.config.teachers:
            pair, visitor = self.pairs[teacher.name], self.visitor(teacher.name)
            weight = 1.0 if teacher.weight is None else teacher.weight
            members.append(Member(teacher.name, pair.scorer(), pair.student, weight, teacher.horizon, visitor))
        return SeveralTeachers(members, mixed=self.config.divergence.mixture == "distributions")


def load_panel(config: Config, runtime: Runtime, tokenizer: Any, teachers: Mapping[str, Any], longest: int) -> Panel:
    """Student (ready to train) and teachers (frozen), each checked as in a pair. `longest` is the longest prompt.

    Raises VocabularyError where a mixture of distributions meets another tokenizer, and what `load_pair` raises.
    """
    alone = {name: for_teacher(config, name) for name in teachers}
    scorers = {name: open_scorer(alone[name], reader, runtime) for name, reader in teachers.items()}
    model = prepare_student(load_model(config.student, runtime.device), config)
    visiting = _visiting(config, model, alone, runtime, longest)
    pairs = {}
    for name, reader in teachers.items():
        pairs[name] = with_teacher(model, scorers[name], alone[name], runtime, tokenizer, reader)
        if visiting and scorers[name] is None:
            Visitor(pairs[name].teacher, lambda: None).leave()  # before the next one is loaded
    common = _common(config, {name: pair.vocabulary for name, pair in pairs.items()})
    student = checked(model, common, "student", pad_id(tokenizer), config.student)
    for pair in pairs.values() if config.divergence.mixture == "distributions" else ():
        pair.vocabulary = common
        for one, who in ((pair.teacher, "teacher"), (pair.student, "student")):
            events = common.events(cast(Speaker, who))
            one.vocabulary, one.events = common.size, events and events.to(one.device)
    first = next(iter(teachers.values()))
    panel = Panel(student, None, tokenizer, first, config=config, runtime=runtime, vocabulary=common)
    panel.pairs, panel.visiting = pairs, visiting
    return panel


def _common(config: Config, found: Mapping[str, SharedVocabulary]) -> SharedVocabulary:
    """What the student samples from: ids that all teachers with its tokenizer know, ended by any one's stop token. A
    mixture of distributions is compared over just these, with one stop class."""
    vocabularies = [*found.values()]
    if len(vocabularies) == 1:
        return vocabularies[0]
    size = min(v.size for v in vocabularies)
    stops = tuple(sorted({i for v in vocabularies for i in v.stop_ids if i < size}))
    merged: tuple[int, ...] = ()
    if config.divergence.mixture == "distributions":
        if others := [name for name, v in found.items() if v.aligner is not None]:
            raise VocabularyError(
                f"divergence.mixture distributions adds up probabilities of the student's own tokens, and the teacher "
                f"{', '.join(others)} has another tokenizer; use divergence.mixture losses, or let rows name their "
                "teacher (prompts.teacher_column)"
            )
        merged = stops if any(v.merge_ids for v in vocabularies) or len({v.stop_ids for v in vocabularies}) > 1 else ()
    return SharedVocabulary(size, stops, merged, widest=max(v.largest for v in vocabularies))


def _visiting(config: Config, student: Any, alone: Mapping[str, Config], runtime: Runtime, longest: int) -> str | None:
    """Why the teachers must be loaded one after the other; None where they fit beside the student, its optimizer and
    the smallest micro-batch together."""
    device = runtime.device
    sources = [own.teacher for own in alone.values() if isinstance(own.teacher, ModelConfig)]
    if len(sources) < 2:
        return None
    models = _whole(student), [_whole(load_outline(source, device)) for source in sources]
    together, turns = (MicroMemory.of(*models, config, device=device.type, visits=visits) for visits in (False, True))
    free = min(runtime.gather(free_bytes(device))) / (runtime.world_size if device.type == "cpu" else 1)
    needed = together.least(longest, config.horizon.longest or 1)
    if needed <= NEAR * free:
        return None
    return (
        f"{len(sources)} teachers do not fit beside the student together ({needed / GIB:.3g} GiB with the smallest "
        f"step, {free / GIB:.3g} free): each is loaded for its part of a step and dropped again, which reads "
        f"{(together.weights - turns.weights) / GIB:.3g} GiB in every step (seconds_teacher_loading in metrics.jsonl)"
    )


def _whole(model: Any) -> CausalModel:
    """A model with its whole head, for its shapes."""
    return CausalModel(model, len(model.get_output_embeddings().weight), 0)

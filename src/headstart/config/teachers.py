"""The part of the schema that names several teachers, and what does not go with them. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Discriminator, PositiveFloat, PositiveInt, Tag

from headstart.config.horizon import needs_probes
from headstart.config.models import ServedTeacher, TeacherModel, teacher_kind
from headstart.config.prompts import SourceConfig, ViewConfig
from headstart.config.section import Section

if TYPE_CHECKING:
    from headstart.config.schema import Config


class _OneOfSeveral(Section):
    name: str
    """What the rows call it (prompts.teacher_column, prompts.teacher), and the metrics."""
    weight: PositiveFloat | None = None
    """Its share where every teacher scores every row, beside the other weights; null is 1."""
    view: ViewConfig = ViewConfig()
    """Its own view of the problem; null fields follow prompts.teacher_view."""
    horizon: PositiveInt | None = None
    """Most completion tokens of the rows that name it, such as its diagnosis recommends; null is the run's horizon."""


class NamedModel(_OneOfSeveral, TeacherModel):
    pass


class NamedServer(_OneOfSeveral, ServedTeacher):
    pass


NamedTeacher = Annotated[
    Annotated[NamedModel, Tag("local")] | Annotated[NamedServer, Tag("server")], Discriminator(teacher_kind)
]
OWN = frozenset(_OneOfSeveral.model_fields)
"""Keys that a teacher has only beside others."""
SEEN = ("system", "template_kwargs")
"""What may differ between the views of teachers."""


def alone(teacher: NamedModel | NamedServer) -> TeacherModel | ServedTeacher:
    """The same teacher as the `teacher` section of a run."""
    kind = TeacherModel if isinstance(teacher, NamedModel) else ServedTeacher
    return kind.model_validate(teacher.model_dump(exclude=set(OWN)))


def settings_alone(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings (JSON) of the run that teacher `name` would have by itself: its rows, its view, its horizon."""
    own = next(teacher for teacher in settings["teachers"] if teacher["name"] == name)
    prompts = settings["prompts"]
    seen = {key: own["view"][key] for key in SEEN}
    view = prompts["teacher_view"] | {key: value for key, value in seen.items() if value is not None}
    main, *others = [
        {**source, "teacher": None, "teacher_column": None, "where": source["where"] | _naming(source, name)}
        for source in ({key: prompts[key] for key in SourceConfig.model_fields}, *prompts["mix"])
        if source["teacher"] in (None, name)
    ]
    share = main.pop("weight", 1.0)
    mix = [{**source, "weight": source["weight"] / share} for source in others]
    horizon = settings["horizon"] if own["horizon"] is None else {"type": "fixed", "tokens": own["horizon"]}
    return {
        **settings,
        "teachers": [],
        "teacher": {key: value for key, value in own.items() if key not in OWN},
        "prompts": {**prompts, **main, "mix": mix, "teacher_view": view},
        "horizon": horizon,
        "divergence": {**settings["divergence"], "mixture": None},
    }


def _naming(source: dict[str, Any], name: str) -> dict[str, str]:
    return {source["teacher_column"]: name} if source["teacher_column"] else {}


def several_problems(config: Config) -> Iterator[str]:
    """What is wrong with several teachers, or names some where there are none."""
    teachers, sources = config.teachers, config.prompts.sources
    paths = ["prompts", *(f"prompts.mix.{place}" for place in range(len(sources) - 1))]
    naming = {path: s for path, s in zip(paths, sources, strict=True) if s.teacher or s.teacher_column}
    names = [teacher.name for teacher in teachers]
    if not teachers:
        yield from (f"{path}: its rows name teachers, and there is only one; write teachers" for path in naming)
        if config.divergence.mixture is not None:
            yield f"divergence.mixture: found {config.divergence.mixture}, but there is one teacher; remove it"
        return
    yield from (f"teachers: {n} of them are called {name}; rename them" for name, n in Counter(names).items() if n > 1)
    for path, source in naming.items():
        if source.teacher and source.teacher_column:
            yield f"{path}: teacher says it for all rows and teacher_column for each; leave out one of the two"
        if source.teacher and source.teacher not in names:
            yield f"{path}.teacher: found {source.teacher!r}; teachers are called {', '.join(names)}"
        if source.teacher_column and source.grades_itself:
            yield f"{path}.teacher_column: {source.source} has no columns; name its teacher in {path}.teacher"
    missing = [path for path in paths if path not in naming]
    if naming and missing:
        yield f"{missing[0]}: names no teacher, as {next(iter(naming))} does; set teacher or teacher_column there too"
    unused = [name for name in names if name not in {source.teacher for source in sources}]
    if naming and unused and not any(source.teacher_column for source in sources):
        yield f"teachers: no source names {', '.join(unused)}; remove it, or name it in prompts.teacher or prompts.mix"
    yield from _routed_problems(config) if naming else _mixed_problems(config)
    yield from _lacking_problems(config)


def _routed_problems(config: Config) -> Iterator[str]:
    if any(teacher.weight is not None for teacher in config.teachers):
        yield "teachers: weight is for teachers that score every row, and here each row names its own; remove weight"
    if config.divergence.mixture is not None:
        yield "divergence.mixture: each row names the one teacher that scores it, so nothing is mixed; remove it"


def _mixed_problems(config: Config) -> Iterator[str]:
    if any(teacher.horizon is not None for teacher in config.teachers):
        yield (
            "teachers: horizon is for the rows that name a teacher, and here every teacher scores every row; set the "
            "run's horizon, or name teachers with prompts.teacher_column"
        )
    if config.divergence.mixture == "distributions":
        if any(isinstance(teacher, ServedTeacher) for teacher in config.teachers):
            yield "divergence.mixture: distributions needs every teacher's model here; use losses, or load them (path)"
        if config.divergence.alignment is not None:
            yield "divergence.mixture: distributions is over the student's tokens; remove divergence.alignment"


def _lacking_problems(config: Config) -> Iterator[str]:
    """What goes by one teacher, or by none."""
    mix, served = config.rollout.mix, any(isinstance(teacher, ServedTeacher) for teacher in config.teachers)
    if config.divergence.type == "sft":
        yield "divergence.type: sft asks no teacher; write teacher in place of teachers"
    if any(teacher.view.model_dump(exclude=set(SEEN), exclude_defaults=True) for teacher in config.teachers):
        yield "teachers: what only teachers see is named for all of them; set prompts.teacher_view.context_column"
    if mix.teacher:
        yield f"rollout.mix.teacher: found {mix.teacher:g}, and of several teachers none writes text; set 0"
    if mix.given and served:
        yield "rollout.mix.given: a teacher at a URL scores only what the student drew; load it here (path)"
    h, fixed = config.horizon, "use horizon {type: fixed, full or scheduled}"
    if h.type in ("overlap", "diagnosed") or needs_probes(h):
        yield (
            f"horizon.type: {h.type} goes by one teacher; diagnose each (headstart diagnose RUN.yaml --teacher NAME), "
            f"set teachers' horizon, and {fixed}"
        )
    if config.probes.every:
        yield f"probes.every: found {config.probes.every}; probes go by one teacher: set 0"
    if config.sharding.type != "none":
        yield f"sharding.type: found {config.sharding.type}; several teachers are whole on every rank: set none"
    if config.student.chat_template == "teacher":
        yield "student.chat_template: teacher is not one of several; name a file or a model"

"""YAML file and `section.key=value` overrides to a Config, or one ConfigError that names everything that is wrong."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from yaml.constructor import ConstructorError

from headstart.config.recipes import recipe_file
from headstart.config.render import Place, describe, root
from headstart.config.schema import Config
from headstart.config.study import StudyConfig
from headstart.config.teachers import settings_alone
from headstart.config.text import MAX_LEVELS, plain, read_yaml, short, shown
from headstart.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
MAX_PROBLEMS, MAX_OVERRIDES = 30, 1000
"""Most problems that are listed, and most overrides read: whatever has more is no configuration."""


def load(path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the file or recipe `path` (None: an empty one), `overrides` (`section.key=value`) on top.

    Relative paths in the file mean what they mean on a command line: they start at the current directory. Raises
    ConfigError when the file cannot be read, is not YAML or not a mapping, and for every wrong key or value at once.
    """
    return parse({}, overrides) if path is None else _checked(Config, _mapping(Path(path)), overrides, str(path))


def parse(data: Mapping[str, Any], overrides: Sequence[str | tuple[str, Any]] = ()) -> Config:
    """The configuration in `data` (left unchanged) with `overrides` (text, or key and value) on top. Raises ConfigError
    as `load` does."""
    return _checked(Config, data, overrides, "configuration")


def for_teacher(config: Config, name: str) -> Config:
    """The run of several teachers as one of them would have it alone: its rows, its view, its horizon. Raises
    ConfigError where none is called `name`."""
    names = [teacher.name for teacher in config.teachers]
    if name not in names:
        raise ConfigError(
            f"--teacher: found {name!r}; "
            + (f"teachers are called {', '.join(names)}" if names else "there is only one")
        )
    return parse(settings_alone(config.model_dump(mode="json"), name))


def _checked(model: type[M], data: Mapping[str, Any], overrides: Sequence[str | tuple[str, Any]], name: str) -> M:
    value, problems = _validated(model, data, overrides, name)
    if value is None:
        raise _error(name, problems)
    return value


def _mapping(path: Path) -> Mapping[str, Any]:
    """What the file holds; nothing when it is empty or has comments only."""
    try:
        data = read_yaml(recipe_file(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; `headstart init --out {path}` writes one") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{short(str(path), 300)}: cannot be read ({error.strerror}); name a YAML file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: {error.problem or error.context}; mend the YAML there") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())}); save it as plain UTF-8 text") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if data is not None and not isinstance(data, Mapping):
        raise ConfigError(f"{path}: found {shown(plain(data))}; a configuration is a mapping of sections")
    return data or {}


def _validated(
    model: type[M], data: Mapping[str, Any], overrides: Sequence[str | tuple[str, Any]], name: str
) -> tuple[M | None, list[str]]:
    """The `model` in `data` with `overrides` on top, or None and everything that is wrong."""
    try:
        values = plain(data)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: {error}; use text, numbers, true, false, null, lists and mappings") from None
    start = root(model)
    problems = _override(values, overrides, start)
    values = _with_types(start, values)
    if values.get("teachers") and model is Config:
        if values.get("teacher") is not None:
            problems.append("teacher: found beside teachers; leave out one of the two")
        values["teacher"] = {"path": "the first of teachers"}
    try:
        # JSON mode is strict where it matters (true is not 1, "5" is not 5) and still reads lists as tuples.
        config = model.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        problems += [line for one in errors[: MAX_PROBLEMS + 1] for line in describe(one, values, start)]
    return (None, problems) if problems else (config, [])


def _with_types(place: Place, value: Any) -> Any:
    """`value` with the default `type` written into every tagged section that names none."""
    if not isinstance(value, Mapping):
        return value
    if place.default_tag is not None and "type" not in value:
        value = {"type": place.default_tag, **value}
    fields = place.within(value).fields
    return {key: _with_types(fields[key], item) if key in fields else item for key, item in value.items()}


def _error(name: str, problems: Sequence[str]) -> ConfigError:
    unique = list(dict.fromkeys(problems))
    more = "more than " if len(unique) > MAX_PROBLEMS else ""
    lines = [short(line, 1000) for line in unique[:MAX_PROBLEMS]]
    count = "1 problem" if len(lines) == 1 else f"{more}{len(lines)} problems"
    return ConfigError("\n  ".join([f"{name}: {count}", *lines]))


# --- overrides -------------------------------------------------------------------------------------------------------


def _override(data: dict[str, Any], overrides: Sequence[str | tuple[str, Any]], start: Place) -> list[str]:
    """Change `data`, a value of `start`, in place, one override after the other (a later one wins); returns the
    problems.

    An override is text whose value is YAML, or a path and its plain value. A change of a section's `type` drops the
    keys that only the previous type has, unless an override set them: those are kept, and validation then says that
    they do not fit.
    """
    if len(overrides) > MAX_OVERRIDES:
        return [f"{len(overrides):,} overrides: write them into a YAML file"]
    problems: list[str] = []
    overridden: set[str] = set()
    for override in overrides:
        try:
            path, value = _parsed(override) if isinstance(override, str) else override
            _set(data, path, value, overridden, start)
        except ValueError as error:
            problems.append(str(error))
    return problems


def _parsed(override: str) -> tuple[str, Any]:
    """Path and value. Raises ValueError with what is wrong."""
    path, equals, text = override.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise ValueError(
            f"{short(override, 100)}: not an override; write section.key=value, such as training.steps=100"
        )
    try:
        return path, plain(read_yaml(text))
    except (ConstructorError, ValueError, TypeError) as error:
        reason = error.problem if isinstance(error, ConstructorError) else error
        raise ValueError(f"{path}: found {shown(text)}; {reason}") from error
    except yaml.YAMLError as error:
        remedy = f"put text in quotes: '{path}=\"...\"'"
        raise ValueError(f"{path}: found {shown(text)}, which is not YAML; {remedy}") from error


def _set(data: dict[str, Any], path: str, value: Any, overridden: set[str], start: Place) -> None:
    """Put `value` at `path`, making mappings on the way where there is nothing. Raises ValueError where it cannot."""
    *sections, key = path.split(".")
    if not all((*sections, key)) or len(sections) >= MAX_LEVELS:
        raise ValueError(f"{short(path, 100)}: no such key; write section.key, such as training.steps")
    place: Place | None = start
    for depth, section in enumerate(sections, start=1):
        place = place.within(data).fields.get(section) if place else None
        if data.get(section) is None:
            data[section] = {}
        if not isinstance(data[section], dict):
            above = ".".join(sections[:depth])
            raise ValueError(f"{path}: {above} is {shown(data[section])} and has no keys; set {above} as a whole")
        data = data[section]
    if key == "type" and place is not None and isinstance(value, str) and value in place.variants:
        for old in place.within(data).fields.keys() - place.variants[value].fields.keys():
            if not any(f"{other}.".startswith(f"{place.path}.{old}.") for other in overridden):
                data.pop(old, None)
    data[key] = value
    overridden.add(path)


# --- studies ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Study:
    """A study and the run of each arm, in the study's order; seed and tuned rate are still those of the base."""

    config: StudyConfig
    arms: Mapping[str, Config]


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """The study in `path`; overrides of `base.*` change every arm's run, all others the study itself.

    Raises ConfigError with everything that is wrong, in the study, its base or any arm.
    """
    own = [text for text in overrides if not text.startswith("base.")]
    shared = [text.removeprefix("base.") for text in overrides if text.startswith("base.")]
    study = _checked(StudyConfig, _mapping(path), own, str(path))
    base_data = _mapping(Path(study.base)) if isinstance(study.base, str) else study.base
    base = _checked(Config, base_data, shared, f"{path}, base")
    problems: list[str] = []
    arms: dict[str, Config] = {}
    for name, changes in study.arms.items():
        if len(problems) > MAX_PROBLEMS:
            break
        arm, wrong = _validated(Config, base_data, [*shared, *changes.items()], str(path))
        if arm is not None:
            arms[name] = arm
            wrong = list(_unfair(study, base, arm))
        problems += [f"arm {name}: {line}" for line in wrong]
    names = list(arms)
    equal = [(a, b) for i, a in enumerate(names) for b in names[:i] if arms[a] == arms[b]]
    problems += [f"arms: {b} and {a} are the same run; change a knob in one or leave it out" for a, b in equal]
    if base.evaluation is None:
        problems.append("base.evaluation: missing; accuracies are read off the run's own evaluations: add the section")
    elif study.tuning and study.tuning.task == base.evaluation.task:
        problems.append("tuning.task: these are the problems that are reported; name a development split")
    if problems:
        raise _error(str(path), problems)
    if base.evaluation and base.evaluation.every is None:
        warnings.warn(
            "evaluation.every is null, so every curve is one straight line from start to end; set it to a fraction of "
            "training.steps to compare at equal tokens or seconds",
            stacklevel=2,
        )
    return Study(study, arms)


def _unfair(study: StudyConfig, base: Config, arm: Config) -> Iterator[str]:
    """What an arm must leave alone, because the study sets it or because it is the yardstick."""
    if arm.evaluation != base.evaluation:
        yield "evaluation: every arm is judged alike; change it in the base"
    if arm.training.seed != base.training.seed:
        yield f"training.seed: found {arm.training.seed}; every arm runs with the study's seeds"
    if study.tuning and arm.optimizer.lr != base.optimizer.lr:
        yield f"optimizer.lr: found {arm.optimizer.lr:g}, but tuning.rates chooses it; leave out one of the two"

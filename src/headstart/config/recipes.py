"""Recipes: runs that come with the package, taken by name wherever a run file is: `recipe:tiny-esr`."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from headstart.errors import ConfigError

PREFIX = "recipe:"
FOLDER = Path(__file__).parents[1] / "data" / "recipes"


def recipes() -> dict[str, str]:
    """What each recipe is, by its name: the first line of its file."""
    files = sorted(FOLDER.glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").split("\n")[0].lstrip("# ") for path in files}


def recipe_file(path: Path) -> Path:
    """The file of `recipe:NAME`, and any other path as it is. Raises ConfigError for a name that is none."""
    if not str(path).startswith(PREFIX):
        return path
    name, known = str(path).removeprefix(PREFIX), list(recipes())
    if name not in known:
        near = get_close_matches(name, known) or known
        raise ConfigError(f"{path}: no such recipe; did you mean {' or '.join(near)}? `headstart recipes` lists all")
    return FOLDER / f"{name}.yaml"

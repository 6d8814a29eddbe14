"""Refuse merge-conflict markers in any text file, and in pages dead relative links and flags that no command takes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import typer

from headstart.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
MARKER = re.compile(r"^(<{7}|>{7}|\|{7})( |$)")
LINK = re.compile(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
COMMAND = re.compile(r"(?:^|[`$] ?|-m )headstart ([a-z]+)((?:[ \]][^`#|;&]*)?)")
FLAG = re.compile(r"(?<=[ \[])--?[a-z][\w-]*")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$")


def prose(text: str) -> list[tuple[int, str]]:
    """Numbered lines outside fenced code, with inline code removed: a link in code is not a link."""
    lines, fence = [], ""
    for number, line in enumerate(text.split("\n"), start=1):
        if mark := FENCE.match(line):
            fence = "" if fence and mark[1].startswith(fence) else fence or mark[1]
        elif not fence:
            lines.append((number, re.sub(r"`[^`]*`", "", line)))
    return lines


def anchors(path: Path) -> set[str]:
    """The fragments that a page's headings can be reached by, as GitHub makes them."""
    found = [HEADING.match(line) for _, line in prose(path.read_text(encoding="utf-8").replace("`", ""))]
    return {re.sub(r"[^\w\- ]", "", match[1].lower()).replace(" ", "-") for match in found if match}


def broken_links(path: Path) -> list[str]:
    problems = []
    for number, line in prose(path.read_text(encoding="utf-8")):
        for target in LINK.findall(line):
            if re.match(r"[a-z][a-z0-9+.-]*:", target):
                continue
            name, _, fragment = target.partition("#")
            place = path.parent / name if name else path
            if not place.exists():
                problems.append(f"{path.relative_to(ROOT)}:{number}: the link to {target} leads nowhere")
            elif fragment and place.suffix == ".md" and fragment not in anchors(place):
                problems.append(f"{path.relative_to(ROOT)}:{number}: {name or path.name} has no heading #{fragment}")
    return problems


def flags() -> dict[str, set[str]]:
    """What each verb of the command line takes."""
    commands = typer.main.get_command(app).commands
    return {
        verb: {
            "--help",
            *(flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)),
        }
        for verb, command in commands.items()
    }


def unknown_flags(path: Path, known: dict[str, set[str]]) -> list[str]:
    """Commands in fenced blocks of a shell and in inline code that `headstart` would not take."""
    problems, shell, begun = [], None, ""
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if mark := FENCE.match(line):
            shell = None if shell is not None else line[mark.end() :].strip() in ("", "sh", "bash", "console")
            continue
        if shell is False:
            continue
        line, begun = begun + line, ""
        if shell and line.endswith("\\"):
            begun = line[:-1]
            continue
        for verb, rest in COMMAND.findall(line):
            place = f"{path.relative_to(ROOT)}:{number}"
            if verb not in known:
                problems += (
                    [f"{place}: there is no `headstart {verb}`"] if shell or f"`headstart {verb}" in line else []
                )
            else:
                unknown = [flag for flag in FLAG.findall(rest) if flag not in known[verb]]
                problems += [f"{place}: `headstart {verb}` has no {flag}" for flag in unknown]
    return problems


def markers(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        return []
    name = path.relative_to(ROOT)
    return [f"{name}:{n}: a merge-conflict marker" for n, line in enumerate(lines, start=1) if MARKER.match(line)]


def main() -> int:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    files = [ROOT / name for name in names if name and (ROOT / name).is_file()]
    problems = [problem for path in files for problem in markers(path)]
    problems += [problem for path in files if path.suffix == ".md" for problem in broken_links(path)]
    known = flags()
    problems += [problem for path in files if path.suffix == ".md" for problem in unknown_flags(path, known)]
    print(*problems, sep="\n", end="\n" if problems else "")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

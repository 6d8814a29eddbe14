"""The report page: what it reads, what it shows for each file, what it does without them, and that it stands alone."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headstart.errors import RunFolderError
from headstart.reports import contents
from headstart.reports.contents import write_report
from headstart.reports.figures import decay_figure, spread
from headstart.reports.page import Code, Fold, Page, Picture, Section, Table, Text, Token, Tokens, html, markdown
from headstart.reports.readings import BUILDERS
from headstart.reports.run import READINGS, labels, read_run
from headstart.reports.wording import decay_reading, estimate
from run_folders import Curve, decay, readings, share, write_evaluation, write_readings, write_run

CURVE: Curve = [(0, 0.0, 0, 0.46), (10, 1.0, 1280, 0.8), (20, 2.0, 2560, 0.97)]
LATE: Curve = [(0, 0.0, 0, 0.46), (20, 8.0, 30000, 0.98)]
TITLES = {title for title, _ in BUILDERS.values()}


class Reader(HTMLParser):
    """Collects tags with their attributes and the text by section; fails on a closing tag that does not match."""

    VOID = ("meta", "img", "link", "br", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)
        if "style" not in self.open:
            self.text += data.replace("\u00a0", " ")  # intervals do not break

    def cells(self, first: str) -> list[str]:
        """The cells of the row that begins with `first`."""
        found = re.search(rf"\n?{re.escape(first)}([^\n]*)\n", self.text)
        assert found is not None, first
        return found.group(1).split()


def report(*folders: Path, out: Path | None = None) -> tuple[Reader, str]:
    """The page as read from its file, and the Markdown copy."""
    (page, twin), _ = write_report(folders, out)
    return Reader(page.read_text(encoding="utf-8")), twin.read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = write_run(tmp_path / "esr", CURVE)
    write_readings(folder)
    return folder


# --- the page --------------------------------------------------------------------------------------------------------


def test_everything_is_shown_described_and_self_contained(run: Path) -> None:
    page, twin = report(run)
    assert page.open == []
    assert set(page.titles) >= {"Before and after", "Accuracy against cost", "Training", "What was run"}
    assert set(page.titles) - {"Before and after", "Accuracy against cost", "Training", "What was run"} == TITLES
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 8
    assert all(len(image["alt"] or "") > 60 for image in images)
    assert all((image["src"] or "").startswith("data:image/svg+xml;base64,") for image in images)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe", "object")]
    text = (run / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert "cannot be shown" not in text
    assert "What is not here" not in text
    for title in page.titles:
        assert f"## {title}" in twin
    for link in re.findall(r"\]\(([^)]+)\)", twin):
        assert (run / link).read_text().startswith("<?xml")


def test_before_and_after_is_paired(tmp_path: Path) -> None:
    page, _ = report(write_run(tmp_path / "esr", CURVE))
    assert page.cells("accuracy46.0%")[:1] == ["97.0%+51.0"]
    assert "stopped by itself100.0%100.0%+0.0 [-3.0, +3.0]" in page.text


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder without training or readings: a page without figures of its own."""
    return write_run(tmp_path / "bare", [])


@pytest.mark.parametrize("name", BUILDERS)
def test_a_section_is_there_exactly_with_its_file(bare: Path, name: str) -> None:
    assert set(BUILDERS) == set(READINGS)
    write_readings(bare, [name])
    page, twin = report(bare)
    assert TITLES & set(page.titles) == {BUILDERS[name][0]}
    assert "cannot be shown" not in twin


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("content", ['{"format": 1}', '{"format": 1, "bins": 3, "points": [1], "findings": "x"}'])
def test_a_file_without_its_content_gives_one_line(bare: Path, name: str, content: str) -> None:
    write_readings(bare, [name])
    (bare / f"{name}.json").write_text(content)
    page, twin = report(bare)
    assert twin.count("cannot be shown") == 1
    assert f"bare/{name}.json cannot be shown" in page.text
    assert TITLES & set(page.titles) == {BUILDERS[name][0]}


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "cannot be read"), ("[1]", "it holds a list"), ('{"format": 2}', "has format 2, this version reads 1")],
)
def test_unreadable_and_foreign_files_give_one_line(bare: Path, content: str, said: str) -> None:
    write_readings(bare, ["explain/swap"])
    (bare / "explain" / "swap.json").write_text(content)
    page, _ = report(bare)
    assert page.text.count(said) == 1
    assert "swap.json" in page.text
    assert BUILDERS["explain/swap"][0] not in page.titles


def test_damaged_run_files_give_a_line_each(tmp_path: Path) -> None:
    run = write_run(tmp_path / "esr", CURVE)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "st')
    (run / "eval" / "step_000010.json").write_text("{")
    (run / "eval" / "step_000020.jsonl").write_text("torn")
    (run / "environment.json").write_bytes(b"\xff\xfe")
    page, _ = report(run)
    assert "metrics.jsonl: 1 lines cannot be read" in page.text
    assert "eval/step_000010.json cannot be read" in page.text
    assert "environment.json cannot be read" in page.text
    assert page.cells("accuracy46.0%") == ["97.0%-"]  # without responses there is nothing to pair


@pytest.mark.parametrize(
    "name", ["lone \udcff surrogate", "no $\\frac{formula$", "$x$ and $y", "separators \u2028 \x85"]
)
def test_any_name_makes_a_page_and_any_response_is_paired(tmp_path: Path, name: str) -> None:
    runs = [write_run(tmp_path / arm, CURVE, {"type": f"{arm} {name}"}) for arm in ("a", "b")]
    rows = runs[0] / "eval" / "step_000020.jsonl"
    text = json.dumps(name, ensure_ascii=False)
    content = rows.read_text().replace('"response": ""', f'"response": {text}')
    rows.write_bytes(content.encode(errors="backslashreplace"))
    paths, read = write_report(runs, tmp_path / "report.html")
    assert len(read[0].points[-1].graded()["correct"]) == 100
    page, twin = (path.read_text(encoding="utf-8") for path in paths)
    Reader(page)
    assert " ".join(name.encode(errors="backslashreplace").decode().split()).split(" ")[0] in twin
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("horizon", "told"),
    [
        ({"type": "fixed", "tokens": 16, "preset": None}, "fixed, tokens 16"),
        ({"type": "full", "max_tokens": None}, "full"),
        ({"type": "linear", "start": 0, "end": None, "over": 0.5}, "linear, start 0, over 0.5"),
        ({"type": "fixed", "tokens": 100, "preset": "math"}, "fixed, tokens 100, preset math"),
    ],
)
def test_settings_in_short_leave_out_what_is_not_set(tmp_path: Path, horizon: dict[str, Any], told: str) -> None:
    _, twin = report(write_run(tmp_path / "run", CURVE, horizon))
    assert f"| horizon | {told} |" in twin


def test_no_run_folder_is_an_error_and_so_is_an_unwritable_place(tmp_path: Path, bare: Path) -> None:
    with pytest.raises(RunFolderError, match="no such folder"):
        write_report([tmp_path / "none"])
    with pytest.raises(RunFolderError, match=r"no config\.yaml"):
        write_report([bare, tmp_path])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="--out"):
        write_report([bare], tmp_path / "file" / "page.html")


def test_a_bare_run_says_what_is_missing(tmp_path: Path) -> None:
    page, _ = report(write_run(tmp_path / "bare", CURVE))
    assert page.titles == ["Before and after", "Accuracy against cost", "Training", "What was run", "What is not here"]
    assert f"headstart explain {tmp_path / 'bare'}" in page.text


def test_runs_without_steps_evaluations_or_anything(tmp_path: Path) -> None:
    started = write_run(tmp_path / "started", [])
    page, _ = report(started)
    assert "Training" not in page.titles
    write_evaluation(started, 0, 0.5)
    page, _ = report(started)
    assert "was evaluated only once" in page.text
    unmeasured = write_run(tmp_path / "unmeasured", CURVE)
    for file in (unmeasured / "eval").iterdir():
        file.unlink()
    page, _ = report(unmeasured)
    assert page.titles[:2] == ["Training", "What was run"]


# --- several runs ----------------------------------------------------------------------------------------------------


def test_comparison_tells_differences_of_configurations_and_of_accuracy(run: Path, tmp_path: Path) -> None:
    twin = write_run(tmp_path / "full", LATE, {"type": "full", "max_tokens": 200})
    (twin / "environment.json").write_text('{"python": "3.12", "cpus": 2}')
    write_readings(twin, ["diagnose/decay"])
    page, _ = report(run, twin)
    assert (run / "comparison.html").exists()
    assert "2 runs compared" in page.text
    assert "horizon.typefixedfull" in page.text
    assert "student.path" in page.text
    assert page.text.count("horizon.max_tokens-200") == 1
    assert "The runs differ in python, so compare their seconds with care." in page.text
    assert "full rollouts came level at the last evaluation, after 8.0 s (98.0%, 4.0 times as long)" in page.text
    assert "full rollouts: end, equal steps, first past 2.0 s2098.0%" in page.text
    assert {f"{BUILDERS['diagnose/decay'][0]} ({name})" for name in ("early stopping, N = 16", "full rollouts")} <= set(
        page.titles
    )
    names = [path.name for path in (run / "comparison_figures").iterdir()]
    assert {"decay.svg", "decay-1.svg", "accuracy.svg", "training.svg"} <= set(names)


def test_a_diagnosis_folder_lends_its_readings(tmp_path: Path) -> None:
    run, diagnosis = write_run(tmp_path / "esr", CURVE), write_run(tmp_path / "dia", [])
    write_readings(diagnosis, ["diagnose/decay", "diagnose/recommendation"])
    page, _ = report(run, diagnosis)
    assert "Headstart: early stopping, N = 16" in page.text
    assert f"{BUILDERS['diagnose/decay'][0]} (dia)" in page.titles
    assert "teacher (in the diagnosis)-98.4%" in page.text
    alone, _ = report(diagnosis)
    assert alone.titles[:2] == ["What was run", BUILDERS["diagnose/recommendation"][0]]


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    same = [read_run(write_run(tmp_path / name / "run", CURVE)) for name in ("a", "b")]
    assert labels(same) == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]
    other = read_run(write_run(tmp_path / "c", CURVE, {"type": "diagnosed"}))
    assert labels([same[0], other]) == ["early stopping, N = 16", "diagnosed horizon, N = 16"]
    assert labels([same[0], read_run(write_run(tmp_path / "d", CURVE))]) == ["run", "d"]


# --- single readings -------------------------------------------------------------------------------------------------


def test_findings_decay_and_recommendation(bare: Path) -> None:
    write_readings(bare)
    page, _ = report(bare)
    assert "Warning, prompts: 3 are duplicates. Drop them" in page.text
    assert "1 checks without a complaint" in page.text
    assert "Start with N = 16." in page.text
    assert "32 of 64 (50%) hold a mistake; the teacher is right after 31 of 32 (97%) of the clean ones" in page.text


def test_swap_is_prefix_by_row_and_tail_by_column(bare: Path) -> None:
    write_readings(bare, ["explain/swap"])
    page, _ = report(bare)
    assert "first 16 tokens fromrest from beforerest from after" in page.text
    low, high = (100 * share(9, 10)[key] for key in ("low", "high"))
    assert f"after90% [{low:.0f}, {high:.0f}]-" in page.text


def test_tokens_are_shaded_by_divergence_and_tell_the_alternatives(bare: Path) -> None:
    write_readings(bare, ["explain/samples"])
    page, twin = report(bare)
    spans = [attrs for tag, attrs in page.tags if tag == "span"][:3]
    assert [span.get("class") for span in spans] == [None, "k5", "k1"]
    assert spans[1]["data-note"] == "5.83 nats, the teacher's no. 3; it would say “A” 98.0%, “B” 2.0%"
    assert [span.get("tabindex") for span in spans] == [None, "0", "0"]
    assert "token 2, “B”: 5.83 nats" in page.text
    assert "use B⟨5.83⟩ <eos>⟨0.10⟩" in twin


def test_decay_reading_follows_the_figures() -> None:
    def told(**last: Any) -> str:
        record = decay()
        record["points"][-1].update(last)
        return decay_reading(record)

    assert "the curve is the share of spoiled prefixes" in told()
    assert "do not explain the whole fall" in told(after_own=share(30, 64))
    assert "no measurable decay" in told(after_student=share(62, 64))
    assert "does not explain the fall" in told(after_wrong=share(32, 32))
    assert decay_reading({"points": []}) == ""


def test_decay_is_read_where_the_task_cannot_tell_the_state_of_a_prefix() -> None:
    def told(**changed: Any) -> str:
        record = decay()
        for point in record["points"]:
            point.update(after_clean=share(0, 0), after_wrong=share(0, 0), after_finished=share(1, 16), **changed)
        return decay_reading(record)

    assert told().startswith(
        "After 4 of the student's tokens the teacher is right on 57 of 64 (89%), alone on 63 of 64"
    )
    assert "25% of the student's responses had ended" in told()
    assert told().endswith("It continues such text more than it corrects it.")
    assert "worse after its own, too" in told(after_own=share(20, 64))
    assert told(after_student=share(60, 64)) == "There is no measurable decay here."


def test_a_task_that_cannot_tell_the_state_of_a_prefix_has_one_panel() -> None:
    record = decay()
    assert len(decay_figure(record).axes) == 2
    for point in record["points"]:
        point.update(after_clean=share(0, 0), after_wrong=share(0, 0), after_finished=share(3, 9))
    assert len(decay_figure(record).axes) == 1


def test_undefined_estimates_are_a_dash_and_percent_signs_are_said_once() -> None:
    assert [estimate(None), estimate({"value": None, "low": 0, "high": 1})] == ["-", "-"]
    assert estimate({"value": 0.5, "low": 0.4, "high": 0.6}, ".0%") == "50% [40, 60]"
    assert estimate({"value": 0.5, "low": 0.4, "high": 0.6}, ".2f") == "0.50 [0.40, 0.60]"


def test_figures_are_the_same_each_time_and_bear_missing_values(bare: Path, tmp_path: Path) -> None:
    write_readings(bare, ["diagnose/decay"])
    record = readings()["diagnose/decay"]
    for point in record["points"]:
        point.update(after_clean=share(0, 0), after_wrong=share(0, 0))
    (bare / "diagnose" / "decay.json").write_text(json.dumps(record))
    (one, _), _ = write_report([bare], tmp_path / "one.html")
    (two, _), _ = write_report([bare], tmp_path / "two.html")
    assert one.read_text() == two.read_text()
    assert "cannot be shown" not in one.read_text()


@given(st.lists(st.floats(0, 1), max_size=6).map(sorted), st.floats(0.01, 0.3))
def test_spread_labels_keep_order_and_distance(heights: list[float], step: float) -> None:
    placed = spread(heights, step)
    assert len(placed) == len(heights)
    assert all(b - a >= step - 1e-9 for a, b in zip(placed, placed[1:], strict=False))
    if all(b - a >= step for a, b in zip(heights, heights[1:], strict=False)):
        assert placed == pytest.approx(heights)


# --- hostile text ----------------------------------------------------------------------------------------------------

HOSTILE = "<script>alert('1')</script> a|b `c` ```\n# d [e](f) “” \" & \\"


def test_nothing_is_read_as_markup() -> None:
    blocks = [Text(HOSTILE, "soft"), Table((HOSTILE, HOSTILE), [[HOSTILE, HOSTILE]]), Code(HOSTILE),
              Picture("x", "<svg/>", HOSTILE, HOSTILE), Fold(HOSTILE, [Text(HOSTILE)]),
              Tokens(HOSTILE, [Token(HOSTILE, 3, HOSTILE)], [HOSTILE])]  # fmt: skip
    page = Page(HOSTILE, blocks, [Section(HOSTILE, blocks)])
    read = Reader(html(page))
    assert not [tag for tag, _ in read.tags if tag == "script"]
    assert read.open == []
    assert HOSTILE in read.text
    text = markdown(page, "figures")
    outside = re.sub(r"^(`{3,})\n.*?\n\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside
    rows = [line for line in outside.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {3}


# --- phones, the dark, samples ----------------------------------------------------------------------------------------


def test_the_page_fits_a_phone_and_the_dark(bare: Path) -> None:
    page, _ = report(bare)
    metas = {attrs.get("name"): attrs.get("content") for tag, attrs in page.tags if tag == "meta"}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["color-scheme"] == "light dark"
    style = (bare / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    dark, pictures = re.search(r"@media \(prefers-color-scheme: dark\) \{(.*?)\n\}", style, re.S), r"\.card img \{[^}]*"
    assert dark is not None
    assert "--ground:" in dark[1]
    assert re.search(pictures + "filter: invert", dark[1]), "figures are drawn on white"
    assert re.search(pictures + "filter: none", style.split("@media print")[1]), "and printed on it"
    for selector, rules in re.findall(r"([^{}]+)\{([^{}]*)\}", style):
        for size, unit in re.findall(r"(?<!max-)\bwidth: ([\d.]+)(px|rem)", rules):
            wide = float(size) * (16 if unit == "rem" else 1) > 360
            assert not wide or selector.strip() == ".card img", f"{selector.strip()} is wider than a phone"
    for box in (".scroll", ".card"):  # what may be wider scrolls in its own box
        assert re.search(rf"\n\{box} {{[^}}]*overflow-x: auto", style)


def rollout(**more: Any) -> dict[str, Any]:
    sample = {
        "problem_id": "p/<1>", "sample_index": 0, "prompt": "what is\n2 + 2?", "tokens": ["It", " is", " <5>"],
        "divergence": [0.0, 0.3, 2.5], "scored": 3, "stopped": False, "verdict": "unfinished",
    }  # fmt: skip
    return {**sample, **more}


def save(run: Path, step: int, *samples: dict[str, Any]) -> None:
    (run / "rollouts").mkdir(exist_ok=True)
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (run / "rollouts" / f"step_{step:06d}.jsonl").write_text(lines)


def test_rollouts_of_the_first_and_the_last_step_are_shown(bare: Path) -> None:
    save(bare, 1, rollout(), rollout(problem_id="p/2"))
    save(bare, 10, rollout(problem_id="p/10"))
    save(bare, 20, rollout(problem_id="p/20", stopped=True, verdict="right"))
    page, twin = report(bare)
    assert "Rollouts of the training" in page.titles
    assert "p/<1> sample 0: 3 tokens, reached the horizon, 0.9333 nats per token, unfinished" in page.text
    assert "p/20 sample 0: 3 tokens, stopped, 0.9333 nats per token, right" in page.text
    assert "p/2 sample" in page.text
    assert "p/10" not in page.text
    assert "Prompt: what is 2 + 2?" in page.text
    shades = [attrs.get("class") for tag, attrs in page.tags if tag == "span"]
    assert shades[:3] == [None, "k2", "k5"]
    assert "It is⟨0.30⟩ <5>⟨2.50⟩" in twin
    assert "largest divergence, in nats: “&lt;5>” 2.50, “is” 0.30" in twin


@pytest.mark.parametrize("bad", [{"problem_id": "p"}, rollout(divergence=[0.1]), rollout(tokens=None)])
def test_rollouts_of_another_make_give_one_line(bare: Path, bad: dict[str, Any]) -> None:
    save(bare, 1, bad)
    save(bare, 20, rollout())
    with (bare / "rollouts" / "step_000020.jsonl").open("a") as file:
        file.write('{"problem')
    page, _ = report(bare)
    assert page.text.count("The rollouts of step 1 cannot be shown") == 1
    assert "step_000020.jsonl: 1 lines cannot be read" in page.text
    assert "p/<1> sample 0" in page.text


def test_who_wrote_the_text_and_what_the_teacher_saw_are_among_the_settings() -> None:
    shares = {"rollout.mix.student": None, "rollout.mix.teacher": 0.25, "rollout.mix.given": 0.0}
    assert contents._short(shares, "rollout.mix") == "teacher 0.25"
    assert contents._short(dict.fromkeys(shares, 0.0), "rollout.mix") is None
    assert {"rollout.mix", "prompts.teacher_view.context_column"} <= {*contents.SHORT}

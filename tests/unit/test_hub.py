"""What is uploaded when a run ends, and what is refused before it starts; the hub is a fake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from headstart.config import loader
from headstart.config.schema import OutputConfig
from headstart.distillation.run import distill
from headstart.errors import ConfigError
from headstart.models.export import model_card
from headstart.models.hub import check_push
from support import make_config

ME = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}


class FakeHub:
    """Stands for HfApi: `who` is logged in, or the error that whoami raises; uploads fail with `broken`."""

    def __init__(self, who: dict[str, Any] | Exception = ME, broken: Exception | None = None) -> None:
        self.who, self.broken = who, broken
        self.made: list[tuple[str, bool, bool]] = []
        self.files: dict[str, set[str]] = {}

    def __call__(self) -> FakeHub:
        return self

    def whoami(self) -> dict[str, Any]:
        if isinstance(self.who, Exception):
            raise self.who
        return self.who

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
        self.made.append((name, private, exist_ok))

        class Url(str):
            repo_id = name

        return Url(f"hub:{name}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        if self.broken is not None:
            raise self.broken
        self.files[repo_id] = {path.name for path in folder_path.iterdir()}


def install(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> FakeHub:
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


def test_the_model_and_its_card_are_uploaded_when_the_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = install(monkeypatch, FakeHub())
    distill(make_config(tmp_path, "training.steps=1", "output.push=lab/student"), out=tmp_path / "run")
    assert hub.made == [("lab/student", True, True)]
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= hub.files["lab/student"]
    assert "model pushed to hub:lab/student" in capsys.readouterr().out


def test_an_upload_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = install(monkeypatch, FakeHub(broken=OSError("no route")))
    config = make_config(tmp_path, "training.steps=1", "output={push: student, private: false}")
    with pytest.warns(UserWarning, match=rf"no route.*hf upload student {tmp_path}/run/model \.$"):
        result = distill(config, out=tmp_path / "run")
    assert hub.made == [("student", False, True)]
    assert (result.path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("who", "repository", "words"),
    [
        (OSError("Token is required."), "me/student", "Token is required; log in with `hf auth login`"),
        (ME, "you/student", "logged in for me, lab"),
        ({**ME, "auth": {"accessToken": {"role": "read"}}}, "me/student", "may only read"),
        (ME, "a/b/c", "a repository is owner/name"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_the_run_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: Any, repository: str, words: str
) -> None:
    install(monkeypatch, FakeHub(who))
    with pytest.raises(ConfigError) as error:
        distill(make_config(tmp_path, f"output.push={repository}"), out=tmp_path / "run")
    assert f"output.push: found {repository}" in str(error.value)
    assert words in str(error.value)
    assert not (tmp_path / "run").exists()


def test_nothing_is_asked_of_the_hub_without_push(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeHub(AssertionError("asked")))
    check_push(OutputConfig())


@pytest.mark.parametrize(("student", "named"), [("Qwen/Qwen2.5-0.5B", True), ("tiny:student", False), ("./m/s", False)])
def test_a_card_names_a_base_model_of_the_hub_alone(student: str, named: bool) -> None:
    config = loader.parse({"student": {"path": student}, "teacher": {"path": "a/b"}, "prompts": {"source": "tiny"}})
    header = model_card(config, "1", 0, None, (1,), "bfloat16").split("---")[1]
    assert yaml.safe_load(header).get("base_model") == (student if named else None)

"""Door to the hub: what its cache holds, data sets as files, and finished models that are uploaded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headstart.config.schema import OutputConfig
from headstart.errors import ConfigError, first_line


def cached_folder(name: str, file: str, revision: str | None) -> Path | None:
    """Where `file` of a repository lies on this machine; None where it was never downloaded. Raises ValueError for what
    is no name of a repository."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def download(name: str, patterns: Sequence[str]) -> Path:
    """The files of a data set. The hub's client raises over a dozen unrelated types."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, repo_type="dataset", allow_patterns=[*patterns]))


def check_push(output: OutputConfig) -> None:
    """Raise ConfigError, before anything is trained, where the model could not be uploaded to `output.push`."""
    if output.push is None:
        return
    from huggingface_hub import HfApi

    remedy = "log in with `hf auth login` (a token that may write), or set output.push=null"
    try:
        if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", output.push):
            raise ValueError("a repository is owner/name")
        who: dict[str, Any] = HfApi().whoami()
    except Exception as error:
        raise ConfigError(f"output.push: found {output.push}, but {_reason(error)}; {remedy}") from error
    names = [who["name"], *(group["name"] for group in who.get("orgs", ()))]
    if (owner := output.push.rpartition("/")[0]) and owner not in names:
        raise ConfigError(f"output.push: found {output.push}, but you are logged in for {', '.join(names)}; {remedy}")
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ConfigError(f"output.push: found {output.push}, but the token of {who['name']} may only read; {remedy}")


def push(folder: Path, output: OutputConfig) -> str | None:
    """Upload `folder` to `output.push`; returns where it is now. A failure is a warning: the model is here."""
    from huggingface_hub import HfApi

    try:
        repository = HfApi().create_repo(str(output.push), private=output.private, exist_ok=True)
        HfApi().upload_folder(repo_id=repository.repo_id, folder_path=folder, commit_message="Distilled with Headstart")
        return str(repository)
    except Exception as error:
        private = " --private" if output.private else ""
        warnings.warn(
            f"the model was not pushed to {output.push}: {_reason(error)}. It is in {folder}; push it later with: "
            f"hf upload {output.push} {folder} .{private}",
            stacklevel=2,
        )
        return None


def _reason(error: Exception) -> str:
    return first_line(error).rstrip(".")[:300]

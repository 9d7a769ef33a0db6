"""Pushing an adapter to the Hub together with its own model card."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import EntryNotFoundError

from .model_card import update_model_card


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    metrics: Mapping[str, Any] | None = None,
    log_history: Iterable[Mapping[str, Any]] = (),
    commit_message: str = "Upload adapter",
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Uploads the adapter with a card that says how it is loaded, what it is, and what was measured.

    `model.push_to_hub` uploads the same files, but writes a card of transformers over this one. A card that is on the
    Hub already, such as that of `Trainer.push_to_hub`, keeps its text and gets the sections.

    Args:
        model: a `PeftModel`, or a model of transformers with an adapter.
        repo_id: `"user/name"`; it is created where it does not exist.
        metrics: see `update_model_card`.
        log_history: see `update_model_card`.
        commit_message: the first line of the commit.
        revision: the branch, created where it does not exist; default: the main one.
        private: whether a repository that is created is private.
        token: of the account, if not that of the machine.

    Returns:
        the commit.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            there = api.hf_hub_download(repo_id, "README.md", revision=revision)
        except EntryNotFoundError:
            pass
        else:
            (Path(folder) / "README.md").write_bytes(Path(there).read_bytes())
        model.save_pretrained(folder)
        update_model_card(folder, metrics, log_history)
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision)

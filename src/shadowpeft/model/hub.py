"""Adapter folders from and to the hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from shadowpeft.errors import CheckpointError
from shadowpeft.model.tensors import CONFIG_FILE, WEIGHTS_FILE

CARD_FILE = "README.md"


def find_folder(adapter: str | Path, **hub_options: Any) -> Path:
    """The folder of an adapter: a local path, or a hub name (downloaded, only the files of the format)."""
    path = Path(adapter).expanduser()
    if path.is_dir():
        return path
    if path.exists() or str(adapter).startswith((".", "/", "~")):
        raise CheckpointError(f"{adapter} is not an adapter folder; expected a folder with {CONFIG_FILE}")
    try:
        return Path(snapshot_download(str(adapter), allow_patterns=[CONFIG_FILE, WEIGHTS_FILE], **hub_options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{str(adapter)!r} is neither a local folder nor an adapter that could be fetched from the hub "
            f"({type(error).__name__}); check the name, the network, or pass a local folder"
        ) from error


def upload(
    folder: Path,
    repo_id: str,
    *,
    token: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Uploads the three files of an adapter folder, to a branch that is made if need be; returns the commit's address."""
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not revision.startswith("refs/pr"):  # a pull request has a branch already
        api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
    return api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder.expanduser(),
        allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE],
        commit_message=commit_message or "Upload ShadowPEFT adapter",
        revision=revision,
        create_pr=create_pr,
    ).commit_url

"""Writing files so that a reader finds the old content or the new one, never half of it."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shadowpeft.errors import ConfigError, ShadowPeftError

# What a killed process may leave in a folder: files that were not moved into place.
STAGING_PREFIX = ".saving-"


class SaveError(ShadowPeftError, OSError):
    """A folder that could not be written; what was there before is untouched."""


def failed_write(error: BaseException) -> str | None:
    """What the system said, if ``error`` is a failed write; None for anything else.

    Not all writers raise OSError: torch's hides the reason, and safetensors' and tokenizers', in Rust, have errors of
    their own that end in the system's number.
    """
    if isinstance(error, SaveError) and error.__cause__ is not None:
        return failed_write(error.__cause__)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is not None:
        return os.strerror(int(number[1]))
    is_torch = isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter", str(error))
    return "the file could not be written" if is_torch else None


@contextmanager
def save_errors(what: str, way_out: str) -> Iterator[None]:
    """Within the block a failed write is a :class:`SaveError` of ``what``, the reason and the ``way_out``."""
    try:
        yield
    except Exception as error:
        reason = failed_write(error)
        if reason is not None:
            raise SaveError(f"{what}: {reason}; {way_out}") from error
        raise


def write_files(folder: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a temporary folder beside ``folder``, then moves every file into place.

    Raises:
        SaveError: disk full, read-only, or a file where the folder should be. Old files stay as they were.
    """
    with save_errors(f"cannot write to {folder}", "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=folder))
    way_out = "the files that were there are unchanged. Free some space or choose another folder"
    try:
        with save_errors(f"could not save to {folder}", way_out):
            write(staging)
            sync_tree(staging)
            _replace_all(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_all(staging: Path, folder: Path) -> None:
    """Moves every file to the same place below ``folder``: a folder that is not empty cannot be replaced by a rename."""
    filled = [folder]
    for path in sorted(staging.rglob("*")):  # a folder comes before what is in it
        target = folder / path.relative_to(staging)
        if path.is_dir():
            target.mkdir(exist_ok=True)
            filled.append(target)
        else:
            os.replace(path, target)
    for path in reversed(filled):
        _sync(path)


def contents(folder: Path) -> list[Path]:
    """What is in a folder; nothing if it is absent.

    Raises:
        ConfigError: it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose another output folder")
    return list(folder.iterdir()) if folder.is_dir() else []


def new_folder(path: Path | str) -> Path:
    """``path``, if it is empty or absent.

    Raises:
        ConfigError: something is there already.
    """
    folder = Path(path)
    if contents(folder):
        raise ConfigError(f"the output folder {folder} is not empty; choose another, or empty it")
    return folder


def remove_leftovers(folder: Path) -> None:
    """Removes what a process that was killed while saving left below ``folder``."""
    for path in folder.rglob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Waits until every file and folder below ``folder`` is on the disk itself."""
    for path in sorted(folder.rglob("*")):
        _sync(path)
    _sync(folder)


def put_in_place(folder: Path, target: Path) -> None:
    """Renames a finished folder to ``target``; an older folder of that name is removed behind it."""
    old = folder.with_name(f"{folder.name}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(folder, target)
    _sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

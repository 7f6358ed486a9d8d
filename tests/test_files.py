"""Writing whole files or none, with errors that the real writers raise: a limit on file sizes stands for a full disk."""

import errno
import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerState

from shadowpeft import files
from shadowpeft.files import STAGING_PREFIX, SaveError, failed_write, write_files
from shadowpeft.train.callbacks import MetricLines
from workbench import byte_tokenizer

LIMIT = 1000


@contextmanager
def small_files_only():
    """Within the block this process can write no file of more than ``LIMIT`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


LARGE = {"weights": torch.zeros(4 * LIMIT)}
WRITERS = {
    "python": (lambda folder: (folder / "new").write_bytes(bytes(4 * LIMIT)), "File too large"),
    "safetensors": (lambda folder: save_file(LARGE, folder / "new"), "File too large"),
    "tokenizers": (lambda folder: byte_tokenizer().save_pretrained(folder), "File too large"),
    "torch": (lambda folder: torch.save(LARGE, folder / "new"), "the file could not be written"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_writes_a_failure_is_one_error_and_leaves_what_was_there(tmp_path, writer):
    write, reason = WRITERS[writer]
    (tmp_path / "old").write_text("mine")
    with small_files_only(), pytest.raises(SaveError, match=f"could not save to .*: {reason}; the files that were there"):
        write_files(tmp_path, write)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_an_error_that_is_no_failed_write_stays_what_it_is(tmp_path):
    def broken(folder):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        write_files(tmp_path, broken)
    assert list(tmp_path.iterdir()) == []


def test_the_reason_is_found_through_errors_that_wrap_it():
    first = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    wrapped = SaveError("could not save")
    wrapped.__cause__ = first
    assert failed_write(wrapped) == "No space left on device"
    assert failed_write(ValueError("os error 28")) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_metrics_that_cannot_be_written_end_in_one_error():
    with pytest.raises(SaveError, match="could not write to /dev/full: No space left on device; free some space"):
        MetricLines(Path("/dev/full")).on_log(None, TrainerState(), None, logs={"loss": 1.0})


def test_a_folder_that_is_not_empty_is_written_again_file_by_file(tmp_path):
    tokenizer = byte_tokenizer()
    for greeting in ("Hello", "Good morning"):
        tokenizer.chat_template = {"default": "{{ messages }}", "polite": greeting}
        write_files(tmp_path, tokenizer.save_pretrained)
    (saved,) = (tmp_path / "additional_chat_templates").iterdir()
    assert saved.read_text() == "Good morning"
    assert not list(tmp_path.glob(f"{STAGING_PREFIX}*"))


def test_files_in_folders_are_on_the_disk_before_they_are_in_place(tmp_path, monkeypatch):
    steps, sync, replace = [], files._sync, os.replace
    monkeypatch.setattr(files, "_sync", lambda path: (steps.append(("sync", path.name)), sync(path)))
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append(("place", new.name)), replace(old, new)))

    def write(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("new")

    write_files(tmp_path, write)
    assert steps.index(("sync", "file")) < steps.index(("place", "file"))
    assert steps[-2:] == [("sync", "inner"), ("sync", tmp_path.name)]

import json
import os
import platform
import subprocess
from datetime import datetime, timedelta, timezone
from importlib import metadata
from pathlib import Path

import pytest
import torch

from shadowpeft.evaluate import record
from shadowpeft.evaluate.record import cpu_model, data_revision, origin, write_record
from shadowpeft.files import SaveError

ROWS = [{"text": "a", "label": 1}, {"text": "é", "label": 2}]


def texts_in(value) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts_in(item)]
    return [value] if isinstance(value, str) else []


def test_the_origin_names_versions_hardware_and_time():
    found = origin()
    assert found["versions"]["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert found["hardware"]["cores"] == os.cpu_count()
    assert found["hardware"]["memory_gib"] > 0 and found["hardware"]["cpu"]
    age = datetime.now(timezone.utc) - datetime.fromisoformat(found["time"])
    assert timedelta(seconds=-2) < age < timedelta(minutes=1)


def test_the_origin_names_no_host_and_no_place():
    for text in texts_in(origin()):
        assert platform.node() not in text or not platform.node()
        assert "/" not in text and "\\" not in text


def test_libraries_that_are_not_installed_have_no_version(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert origin()["versions"] == dict.fromkeys(("shadowpeft", "torch", "transformers", "peft"))


def answers_of_git(answers: dict[str, str]):
    """A git that answers some commands and fails on all others."""

    def run(command, **options):
        known = command[1] in answers
        return subprocess.CompletedProcess(command, 0 if known else 128, answers.get(command[1], ""), "")

    return run


@pytest.mark.parametrize(("status", "has_changes"), [("", False), (" M src/x.py\n", True)])
def test_the_commit_is_given_in_a_checkout_and_whether_it_was_changed(monkeypatch, status, has_changes):
    git = answers_of_git({"ls-files": "record.py\n", "rev-parse": "abc123\n", "status": status})
    monkeypatch.setattr(subprocess, "run", git)
    assert (origin()["commit"], origin()["has_uncommitted_changes"]) == ("abc123", has_changes)


def test_a_package_inside_another_repository_does_not_take_its_commit(monkeypatch):
    monkeypatch.setattr(subprocess, "run", answers_of_git({"rev-parse": "abc123\n", "status": ""}))
    assert (origin()["commit"], origin()["has_uncommitted_changes"]) == (None, None)


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.TimeoutExpired("git", 10)])
def test_without_a_working_git_there_is_no_commit(monkeypatch, error):
    def run(*arguments, **options):
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    assert origin()["commit"] is None


def test_the_cpu_model_is_read_from_cpuinfo_where_there_is_one(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name : Fast CPU: 3 GHz\nmodel name : other\n")
    assert cpu_model(info) == "Fast CPU: 3 GHz"
    assert cpu_model(tmp_path / "absent") == (platform.processor() or platform.machine())


def test_a_record_holds_its_payload_and_its_origin(tmp_path):
    path = tmp_path / "new" / "result.json"
    write_record(path, {"scores": {"accuracy": 0.5}, "interval": (0.1, 0.9), "text": "é"})
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written.pop("origin")["versions"]["torch"] == torch.__version__
    assert written == {"scores": {"accuracy": 0.5}, "interval": [0.1, 0.9], "text": "é"}
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_numbers_json_does_not_know_become_null(tmp_path):
    write_record(tmp_path / "result.json", {"loss": float("nan"), "all": [float("inf"), 1.5]})
    written = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert (written["loss"], written["all"]) == (None, [None, 1.5])


def test_absolute_paths_are_shortened_and_other_texts_are_not(tmp_path):
    data = tmp_path / "mydata"
    data.mkdir()
    payload = {
        "data": str(data),
        "again": [data],
        "base": "org/model",
        "said": ["/", "/play it", "/no/such/place"],
    }
    write_record(tmp_path / "result.json", payload)
    written = json.loads((tmp_path / "result.json").read_text())
    assert (written["data"], written["again"], written["base"]) == ("mydata", ["mydata"], "org/model")
    assert written["said"] == ["/", "/play it", "/no/such/place"]


def test_a_failing_write_leaves_the_old_record_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_record(path, {"run": 1})
    before = path.read_bytes()

    def replace(*places):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(SaveError, match="No space left"):
        write_record(path, {"run": 2})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_payload_that_is_no_json_leaves_the_old_record_as_it_was(tmp_path):
    path = tmp_path / "result.json"
    write_record(path, {"run": 1})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_record(path, {"run": object()})
    assert path.read_bytes() == before


def test_a_data_revision_follows_the_rows_and_their_order_but_not_that_of_fields():
    revision = data_revision(ROWS)
    assert revision == data_revision([dict(reversed(row.items())) for row in ROWS])
    assert revision == "9d1eb0ab62c8d7f81232099e0da81c93b7f661853dd1320b98f1668027e5ac8c"
    others = [ROWS[::-1], ROWS[:1], [ROWS[0], ROWS[1] | {"label": 3}], [{"rows": ROWS}]]
    assert len({revision, *map(data_revision, others)}) == 5


def test_the_package_is_a_checkout_only_where_git_knows_this_file(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "__file__", str(tmp_path / "record.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(Path(tmp_path).parent))
    assert origin()["commit"] is None

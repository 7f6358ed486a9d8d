"""scripts/compatibility.py: what it installs and runs, and that no cell is lost."""

import importlib.util
import json
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("compatibility", ROOT / "scripts" / "compatibility.py")
compatibility = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compatibility)

CELL = compatibility.Cell(python="3.11", torch="2.8.0", transformers="newest")
PASSED = '<testsuite><testcase name="a"/><testcase name="b"><skipped/></testcase></testsuite>'
FAILED = '<testsuite><testcase name="a"/><testcase name="b"><failure/></testcase></testsuite>'


def test_a_cell_pins_its_releases_and_takes_every_other_requirement_of_the_package():
    found = compatibility.requirements(CELL)
    assert {"torch==2.8.0", "transformers", "accelerate>=1.1", "pyyaml>=6"} <= set(found)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert len(found) == len(declared) and len(set(found)) == len(found)


def test_the_marked_files_are_found_and_cover_the_contract():
    found = compatibility.contract_files()
    assert {"tests/contract/test_architectures.py", "tests/core/test_lean.py"} <= set(found)
    assert "tests/test_readme.py" not in found


@pytest.mark.parametrize(
    ("report", "problem", "status", "reason"),
    [(PASSED, None, "passed", None), (FAILED, "1 failed", "failed", "b"), (None, "it died", "failed", "it died")],
)
def test_an_outcome_says_how_many_and_which(tmp_path, report, problem, status, reason):
    if report:
        (tmp_path / "report.xml").write_text(report)
    found = compatibility.outcome(tmp_path / "report.xml", problem)
    assert (found["status"], found.get("reason")) == (status, reason)
    assert found["tests"]["passed"] == (1 if report else 0)


def test_a_report_without_a_test_is_no_pass(tmp_path):
    (tmp_path / "report.xml").write_text("<testsuite/>")
    assert compatibility.outcome(tmp_path / "report.xml", None)["status"] == "failed"


def test_a_missing_interpreter_and_a_failed_install_are_outcomes(monkeypatch):
    monkeypatch.setattr(compatibility, "interpreter", lambda minor: None)
    assert compatibility.run(CELL) == {"status": "no interpreter", "reason": "no Python 3.11 was found here"}
    monkeypatch.undo()
    monkeypatch.setattr(compatibility, "_problem", lambda command, seconds, **_: "ERROR: no such release")
    monkeypatch.setattr(compatibility, "interpreter", lambda minor: "true")
    assert compatibility.run(CELL) == {"status": "not installed", "reason": "ERROR: no such release"}


def test_a_cell_replaces_its_last_outcome_and_leaves_the_others(tmp_path):
    path, other = tmp_path / "cells.json", compatibility.CELLS[0]
    for cell, status in ((CELL, "failed"), (other, "passed"), (CELL, "passed")):
        compatibility.save(cell, {"status": status}, path)
    cells = json.loads(path.read_text())["cells"]
    assert [(cell["asked"]["torch"], cell["status"]) for cell in cells] == [(other.torch, "passed"), ("2.8.0", "passed")]


def test_what_is_asked_for_no_more_goes(tmp_path):
    path = tmp_path / "cells.json"
    old = compatibility.Cell(python="3.9", torch="1.0", transformers="4.0")
    path.write_text(json.dumps({"cells": [{"asked": vars(old), "status": "failed"}]}))
    compatibility.save(compatibility.CELLS[0], {"status": "passed"}, path)
    assert [cell["status"] for cell in json.loads(path.read_text())["cells"]] == ["passed"]


def test_cells_are_chosen_by_all_that_is_said():
    chosen = compatibility.chosen(["3.11", "torch=2.8.0"])
    assert {(cell.python, cell.torch) for cell in chosen} == {("3.11", "2.8.0")}
    assert len(chosen) == 2
    assert compatibility.chosen(["3.9"]) == []

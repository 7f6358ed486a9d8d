"""The recipe for the system's figures, from training to the rendered tables, in its tiny setting."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft", reason="the cloud of a LoRA needs peft")
# peft asks transformers in its former words.
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning")
ROOT = Path(__file__).parents[3]


def module_at(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_rows(folder, **splits):
    folder.mkdir(parents=True)
    for split, count in splits.items():
        intents = ["oos"] if split.startswith("oos") else ["alarm", "balance", "weather"]
        rows = [{"text": f"{split} request {i}", "intent": intents[i % len(intents)]} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_study_trains_measures_records_and_does_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    study, render = module_at(ROOT / "recipes" / "system_study.py"), module_at(ROOT / "scripts" / "render.py")
    write_rows(tmp_path / "data" / "clinc150", train=24, val=9, test=9, oos_val=2, oos_test=3)
    out = tmp_path / "results" / "system.json"
    arguments = ["--tiny", "--tasks", "clinc150", "--data", tmp_path / "data", "--work", tmp_path / "work", "--out", out]
    monkeypatch.setattr(sys, "argv", ["system_study.py", *map(str, arguments)])
    study.main()
    record = json.loads(out.read_text())
    one = record["tasks"]["clinc150"]
    assert set(one["replayed"]["systems"]) == {"attached", "edge only", "edge and cloud", "LoRA, merged"}
    assert one["replayed"]["num_rows"] == 6 and one["replayed"]["num_out_of_scope"] == 2
    assert one["scored"]["num_rows"] == 9 and one["scored"]["num_out_of_scope"] == 3
    assert 0 <= one["scored"]["scope_detection"]["attached maximum softmax probability"] <= 1
    # Equal budgets, equal steps.
    assert one["training"]["lora"]["parameters"] == pytest.approx(one["parameters"]["attached"], rel=0.02)
    assert one["training"]["lora"]["steps"] == one["training"]["shadow"]["steps"] == 2
    # After two steps there is no skill in any answer: the grammar sends all of them, and the share asked for gives way.
    assert one["router"]["point"]["cloud_share"] == 1 and not one["goals"][study.SHARE_GOAL]
    assert "latencies" not in out.read_text() and "origin" in record and str(tmp_path) not in out.read_text()

    def again(*_, **__):
        raise AssertionError("this part was there")

    for name in ("train", "fit", "observe", "run_system"):
        monkeypatch.setattr(study, name, again)
    out.unlink()
    study.main()
    assert json.loads(out.read_text())["tasks"] == record["tasks"]

    monkeypatch.setattr("result_tables.common.ROOT", tmp_path)
    lines = render.TABLES["system"]().splitlines()
    assert len(lines) == 2 + 4 and lines[2].startswith("| clinc150 | attached |")
    scores = render.TABLES["routers"]()
    assert scores.count("(the router's)") == 1 and "| clinc150 | oracle |" in scores
    probability = one["scored"]["scope_detection"]["attached maximum softmax probability"]
    assert f"| attached maximum softmax probability | - | - | {probability:.3f} |" in scores


def test_the_study_of_a_preset_scores_validation_rows_of_trainings_that_differ_in_one_field(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    study = module_at(ROOT / "recipes" / "preset_study.py")
    write_rows(tmp_path / "data" / "clinc150", train=24, val=9, test=9)
    out = tmp_path / "work" / "tiny.json"
    chosen = ["--tiny", "--tasks", "clinc150", "--change", "auxiliary_loss_weight=0.5", "auxiliary_loss_weight=8.0"]
    chosen += ["--data", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", ["preset_study.py", *chosen, "--work", str(tmp_path / "work")])
    study.main()
    cells = json.loads(out.read_text())["cells"]
    assert [(cell["changes"]["auxiliary_loss_weight"], cell["num_rows"]) for cell in cells] == [(0.5, 6), (8.0, 6)]
    files = sorted((tmp_path / "work").glob("*/clinc150/shadow/adapter/shadow_config.json"))
    kept = [json.loads(path.read_text())["shadow"] for path in files]
    assert [config["auxiliary_loss_weight"] for config in kept] == [0.5, 8.0]
    assert kept[0] | {"auxiliary_loss_weight": 8.0} == kept[1]
    assert cells[0]["rows_revision"] == cells[1]["rows_revision"]

    def again(*_, **__):
        raise AssertionError("this training was there")

    monkeypatch.setattr("system_study.train", again)
    out.unlink()
    study.main()
    assert json.loads(out.read_text())["cells"] == cells

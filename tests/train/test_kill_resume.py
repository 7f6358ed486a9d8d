"""Runs that are killed: see benchmarks/kill_resume.py, which does this at any number of points."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shadowpeft.errors import ConfigError
from shadowpeft.files import SaveError
from shadowpeft.train.checkpoints import check_run_folder, newest_checkpoint
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.run import train
from shadowpeft.train.saving import STAGING

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"


def settings(bench, output, **fields):
    return TrainConfig.from_dict(
        {"base": str(bench / "base"), "task": "intent", "data": str(bench / "intents"), "output": str(output)}
        | {"max_steps": 4, "batch_size": 4, "save_every": 2, "shadow": {"shadow_intermediate_size": 24}}
        | fields
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script copies its process")
def test_a_run_killed_anywhere_goes_on_bit_for_bit():
    """One kill inside saving, one by the clock; ``python benchmarks/kill_resume.py`` does 30."""
    done = subprocess.run([sys.executable, SCRIPT, "--points", "2", "--seed", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["points"] == 2
    assert counts["killed_while_saving"] == 1


def test_a_checkpoint_appears_under_its_name_only_when_all_of_it_is_on_disk(bench, tmp_path, monkeypatch):
    from shadowpeft.train import saving

    seen = []

    def cut(folder, target):
        seen.append((sorted(path.name for path in folder.iterdir()), target.exists()))
        raise OSError(5, "power cut")

    monkeypatch.setattr(saving, "put_in_place", cut)
    with pytest.raises(SaveError, match=r"could not save the checkpoint of step 2 .*power cut"):
        train(settings(bench, tmp_path / "run"))
    [(names, was_there)] = seen
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "shadow_model.safetensors"} <= set(names)
    assert not was_there
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_run_cut_off_before_its_first_checkpoint_starts_from_the_first_step(bench, tmp_path):
    whole = train(settings(bench, tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("checkpoints", "adapter"):
        shutil.rmtree(tmp_path / "cut" / name)
    (tmp_path / "cut" / "checkpoints" / STAGING / "checkpoint-2").mkdir(parents=True)
    resumed = train(settings(bench, tmp_path / "cut", resume=True))
    assert (resumed.steps, resumed.final_loss) == (whole.steps, whole.final_loss)
    assert not (tmp_path / "cut" / "checkpoints" / STAGING).exists()


def test_resuming_a_finished_run_trains_no_further_step(bench, tmp_path):
    """transformers would take one more where the last step lies inside an epoch."""
    train(settings(bench, tmp_path))
    weights = (tmp_path / "adapter" / "shadow_model.safetensors").read_bytes()
    assert train(settings(bench, tmp_path, resume=True)).steps == 4
    assert (tmp_path / "adapter" / "shadow_model.safetensors").read_bytes() == weights


def test_a_run_grouped_by_length_goes_on_within_its_second_epoch_with_the_rows_it_had_not_seen(bench, tmp_path):
    """Four steps an epoch. transformers' own order is of the global generator, which a new process starts anew."""
    options = {"group_by_length": True, "limit_train": 16, "max_steps": 8, "save_every": 6}
    train(settings(bench, tmp_path, **options))
    weights = (tmp_path / "adapter" / "shadow_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-8")
    assert train(settings(bench, tmp_path, resume=True, **options)).steps == 8
    assert (tmp_path / "adapter" / "shadow_model.safetensors").read_bytes() == weights


def test_a_resumed_run_saves_and_logs_as_often_as_it_is_asked_to_now_and_counts_the_time_of_all_its_parts(bench, tmp_path):
    options = {"max_steps": 8, "save_every": 4, "log_every": 4}
    train(settings(bench, tmp_path, **options))
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-8")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    before = next(line["seconds"] for line in lines if line["step"] == 4) + 100
    (tmp_path / "metrics.jsonl").write_text("".join(
        json.dumps(line | {"seconds": before if line["step"] == 4 else line["seconds"]}) + "\n" for line in lines
    ))  # fmt: skip
    resumed = train(settings(bench, tmp_path, resume=True, **options | {"save_every": 1, "log_every": 1}))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"checkpoint-7", "checkpoint-8"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 4, 5, 6, 7, 8]
    assert before < resumed.seconds < before + 90
    times = [line["seconds"] for line in lines if line["step"] >= 4]
    assert times == sorted(times) and times[0] == before


def test_a_run_of_several_processes_does_not_go_on_in_one(bench, tmp_path):
    """Its steps would have a part of the rows, and the schedule would stretch over as many more of them."""
    train(settings(bench, tmp_path))
    checkpoint = tmp_path / "checkpoints" / "checkpoint-4"
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    with pytest.raises(ConfigError, match=r"by 2 processes, and this is a run of 1.*launch --num_processes 2"):
        train(settings(bench, tmp_path, resume=True))
    assert check_run_folder(tmp_path, settings(bench, tmp_path, resume=True), num_processes=2) == checkpoint


def test_leftovers_of_a_save_do_not_make_a_folder_used_and_nothing_is_resumed_where_nothing_ran(tmp_path):
    (tmp_path / ".saving-abc").mkdir()
    assert check_run_folder(tmp_path, TrainConfig()) is None
    with pytest.raises(ConfigError, match="no run was started there"):
        check_run_folder(tmp_path, TrainConfig(resume=True))


def test_a_copied_checkpoint_that_lacks_a_file_is_passed_over(bench, tmp_path):
    train(settings(bench, tmp_path))
    for missing in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "shadow_config.json"):
        copies = tmp_path / f"without_{missing}"
        shutil.copytree(tmp_path / "checkpoints", copies)
        assert newest_checkpoint(copies).name == "checkpoint-4"
        (copies / "checkpoint-4" / missing).unlink()
        assert newest_checkpoint(copies).name == "checkpoint-2", missing
    for name in ("optimizer.pt", "scheduler.pt"):
        (tmp_path / "checkpoints" / "checkpoint-4" / name).unlink()
    # DeepSpeed has both in a folder of its own, which the file `latest` names.
    (tmp_path / "checkpoints" / "checkpoint-4" / "global_step4").mkdir()
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2"
    (tmp_path / "checkpoints" / "checkpoint-4" / "latest").write_text("global_step4")
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-4"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 1e-4}, "learning_rate=0.003, not 0.0001"),
        ({"task": "robot", "data": None}, "task='intent', not 'robot'"),
        ({"head_lr_multiplier": 3.0}, "head_lr_multiplier=1.0, not 3.0"),
        ({"limit_train": 8}, "limit_train=None, not 8"),
        ({"shadow": {"shadow_intermediate_size": 24, "shadow_alpha": 2.0}}, "shadow_alpha=0.1, not 2.0"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings_than_it_began_with(bench, tmp_path, changed, said):
    train(settings(bench, tmp_path))
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=rf"was started with {said}.*--config .*config.yaml --resume"):
        train(settings(bench, tmp_path, resume=True, **changed))
    assert (tmp_path / "config.yaml").read_text() == before
    # What changes no number is free.
    assert train(settings(bench, tmp_path, resume=True, limit_eval=2, save_every=1)).steps == 4

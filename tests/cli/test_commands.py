"""Every verb of the command line, in this process, on a tiny base and a few rows."""

import errno
import json
import os
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from deploy.route.test_router import ROWS
from deploy.running import free_port
from shadowpeft import ShadowConfig, cli
from shadowpeft.cli import config_from
from shadowpeft.deploy.route.artefact import fit_router, save_router
from shadowpeft.evaluate.compare.runner import Counts
from shadowpeft.model import bases
from shadowpeft.train.callbacks import MetricLines
from shadowpeft.train.checkpoints import newest_checkpoint
from workbench import write_base, write_classification, write_intents

VERBS = {
    *("train", "eval", "generate", "info", "demo", "compare", "plan", "pretrain", "detach", "export", "convert"),
    *("serve", "edge", "calibrate", "system-eval"),
}
QUICK = ["--batch-size", "4", "--log-every", "1", "--shadow-intermediate-size", "24"]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A folder with a base and two data sets."""
    folder = tmp_path_factory.mktemp("bench")
    write_base(folder / "base")
    write_intents(folder / "intents")
    write_classification(folder / "colours")
    return folder


@pytest.fixture
def shadowpeft(monkeypatch, capsys):
    """Runs the command as a shell would; returns (exit code, stdout, stderr)."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["shadowpeft", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_a_comparison_with_failed_cells_says_so_to_a_script(shadowpeft, tmp_path, monkeypatch):
    for counts, code in ((Counts(done=1), 0), (Counts(done=1, failed=1), 1)):
        monkeypatch.setattr("shadowpeft.evaluate.compare.compare", lambda *args, counts=counts, **options: counts)
        assert shadowpeft("compare", tmp_path / "any.yaml")[0] == code


def train_arguments(bench, output, *more, task="intent", data="intents", steps=8):
    return [
        *("train", "--base", bench / "base", "--task", task, "--data", bench / data),
        *("--output", output, "--max-steps", steps, *QUICK, *more),
    ]


@pytest.fixture
def run_folder(bench, shadowpeft):
    """A finished run of the intent task, made once."""
    folder = bench / "finished"
    if not folder.exists():
        code, _, err = shadowpeft(*train_arguments(bench, folder))
        assert code == 0, err
    return folder


@pytest.fixture
def classifier_folder(bench, shadowpeft):
    folder = bench / "finished_classifier"
    if not folder.exists():
        code, _, err = shadowpeft(*train_arguments(bench, folder, task="classification", data="colours"))
        assert code == 0, err
    return folder


# ---------------------------------------------------------------- help


def test_help_lists_every_verb_and_every_verb_is_tried_here(shadowpeft):
    code, out, _ = shadowpeft("--help")
    assert code == 0
    assert {command.name or command.callback.__name__ for command in cli.app.registered_commands} == VERBS
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_explains_itself(shadowpeft, verb):
    code, out, _ = shadowpeft(verb, "--help")
    assert code == 0
    assert "Usage:" in out


def test_training_has_one_flag_for_each_setting(shadowpeft):
    out = shadowpeft("train", "--help")[1]
    for flag in ("--base", "--learning-rate", "--shadow-alpha", "--auxiliary-loss-weight", "--share-steps", "--resume"):
        assert flag in out


# ---------------------------------------------------------------- train


def test_training_leaves_config_metrics_report_curves_and_adapter(run_folder, bench):
    config = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert (config["base"], config["max_steps"], config["shadow"]["shadow_intermediate_size"], config["resume"]) == (
        str(bench / "base"),
        8,
        24,
        False,
    )
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert all({"loss", "main_loss", "shadow_loss", "learning_rate"} <= line.keys() for line in lines[:-1])
    report = json.loads((run_folder / "report.json").read_text())
    assert report["scores"].keys() == {"base", "attached", "detached"}
    assert all(len(score["generations"]) == score["n"] == 6 for score in report["scores"].values())
    assert report["parameters"]["base"] == 0 < report["parameters"]["detached"] < report["parameters"]["attached"]
    assert report["majority"] == pytest.approx(1 / 3)
    assert (report["steps"], report["num_train_rows"], report["config"]["task"]) == (8, 17, "intent")
    assert {"commit", "versions", "hardware"} <= report["origin"].keys()
    readable = (run_folder / "report.md").read_text()
    assert [line.split("|")[1].strip() for line in readable.splitlines()[2:]] == [
        *("base", "attached", "detached", "most frequent answer")
    ]
    assert (run_folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (run_folder / "adapter" / "shadow_model.safetensors").is_file()
    assert (run_folder / "adapter" / "tokenizer.json").is_file()


def test_a_yaml_file_holds_any_setting_and_flags_win(bench, shadowpeft, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"base: {bench / 'base'}\ntask: intent\ndata: {bench / 'intents'}\nmax_steps: 90\nlearning_rate: 1e-3\n"
        "limit_eval: 2\nshadow:\n  preset: peft\n  r: 3\n  shadow_alpha: 0.5\n"
    )
    code, _, err = shadowpeft("train", "--config", file, "--output", tmp_path / "run", "--max-steps", 2, "--r", 5)
    assert code == 0, err
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["max_steps"], config["learning_rate"], config["shadow"]["r"]) == (2, 1e-3, 5)
    assert (config["shadow"]["first_block"], config["shadow"]["shadow_alpha"]) == (0, 0.5)


RECOMMENDED_RUN = {"shadow": ShadowConfig.preset("recommended", r=16, shadow_intermediate_size=24).to_dict()}


def test_a_preset_flag_sets_its_formula_over_that_of_a_runs_file_which_has_every_field(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(RECOMMENDED_RUN))
    flags = {"dropout_at": None, "shadow_alpha": 2.0}
    paper = config_from(flags, file, "paper").shadow
    assert paper == ShadowConfig(r=16, shadow_intermediate_size=24, shadow_alpha=2.0)  # sizes are the file's, flags win
    attached = config_from({}, file, "attached").shadow
    assert attached == ShadowConfig.preset("attached")  # which has sizes of its own
    assert config_from({}, file).shadow.to_dict() == RECOMMENDED_RUN["shadow"]
    by_name = tmp_path / "by_name.yaml"
    by_name.write_text(yaml.safe_dump({"shadow": {"preset": "peft", "shadow_num_attention_heads": 1}}))
    assert config_from({}, by_name, "recommended").shadow == ShadowConfig.preset("recommended", shadow_num_attention_heads=1)


def test_a_classifier_is_trained_scored_and_asked(classifier_folder, shadowpeft, bench):
    report = json.loads((classifier_folder / "report.json").read_text())
    assert report["metric"] == "accuracy"
    adapter = classifier_folder / "adapter"
    code, out, err = shadowpeft("eval", adapter, "--task", "classification", "--data", bench / "colours")
    assert code == 0, err
    assert "attached" in out
    for mode in ("base", "attached", "detached"):
        code, out, err = shadowpeft("generate", adapter, "the pen is red", "--mode", mode)
        assert code == 0, err
        assert out.strip() in {"red", "green", "blue"}


# ---------------------------------------------------------------- stop and resume


def losses(folder):
    """(step, loss) of every line of a run's metrics that has one."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def interrupt_at(step, monkeypatch):
    """Ctrl-C while ``step`` is logged."""
    original = MetricLines.on_log

    def on_log(self, args, state, control, logs=None, **kwargs):
        original(self, args, state, control, logs=logs, **kwargs)
        if state.global_step == step and "loss" in (logs or {}):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(MetricLines, "on_log", on_log)


def test_ctrl_c_saves_says_how_to_resume_and_the_resumed_run_ends_as_an_uninterrupted_one(
    bench, run_folder, shadowpeft, tmp_path
):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(3, patch)
        code, out, err = shadowpeft(*train_arguments(bench, tmp_path / "run"))
    assert code == 0, err
    assert f"shadowpeft train --config {tmp_path / 'run' / 'config.yaml'} --resume" in out
    assert not (tmp_path / "run" / "adapter").exists()
    stopped = int(out.split("stopped at step ")[1].split(";")[0])
    assert stopped in (3, 4)
    code, out, err = shadowpeft("train", "--output", tmp_path / "run", "--resume", "--learning-rate", 0.5)
    assert code == 2 and "learning_rate" in err and "not 0.5" in err
    for preset in ("recommended", "authors"):  # the run is of `paper`, which sets nothing
        code, out, err = shadowpeft("train", "--output", tmp_path / "run", "--resume", "--preset", preset)
        assert code == 2 and "was started with" in err
    code, out, err = shadowpeft("train", "--output", tmp_path / "run", "--resume")  # with its own config.yaml
    assert code == 0, err
    whole, resumed = (load_file(f / "adapter" / "shadow_model.safetensors") for f in (run_folder, tmp_path / "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert losses(run_folder) == losses(tmp_path / "run")


def test_a_run_killed_between_checkpoints_repeats_no_metrics_line_when_resumed(bench, run_folder, shadowpeft, tmp_path):
    class PowerCut(Exception):
        pass

    def cut(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise PowerCut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricLines, "on_step_end", cut, raising=False)
        with pytest.raises(PowerCut):
            shadowpeft(*train_arguments(bench, tmp_path / "run", "--save-every", 4))
    broken = tmp_path / "run" / "checkpoints" / "checkpoint-5"
    broken.mkdir()
    whole_one = tmp_path / "run" / "checkpoints" / "checkpoint-4"
    for path in whole_one.iterdir():
        (broken / path.name).write_text("")  # a checkpoint that was cut off is passed over
    code, _, err = shadowpeft("train", "--config", tmp_path / "run" / "config.yaml", "--resume")
    assert code == 0, err
    assert losses(run_folder) == losses(tmp_path / "run")
    whole, resumed = (load_file(f / "adapter" / "shadow_model.safetensors") for f in (run_folder, tmp_path / "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("[enforce fail at inline_container.cc:6]")]
)
def test_a_disk_that_fills_up_during_training_ends_in_one_line_and_keeps_the_checkpoint(
    bench, shadowpeft, tmp_path, monkeypatch, error
):
    save = torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-4" in str(path):
            raise error
        save(value, path, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    code, _, err = shadowpeft(*train_arguments(bench, tmp_path / "run", "--save-every", 2, steps=6))
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert err.startswith("error: could not save the checkpoint of step 4")
    assert newest_checkpoint(tmp_path / "run" / "checkpoints").name == "checkpoint-2"


# ---------------------------------------------------------------- eval, generate, info, demo


def test_eval_scores_the_asked_modes_and_writes_them(run_folder, bench, shadowpeft, tmp_path):
    code, out, err = shadowpeft(
        *("eval", run_folder / "adapter", "--task", "intent", "--data", bench / "intents"),
        *("--modes", "attached,detached", "--limit", 4, "--output", tmp_path / "scores.json"),
    )
    assert code == 0, err
    assert "accuracy on 4 test rows" in out
    written = json.loads((tmp_path / "scores.json").read_text())
    assert list(written["scores"]) == ["attached", "detached"]
    assert written["adapter"] == "adapter"


def test_eval_gives_the_scores_of_the_training_report(run_folder, bench, shadowpeft, tmp_path):
    arguments = ("eval", run_folder / "adapter", "--task", "intent", "--data", bench / "intents", "--max-length", 512)
    assert shadowpeft(*arguments, "--output", tmp_path / "scores.json")[0] == 0
    report, scores = (json.loads(f.read_text()) for f in (run_folder / "report.json", tmp_path / "scores.json"))
    for mode in ("base", "attached", "detached"):
        assert scores["scores"][mode]["generations"] == report["scores"][mode]["generations"]


@pytest.mark.parametrize("mode", ["base", "attached", "detached"])
def test_generate_answers_every_prompt_and_a_seed_fixes_the_sample(run_folder, shadowpeft, mode):
    arguments = ("generate", run_folder / "adapter", "the lamp", "the door", "--mode", mode, "--max-new-tokens", 5)
    code, first, err = shadowpeft(*arguments, "--temperature", 1.0, "--seed", 3)
    assert code == 0, err
    assert shadowpeft(*arguments, "--temperature", 1.0, "--seed", 3)[1] == first
    assert shadowpeft(*arguments, "--task", "intent")[0] == 0


def test_info_describes_the_installation_and_an_adapter(run_folder, shadowpeft):
    code, out, _ = shadowpeft("info")
    assert code == 0
    assert all(name in out for name in ("torch", "transformers", "robot", "llama"))
    code, out, _ = shadowpeft("info", run_folder / "adapter")
    assert code == 0
    assert "LlamaForCausalLM, 2 blocks of 32" in out
    assert "shadow_alpha" in out


def test_the_demo_runs_on_the_base_that_comes_with_the_package(bench, shadowpeft, tmp_path, monkeypatch):
    monkeypatch.setattr(bases, "_FOLDER", bench / "base")
    code, out, err = shadowpeft(
        *("demo", "--output", tmp_path / "demo", "--max-steps", 2, "--limit-train", 40, "--limit-eval", 4, *QUICK)
    )
    assert code == 0, err
    assert "accuracy on 4 test rows" in out
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert (report["config"]["base"], report["config"]["shadow"]["shadow_alpha"]) == ("embedded", 4.0)


def test_a_setting_that_is_true_false_or_left_to_the_preset_has_a_flag_for_both(monkeypatch, shadowpeft):
    given = []
    monkeypatch.setattr("shadowpeft.commands.train", lambda config, console: given.append(config.shadow.share_embeddings))
    for more in ([], ["--share-embeddings"], ["--no-share-embeddings"]):
        assert shadowpeft("train", *more)[0] == 0
    assert given == [None, True, False]


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("verb", ["eval", "generate", "serve", "edge", "calibrate", "system-eval"])
def test_a_device_that_is_not_there_ends_in_one_line(shadowpeft, run_folder, bench, tmp_path, verb):
    adapter, router = run_folder / "adapter", ["--router", tmp_path / "router.json"]
    save_router(fit_router(ROWS), tmp_path / "router.json")
    arguments = {
        "eval": [adapter, "--task", "intent", "--data", bench / "intents"],
        "generate": [adapter, "Sit down"],
        "serve": [adapter, "--port", free_port()],
        "edge": [adapter, *router, "--never-escalate", "--port", free_port()],
        "calibrate": [adapter, "--task", "intent", "--data", bench / "intents", "--output", tmp_path / "new.json"],
        "system-eval": [adapter, *router, "--task", "intent", "--data", bench / "intents"],
    }
    code, _, err = shadowpeft(verb, *arguments[verb], "--device", "cuda:7")
    assert code == 2 and "there is no device 'cuda:7' here; choose one of cpu" in err

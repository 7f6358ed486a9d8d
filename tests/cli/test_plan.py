"""`shadowpeft plan` at the command line: its tables, its JSON, its refusals; and the benchmark that holds it to account."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from models import tiny_base
from shadowpeft import cli
from shadowpeft.errors import ShadowPeftError

QUICK = ["--r", "4", "--shadow-intermediate-size", "24", "--max-length", "32", "--batch-size", "2"]
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "plan.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    tiny_base("qwen3").config.save_pretrained(folder)
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text('{"model_type": "vit"}')
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    return folder


def run(*arguments):
    return CliRunner().invoke(cli.app, ["plan", *map(str, arguments)], catch_exceptions=True)


def test_the_tables_say_everything(folder, monkeypatch):
    monkeypatch.setattr(cli.console, "width", 160)
    found = run("--model", folder, "--gpus", 4, "--memory", "1GB", "--flops", "100T", "--bandwidth", "1TB", *QUICK)
    assert found.exit_code == 0, found.output
    for text in ("trainable", "gradients", "optimizer states", "kept for backward", "loss chunk", "KV cache", "ddp.yaml",
                 "rows a process", "estimate: training", "estimate: generation", "15% are left free"):  # fmt: skip
        assert text in found.output


def test_a_file_does_as_well_as_a_folder_and_json_has_all_figures(folder):
    asked = ("--memory", "50MB", "--json", *QUICK)
    by_folder, by_file = (json.loads(run("--model", name, *asked).output) for name in (folder, folder / "config.json"))
    assert by_folder["parameters"] == by_file["parameters"]
    assert by_folder["bytes"] == by_file["bytes"]
    assert by_folder["fit"]["parallelism"] == "single"
    assert by_folder["fit"]["rows_a_process"] >= 1
    assert by_folder["fit"]["bytes_a_process"] <= 0.85 * 50e6
    assert by_folder["speed"] is None


def test_settings_come_from_the_run_file_too(folder, tmp_path):
    (tmp_path / "run.yaml").write_text("batch_size: 3\nmax_length: 20\nshadow:\n  r: 2\n  shadow_intermediate_size: 8\n")
    found = json.loads(run("--model", folder, "--config", tmp_path / "run.yaml", "--json", "--device", "cpu").output)
    assert (found["shape"]["batch"], found["shape"]["length"]) == (3, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "80"], "memory='80' is not valid: expected a size above 0 with its unit, such as 80GB"),
        (["--memory", "lots"], "memory='lots' is not valid"),
        (["--gpus", "0", "--memory", "1GB"], "gpus=0 is not valid: expected an integer of at least 1"),
        (["--gpus", "2"], "gpus=2 needs --memory"),
        (["--margin", "1"], "margin=1.0 is not valid"),
        (["--device", "tpu"], "device='tpu' is not valid: expected one of cpu, gpu"),
        (["--labelled", "0"], "labelled=0.0 is not valid"),
        (["--labels", "0"], "labels=0 is not valid"),
        (["--flops", "fast"], "flops='fast' is not valid"),
        (["--bandwidth", "1T"], "--bandwidth goes with --flops"),
        (["--flops", "1T", "--measure"], "give one of them"),
        (["--first-block", "9"], "first_block=9 is past the last of the base's 4 blocks"),
        (["--shadow-num-attention-heads", "3"], "the shadow has 3 query heads but 2 key/value heads"),
        (["--shadow-model", "absent"], "absent"),
        (["--dtype", "int3"], "dtype='int3' is not valid"),
        (["--batch-size", "0"], "batch_size=0 is not valid"),
        (["--model", "absent"], "cannot read the config of 'absent'"),
        (["--model", "bert"], "is no language model"),
        (["--model", "broken"], "cannot read the config of 'broken'"),
    ],
)
def test_bad_input_is_one_clear_error(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    given = arguments if "--model" in arguments else ["--model", folder, *arguments]
    quick = QUICK if "--batch-size" not in arguments else QUICK[:-2]
    found = run(*quick, *given)
    assert isinstance(found.exception, ShadowPeftError), found.output
    assert message in str(found.exception)


def test_the_benchmark_finds_the_plan_near_a_real_step():
    done = subprocess.run([sys.executable, BENCHMARK, "--tiny"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert row["planned"] > 10**7 and row["measured"] > 10**7

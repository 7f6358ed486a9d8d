"""Two processes on a CPU, started as a user does, with the configs of recipes/accelerate, against one process."""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from shadowpeft import ShadowConfig, ShadowModel, get_shadow_model
from shadowpeft.errors import CheckpointError, ConfigError
from shadowpeft.model.checkpoint import save_adapter
from shadowpeft.train import trainer
from shadowpeft.train.checkpoints import newest_checkpoint
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.run import train

CONFIGS = Path(__file__).parents[2] / "recipes" / "accelerate"
# Of two learning rates, so that optimizer states of split groups are saved, cut into shards and resumed.
SHADOW = {"shadow_intermediate_size": 24, "shadow_dropout": 0.0, "shadow_lr_multiplier": 0.3}
RUN = {"task": "intent", "limit_train": 16, "max_steps": 6, "log_every": 1, "save_every": 3}


def settings(bench, output, batch_size):
    paths = {"base": str(bench / "base"), "data": str(bench / "intents"), "output": str(output)}
    return RUN | paths | {"batch_size": batch_size, "shadow": SHADOW}


@pytest.fixture(scope="module")
def alone(bench):
    """One process with the rows of both in each step."""
    train(TrainConfig.from_dict(settings(bench, bench / "alone", batch_size=4)))
    return bench / "alone"


def launch(config, start, run_file, *flags, **environment):
    """``accelerate launch`` with two processes; ``start`` is what each of them runs."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        CONFIGS / config,
        "--main_process_port",
        "0",
    ]
    arguments = ["train", "--config", run_file, *flags]
    done = subprocess.run(
        [*command, *start, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def log_of(folder):
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "main_loss", "shadow_loss", "grad_norm", "learning_rate")
    return [[entry[name] for name in names] for entry in entries if "loss" in entry]


STARTS = {
    "ddp.yaml": ["-m", "shadowpeft"],
    "fsdp2.yaml": [str(Path(__file__).parent / "sharded_on_cpu.py")],
}


@pytest.mark.parametrize("config", STARTS)
def test_two_processes_train_as_one_with_the_same_rows_a_step_and_go_on_where_they_were(bench, alone, tmp_path, config):
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(settings(bench, tmp_path / "run", batch_size=2)))
    told = launch(config, STARTS[config], run_file)
    assert "score it in one process" in " ".join(told.split())
    # Sums over rows in another order, in float32; the parts are logged with four decimals.
    expected, found = torch.tensor(log_of(alone)), torch.tensor(log_of(tmp_path / "run"))
    assert len(found) == 6
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-4)
    checkpoint = newest_checkpoint(tmp_path / "run" / "checkpoints")
    is_sharded = (checkpoint / "optimizer.bin").is_file()
    assert is_sharded == (config == "fsdp2.yaml")
    _check_adapter(tmp_path / "run" / "adapter", alone / "adapter")
    if is_sharded:  # DDP's files are those of one process
        _check_resume(config, run_file, tmp_path / "run", STARTS[config])


def _check_adapter(found, expected):
    """It loads in one process, on the base it names, and answers as the one that was trained there."""
    ids = torch.arange(3, 40)[None]
    one, other = (ShadowModel.from_pretrained(folder)(ids).logits for folder in (expected, found))
    # Six steps of AdamW, which divides by the root of tiny second moments, enlarge the rounding of the first ones.
    torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)
    config, again = (json.loads((folder / "shadow_config.json").read_text())["base"] for folder in (found, expected))
    assert config == again, "a sharded base is described as a whole one"


def _check_resume(config, run_file, folder, start, **environment):
    """From the files of step 3 back into the processes: the same losses and the same weights."""
    losses, weights = log_of(folder), load_file(folder / "adapter" / "shadow_model.safetensors")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    shutil.rmtree(folder / "adapter")
    launch(config, start, run_file, "--resume", **environment)
    assert log_of(folder) == losses
    again = load_file(folder / "adapter" / "shadow_model.safetensors")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


BEST = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments
from shadowpeft import ShadowConfig, get_shadow_model
from shadowpeft.train import ShadowTrainer

folder = Path(sys.argv[-1])
base = AutoModelForCausalLM.from_pretrained(folder / "base")
model = get_shadow_model(base, ShadowConfig(shadow_intermediate_size=24))
rows = [{"input_ids": ids, "labels": ids} for ids in torch.arange(3, 35).view(4, 8)]
arguments = TrainingArguments(
    output_dir=folder / "best", use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False, max_steps=3,
    eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
    metric_for_best_model="ours", greater_is_better=True, learning_rate=1e-2, ddp_find_unused_parameters=False,
)
values = iter([1.0, 3.0, 2.0])
trainer = ShadowTrainer(
    model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=lambda _: {"ours": next(values)}
)
trainer.train()
best = load_file(folder / "best" / "checkpoint-2" / "shadow_model.safetensors")
same = all(torch.equal(best[name], weight) for name, weight in model.network().state_dict().items() if name in best)
told = {"best": trainer.state.best_model_checkpoint, "same": same, "weights": len(best)}
(folder / f"told-{arguments.process_index}.json").write_text(json.dumps(told))
"""


def test_two_processes_both_end_with_the_best_checkpoint(bench, tmp_path):
    shutil.copytree(bench / "base", tmp_path / "base")
    (tmp_path / "best.py").write_text(BEST)
    launch("ddp.yaml", [str(tmp_path / "best.py")], tmp_path)
    for rank in (0, 1):
        told = json.loads((tmp_path / f"told-{rank}.json").read_text())
        assert told["best"] == str(tmp_path / "best" / "checkpoint-2") and told["same"] and told["weights"] > 10


def test_one_process_alone_cannot_save_sharded_weights_and_is_told_so(bench, tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = get_shadow_model(AutoModelForCausalLM.from_pretrained(bench / "base"), ShadowConfig(**SHADOW))
        model.save_pretrained(tmp_path / "whole")
        fully_shard(model, mesh=mesh)
        with pytest.raises(CheckpointError, match="save_sharded"):
            save_adapter(model.base, model.network(), tmp_path / "sharded")
        model.save_sharded(tmp_path / "sharded", is_main_process=True)
    finally:
        distributed.destroy_process_group()
    one, other = ((tmp_path / name / "shadow_model.safetensors").read_bytes() for name in ("whole", "sharded"))
    assert one == other


def test_every_shipped_config_is_one_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {path.name: load_config_from_file(str(path)).distributed_type.value for path in CONFIGS.glob("*.yaml")}
    assert kinds == {"ddp.yaml": "MULTI_GPU", "fsdp2.yaml": "FSDP", "zero2.yaml": "DEEPSPEED"}


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_zero2_trains_as_one_process_does(bench, alone, tmp_path):
    config, run_file = tmp_path / "zero2.yaml", tmp_path / "run.yaml"
    config.write_text((CONFIGS / "zero2.yaml").read_text().replace("use_cpu: false", "use_cpu: true"))
    run_file.write_text(yaml.safe_dump(settings(bench, tmp_path / "run", batch_size=2)))
    launch(config, ["-m", "shadowpeft"], run_file, DS_ACCELERATOR="cpu")
    expected, found = torch.tensor(log_of(alone)), torch.tensor(log_of(tmp_path / "run"))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-4)  # as above
    _check_adapter(tmp_path / "run" / "adapter", alone / "adapter")
    _check_resume(config, run_file, tmp_path / "run", ["-m", "shadowpeft"], DS_ACCELERATOR="cpu")


def test_zero3_is_refused_with_what_to_use_instead(bench):
    base = AutoModelForCausalLM.from_pretrained(bench / "base")
    base.lm_head.weight.ds_id = 0  # DeepSpeed's mark on a weight that it has cut
    with pytest.raises(ConfigError, match=r"ZeRO-3 cuts .*fsdp2\.yaml"):
        get_shadow_model(base, ShadowConfig(**SHADOW))


def test_zero3_is_refused_by_the_trainer_too(bench, tmp_path, monkeypatch):
    """DeepSpeed may cut a model that was built whole."""
    model = get_shadow_model(AutoModelForCausalLM.from_pretrained(bench / "base"), ShadowConfig(**SHADOW))
    monkeypatch.setattr(trainer, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigError, match="ZeRO-3"):
        trainer.ShadowTrainer(model, TrainingArguments(output_dir=tmp_path, report_to="none"))

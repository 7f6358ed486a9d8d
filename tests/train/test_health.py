"""Numbers that are none stop a run; a finished one is looked over."""

import dataclasses
import io
import json
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainingArguments

from models import randomise, tiny_base, tiny_config
from shadowpeft import ShadowModel, cli, get_shadow_model
from shadowpeft.core.step import Injection
from shadowpeft.model.tensors import WEIGHTS_FILE
from shadowpeft.train.checkpoints import newest_checkpoint
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.finite import NotFiniteError
from shadowpeft.train.health import health, spikes
from shadowpeft.train.run import train
from shadowpeft.train.trainer import ShadowTrainer


def settings(bench, output):
    return TrainConfig.from_dict(
        {"base": str(bench / "base"), "task": "intent", "data": str(bench / "intents"), "output": str(output)}
        | {"max_steps": 6, "batch_size": 4, "gradient_accumulation": 2, "save_every": 2}
        | {"shadow": {"shadow_intermediate_size": 24}}
    )


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_batch(bench, tmp_path, monkeypatch):
    compute, calls = ShadowTrainer.compute_loss, []

    def broken(self, model, inputs, *args, **kwargs):
        calls.append(1)
        loss = compute(self, model, inputs, *args, **kwargs)
        return loss * float("nan") if len(calls) == 7 else loss  # steps 1 to 3 have 2, 2 and 1 batches

    monkeypatch.setattr(ShadowTrainer, "compute_loss", broken)
    screen, handler = io.StringIO(), signal.getsignal(signal.SIGINT)
    with pytest.raises(NotFiniteError, match=r"the loss is nan in step 4, batch 2 \(input_ids \[4, \d+\] from \[1, "):
        train(settings(bench, tmp_path), console=Console(file=screen, force_terminal=True))
    assert signal.getsignal(signal.SIGINT) is handler
    assert screen.getvalue().rfind("\x1b[?25h") > screen.getvalue().rfind("\x1b[?25l") >= 0  # the cursor is shown again
    assert newest_checkpoint(tmp_path / "checkpoints").name == "checkpoint-2"
    assert not (tmp_path / "adapter").exists()


def test_a_gradient_that_is_no_number_stops_the_run_and_names_the_weight(bench, tmp_path, monkeypatch):
    forward = Injection.forward

    def broken(self, h, s, added=None):
        if self.training and len(seen) >= 4:  # the batch of step 3; the loss itself stays finite
            self.W_up.register_hook(lambda gradient: gradient * float("inf"))
        seen.append(1)
        return forward(self, h, s, added)

    seen = []
    monkeypatch.setattr(Injection, "forward", broken)
    monkeypatch.setattr("shadowpeft.core.network.step_backend", lambda *_, **__: ("autograd", "for this test"))
    with pytest.raises(NotFiniteError, match=r"gradient norm is (nan|inf) in step 3 .*injections\.0\.W_up"):
        train(settings(bench, tmp_path))
    weights = load_file(newest_checkpoint(tmp_path / "checkpoints") / WEIGHTS_FILE)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_spike_stands_out_from_the_lines_before_it_and_noise_does_not():
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(200, generator=generator) * 0.02).tolist()
    losses = [(step, 2.0 * 0.99**step + 1 + noise[step]) for step in range(200)]
    assert spikes(losses) == []
    losses[120] = (120, 4.0)
    assert spikes(losses) == [(120, 4.0)]


@pytest.fixture
def adapter(tmp_path):
    """(model, folder to save it to): a randomised adapter with biases, and the log of a run beside the folder."""
    model = get_shadow_model(tiny_base(), tiny_config(update_bias=True))
    randomise(model.network())
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": 9.0 if n == 30 else 2.0 + 0.01 * (n % 3)}) + "\n" for n in range(1, 41))
        + '{"step": 41, "lo'
    )
    return model, tmp_path / "adapter"


def test_dead_gates_and_untrained_corrections_are_found(adapter, monkeypatch, capsys):
    model, folder = adapter
    network = model.network()
    with torch.no_grad():
        network.updates[1].W_G2.zero_()  # so that its bias alone decides
        network.updates[1].b_G2.zero_()
        network.injections[0].W_up.zero_()
    model.save_pretrained(folder)
    found = health(folder)
    assert found["loss"].endswith("1 spikes: 9.000 at step 30")
    assert (found["not finite"], found["untrained"]) == ("0 weights", "1 corrections: injections.0.W_up")
    assert "more than half" not in found["dead gates"], "a gate of 0.5 everywhere moves nothing, but is not shut"
    for bias in (-9.0, 9.0):  # sigmoid(-9) shuts the gate for every probe, sigmoid(9) opens it
        network.updates[1].b_G2.data.fill_(bias)
        model.save_pretrained(folder)
        assert health(folder)["dead gates"].endswith("near 0 or 1 for every probe; more than half: updates 1 (100%)")
    monkeypatch.setattr("sys.argv", ["shadowpeft", "info", str(folder), "--health"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert "health: dead gates" in capsys.readouterr().out


def test_health_without_an_adapter_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["shadowpeft", "info", "--health"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "name its folder" in capsys.readouterr().err


def test_a_run_in_another_thread_has_no_ctrl_c_to_wait_for(bench, tmp_path):
    """Python lets the main thread alone set a handler."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(train, dataclasses.replace(settings(bench, tmp_path), max_steps=1)).result()
    assert done.steps == 1 and not done.interrupted


def test_a_model_trained_in_bf16_is_no_longer_cast_when_it_is_given_back(bench, tmp_path, monkeypatch):
    """On a CPU, where the run itself asks for no autocast: what it does on a GPU."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which the arguments change
    monkeypatch.setattr(
        "shadowpeft.train.arguments.TrainingArguments", lambda **given: TrainingArguments(**given | {"bf16": True})
    )
    done = train(dataclasses.replace(settings(bench, tmp_path), max_steps=1))
    model, ids = done.prepared.model.eval(), torch.arange(3, 12)[None]
    assert torch.equal(model(ids).logits, ShadowModel.from_pretrained(tmp_path / "adapter")(ids).logits)

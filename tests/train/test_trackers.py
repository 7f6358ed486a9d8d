"""Trackers, through transformers' own callbacks."""

import json

import pytest

from shadowpeft.train.config import TrainConfig
from shadowpeft.train.run import train
from workbench import write_base, write_intents


def test_tensorboard_shows_every_part_of_the_loss(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install tensorboard)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "run"
    config = TrainConfig(
        base=str(write_base(tmp_path / "base")), task="clinc150", data=str(write_intents(tmp_path / "data")),
        output=str(folder), report_to="tensorboard", max_steps=4, log_every=1, save_every=2, batch_size=4, max_length=64,
    )  # fmt: skip
    train(config)
    (events,) = folder.rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events.parent))
    reader.Reload()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "main_loss", "shadow_loss", "grad_norm", "learning_rate"):
        shown = [(entry.step, entry.value) for entry in reader.Scalars(f"train/{name}")]
        assert [step for step, _ in shown] == [1, 2, 3, 4]
        logged = [line[name] for line in lines if name in line]
        assert [value for _, value in shown] == pytest.approx(logged, rel=1e-6)  # float32 in the event file
    assert sorted(path.name for path in (folder / "checkpoints").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]

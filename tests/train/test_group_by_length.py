"""Batches of rows of about one length."""

import torch

from models import tiny_base, tiny_config
from shadowpeft import get_shadow_model
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.run import make_trainer, training_arguments
from workbench import byte_tokenizer


def batches_of(tmp_path, **settings):
    """The batches of one epoch over 64 rows of 4 to 60 tokens."""
    config = TrainConfig(batch_size=4, **settings)
    model = get_shadow_model(tiny_base(dtype=torch.float32), tiny_config(adapter_dtype="float32"))
    lengths = [4 + (number * 37) % 57 for number in range(64)]
    rows = [{"input_ids": [3 + n] * length, "labels": [3 + n] * length} for n, length in enumerate(lengths)]
    trainer = make_trainer(model, byte_tokenizer(), rows, training_arguments(config, tmp_path), callbacks=[])
    return list(trainer.get_train_dataloader())


def test_grouping_by_length_leaves_less_padding_and_no_row_out(tmp_path):
    plain, grouped = batches_of(tmp_path), batches_of(tmp_path, group_by_length=True)
    padding = [sum(int((batch["attention_mask"] == 0).sum()) for batch in batches) for batches in (plain, grouped)]
    assert padding[1] < padding[0] / 3  # 289 of 1149 here
    rows = [sorted(int(row[0]) for batch in batches for row in batch["input_ids"]) for batches in (plain, grouped)]
    assert rows[0] == rows[1] == [3 + n for n in range(64)]
    widths = [batch["input_ids"].shape[1] for batch in grouped]
    assert widths != sorted(widths, reverse=True), "the order of the batches stays random"

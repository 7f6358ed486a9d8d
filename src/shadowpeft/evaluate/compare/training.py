"""Putting a method on a fresh base and training it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from shadowpeft.evaluate.compare.budget import Sized
from shadowpeft.evaluate.compare.fit import fit, num_steps
from shadowpeft.evaluate.compare.methods import check_size, put_on
from shadowpeft.evaluate.compare.plan import Cell
from shadowpeft.evaluate.compare.store import Store
from shadowpeft.evaluate.record import data_revision
from shadowpeft.model.bases import load_model, load_tokenizer
from shadowpeft.model.fingerprint import fingerprint
from shadowpeft.model.positions import within_positions
from shadowpeft.train.arguments import refuse_float16_unasked, refuse_float16_weights
from shadowpeft.train.config import TrainConfig, split_settings
from shadowpeft.train.data import encode_classification, encode_generation

Payload = dict[str, Any]


@dataclass(kw_only=True)
class Fitted:
    """A model of one method, trained or untouched, and everything to score it with."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    labels: list[str] | None
    config: TrainConfig
    sized: Sized
    trainable: int
    cost: Payload
    base_revision: str  # hash of a few of the base's weights


def train_method(cell: Cell, store: Store, setting: Payload, *, seed: int, share: float = 1.0) -> Fitted:
    """The cell's method on a fresh base, trained for ``share`` of the full run's steps."""
    recipe, task = store.recipe, store.task(cell.task)
    train_changes, shadow_changes = split_settings(setting)
    config = recipe.train_config(cell.base, cell.task, cell.method, seed=seed, **train_changes)
    labels = store.labels(cell.task)
    sized = store.size(cell, None if labels is None else len(labels))
    path = store.base_path(cell.base)
    tokenizer = load_tokenizer(path)
    set_seed(seed)
    base = load_model(path, labels=labels, dtype=config.dtype)
    refuse_float16_unasked(config, base)
    base.config.pad_token_id = tokenizer.pad_token_id
    base_revision = data_revision([fingerprint(base)])
    overrides = shadow_changes | dict(cell.overrides)
    model = put_on(base, store.method(cell.method, cell.base), sized, overrides=overrides)
    is_changed = bool(cell.overrides) or recipe.methods[cell.method].kind == "shadow-pretrained"
    refuse_float16_weights(model)
    trainable = check_size(model, sized, is_changed=is_changed)
    if torch.cuda.is_available():
        model.to("cuda")
    cost: Payload = {}
    if trainable:
        length = within_positions(config.max_length, base.config)
        rows = store.rows(cell.task, "train", config.limit_train)
        if labels is None:
            examples, encoding = encode_generation(task, tokenizer, rows, length)
        else:
            examples, encoding = encode_classification(task, tokenizer, rows, labels, length)
        steps = math.ceil(share * num_steps(config, len(examples)))
        cost = fit(model, tokenizer, examples, config, steps)
        cost |= {"rows": len(rows), "revision": data_revision(rows), "encoding": asdict(encoding)}
    return Fitted(
        model=model, tokenizer=tokenizer, labels=labels, config=config, sized=sized, trainable=trainable, cost=cost,
        base_revision=base_revision,
    )  # fmt: skip

"""A training pass leaves out the products of the last block that no label reads, and nothing else changes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from models import SPECIFIC, enable_checkpointing, randomise, tiny_base, tiny_config, tokens
from shadowpeft import get_shadow_model
from shadowpeft.core import needed_rows
from shadowpeft.model.architectures import blocks_of, decoder_of

# Of five linear layers of a block that work on each position by itself.
ROW_WISE = {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


class Widths(TorchFunctionMode):
    """Rows that each weight was multiplied with."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear:
            self.rows[id(args[1])] = args[0].numel() // args[0].shape[-1]
        return func(*args, **(kwargs or {}))


def adapted(model_type="llama", labels=None, **config):
    base = tiny_base(model_type, labels=labels)
    config = config if labels is None else config | {"task_type": "SEQ_CLS"}
    model = get_shadow_model(base, tiny_config(**{"shadow_dropout": 0.0} | config)).train()
    randomise(model.network())
    return model


def answers(ids, last=3):
    labels = torch.full_like(ids, -100)
    labels[:, -last:] = ids[:, -last:]
    return labels


def gradients(model, **inputs):
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.network().named_parameters() if p.grad is not None}


def products(model, **inputs):
    """{name of a linear layer: rows that it was given}, of the last block."""
    with Widths() as seen:
        model(**inputs)
    block = blocks_of(decoder_of(model.base))[-1]
    layers = {name.rsplit(".", 1)[-1]: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return {name: seen.rows[id(layer.weight)] for name, layer in layers.items()}


@pytest.mark.parametrize("model_type", SPECIFIC)
def test_loss_and_gradients_are_those_of_the_whole_block(model_type, monkeypatch):
    model, ids = adapted(model_type), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0  # on the right: gemma2 itself gives NaN in float64 for rows that see nothing
    labels = answers(ids).masked_fill(mask == 0, -100)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    found = gradients(model, **inputs)
    monkeypatch.setattr(needed_rows, "_MOST_NEEDED", 0.0)
    whole = gradients(model, **inputs)
    # float64: products of fewer rows round differently, by a few units in the last place.
    assert_close(found, whole, rtol=1e-9, atol=1e-11)


def test_only_labelled_rows_reach_queries_output_projection_and_mlp():
    model, ids = adapted("qwen3"), tokens(2, 9)
    given = products(model, input_ids=ids, labels=answers(ids))
    assert {name for name, rows in given.items() if rows == 6} == ROW_WISE
    assert {name: rows for name, rows in given.items() if rows != 6} == {"k_proj": 18, "v_proj": 18}


def test_a_classifier_needs_one_row_an_example_whichever_side_is_padded(monkeypatch):
    model, ids = adapted(labels=3), tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 6:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1])}
    assert {name for name, rows in products(model, **inputs).items() if rows == 3} == ROW_WISE
    found, logits = gradients(model, **inputs), model(**inputs).logits
    monkeypatch.setattr(needed_rows, "_MOST_NEEDED", 0.0)
    assert_close(gradients(model, **inputs), found, rtol=1e-9, atol=1e-11)
    assert_close(model(**inputs).logits, logits, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "asked", [{"output_logits": True}, {"output_hidden_states": True}, {"labels": None}], ids=lambda asked: next(iter(asked))
)
def test_whoever_asks_for_more_than_the_loss_gets_all_of_it(asked):
    model, ids = adapted(), tokens(2, 9)
    given = products(model, **{"input_ids": ids, "labels": answers(ids)} | asked)
    assert set(given.values()) == {18}


def test_the_hidden_states_asked_for_are_the_same_with_and_without_labels():
    model, ids = adapted(), tokens(2, 9)
    plain = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert_close(model(input_ids=ids, labels=answers(ids), output_hidden_states=True).hidden_states, plain)


def test_nothing_is_left_out_in_evaluation_or_of_a_block_that_is_computed_twice():
    model, ids = adapted(), tokens(2, 9)
    inputs = {"input_ids": ids, "labels": answers(ids)}
    with torch.no_grad():
        assert set(products(model, **inputs, output_logits=False).values()) == {18}
    expected = gradients(model, **inputs)
    enable_checkpointing(model)
    assert set(products(model, **inputs).values()) == {18}
    assert_close(gradients(model, **inputs), expected, rtol=1e-9, atol=1e-11)


def test_where_most_rows_carry_a_label_all_are_taken():
    model, ids = adapted(), tokens(2, 9)
    assert set(products(model, input_ids=ids, labels=ids).values()) == {18}


def test_no_label_at_all_gives_a_loss_of_zero():
    model, ids = adapted(), tokens(2, 9)
    loss, found = gradients(model, input_ids=ids, labels=torch.full_like(ids, -100))
    assert loss == 0 and all(not grad.any() for grad in found.values())

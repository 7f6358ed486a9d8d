"""What transformers' own models take beside labels: it changes the loss as it does there, or is refused."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from models import MIXTURES, randomise, tiny_base, tiny_config, tokens
from shadowpeft import get_shadow_model
from shadowpeft.errors import ConfigError


def adapted(**config):
    model = get_shadow_model(tiny_base(), tiny_config(**config))
    randomise(model.network())
    return model


def half_labelled(ids):
    """Moved labels, the last of a row among them, whose next token is on another process; few, so that rows are left out."""
    moved = torch.full_like(ids, -100)
    moved[:, -3:] = ids[:, :3]
    return moved


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("head", ["plain", "hooked"])
def test_moved_labels_are_the_targets_of_every_loss_and_of_the_rows_that_are_needed(training, head):
    model, ids = adapted(distillation_weight=0.5, shadow_dropout=0.0).train(training), tokens()
    if head == "hooked":
        model.get_output_embeddings().register_forward_hook(lambda *_: None)
    moved = half_labelled(ids)
    found = model(ids, labels=ids, shift_labels=moved)
    logits = model.eval()(ids, output_shadow_logits=True)
    flat = moved.flatten()
    main, shadow = F.cross_entropy(logits.logits.flatten(0, 1), flat), F.cross_entropy(logits.shadow_logits.flatten(0, 1), flat)
    teacher, student = (x.flatten(0, 1)[flat != -100].log_softmax(-1) for x in (logits.logits, logits.shadow_logits))
    distillation = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
    assert_close((found.main_loss, found.shadow_loss, found.distillation_loss), (main, shadow, distillation))


def test_moved_labels_reach_the_base_alone_with_and_without_smoothing():
    model, ids = adapted(), tokens()
    moved, logits = half_labelled(ids), model(ids, adapter="__base__").logits
    for options in ({}, {"label_smoothing": 0.1}):
        found = model(ids, labels=ids, shift_labels=moved, adapter="__base__", **options).loss
        assert_close(found, F.cross_entropy(logits.flatten(0, 1), moved.flatten(), **options), check_dtype=False)


@pytest.mark.parametrize("labels", [None, 3])
def test_another_number_for_labels_that_are_left_out_is_refused(labels):
    model = get_shadow_model(tiny_base(labels=labels), tiny_config(task_type="SEQ_CLS" if labels else "CAUSAL_LM"))
    ids, targets = tokens(), torch.tensor([0, 2]) if labels else tokens()
    model(ids, labels=targets, ignore_index=-100)
    for options in ({}, {"adapter": "__base__", "label_smoothing": 0.1}):
        with pytest.raises(ConfigError, match=r"ignore_index=0 is not supported.*-100"):
            model(ids, labels=targets, ignore_index=0, **options)


@pytest.mark.parametrize("model_type", sorted(MIXTURES))
def test_router_logits_are_returned_and_their_balance_is_no_part_of_the_loss_unsaid(model_type):
    model, ids = get_shadow_model(tiny_base(model_type), tiny_config()), tokens()
    expected, plain = model.base(ids, output_router_logits=True).router_logits, model(ids, labels=ids).loss
    assert_close(model(ids, output_router_logits=True).router_logits, expected)
    assert model(ids).router_logits is None
    calls = {"asked": {"output_router_logits": True}, "by its config": {}}
    for where, options in calls.items():
        model.config.output_router_logits = where == "by its config"
        for more in ({}, {"adapter": "__base__", "label_smoothing": 0.1}):
            with pytest.raises(ConfigError, match=r"beside labels.*config\.output_router_logits=False"):
                model(ids, labels=ids, **options, **more)
    assert_close(model(ids).router_logits, expected)
    assert_close(model(ids, labels=ids, output_router_logits=False).loss, plain)

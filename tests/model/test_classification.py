import json
from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import ShadowModel, get_shadow_model
from shadowpeft.errors import CheckpointError, ConfigError
from shadowpeft.model.architectures import ARCHITECTURES
from shadowpeft.model.cache import CACHE

WITH_CLASSIFIER = sorted(set(ARCHITECTURES) - {"cohere", "granite", "olmo2"})  # which have none in transformers


def adapted(model_type="llama", **config):
    model = get_shadow_model(tiny_base(model_type, labels=3), tiny_config(task_type="SEQ_CLS", **config))
    randomise(model.network())
    return model


@pytest.mark.parametrize("model_type", WITH_CLASSIFIER)
def test_a_fresh_classifier_equals_the_base_and_a_trained_one_detaches_exactly(model_type):
    base, ids = tiny_base(model_type, labels=3), tokens()
    mask = torch.ones_like(ids)
    before = base(ids, attention_mask=mask).logits
    model = get_shadow_model(base, tiny_config(task_type="SEQ_CLS"))
    assert_close(model(ids, attention_mask=mask).logits, before)
    randomise(model.network())
    out = model(ids, attention_mask=mask, output_shadow_logits=True)
    assert not torch.allclose(out.logits, before)
    assert_close(model.detach()(ids, attention_mask=mask).logits, out.shadow_logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_does_not_change_the_logits(side):
    model, ids = adapted(), tokens(1, 6)
    pads = (3, 0) if side == "left" else (0, 3)
    padded = F.pad(ids, pads)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=torch.ones_like(ids)).logits
    assert_close(model(padded, attention_mask=mask, position_ids=positions).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("as_embeddings", [False, True])
def test_what_follows_a_cache_is_classified_under_the_mask_of_the_whole_as_in_one_pass(as_embeddings):
    model, ids, labels = adapted(), tokens(2, 9), torch.tensor([0, 2])
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0  # padding within what is new
    whole = model(ids, attention_mask=mask, labels=labels, output_shadow_logits=True)
    cache = model(ids[:, :5], attention_mask=mask[:, :5], use_cache=True)[CACHE]
    more = ids[:, 5:]
    inputs = {"inputs_embeds": model.get_input_embeddings()(more)} if as_embeddings else {"input_ids": more}
    found = model(**inputs, **{CACHE: cache}, attention_mask=mask, labels=labels, output_shadow_logits=True)
    assert_close((found.logits, found.shadow_logits, found.loss), (whole.logits, whole.shadow_logits, whole.loss))


def test_the_loss_is_the_sum_of_both_heads_and_both_heads_get_gradients():
    model, ids = adapted(auxiliary_loss_weight=0.5), tokens()
    labels = torch.tensor([0, 2])
    out = model(ids, attention_mask=torch.ones_like(ids), labels=labels, output_shadow_logits=True)
    expected = F.cross_entropy(out.logits, labels) + 0.5 * F.cross_entropy(out.shadow_logits, labels)
    assert_close(out.loss, expected)
    out.loss.backward()
    assert model.network().head.weight.grad.any()
    assert model.network().shadow_head.weight.grad.any()


@pytest.mark.parametrize(
    ("labels", "problem", "values"),
    [
        (3, None, torch.tensor([0, 2])),
        (3, None, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
        (3, "multi_label_classification", torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
        (3, "regression", torch.tensor([[1.5, -2.0, 0.0], [0.5, 0.0, 3.0]])),
        (1, None, torch.tensor([1.5, -2.0])),
    ],
)
def test_a_fresh_classifiers_loss_is_the_bases_own_for_every_kind_of_problem(labels, problem, values):
    base, ids = tiny_base(labels=labels, dtype=torch.float32), tokens()
    base.config.problem_type = problem
    model = get_shadow_model(base, tiny_config(task_type="SEQ_CLS", adapter_dtype="float32"))
    found = model(ids, attention_mask=torch.ones_like(ids), labels=values).main_loss
    assert problem is None or base.config.problem_type == problem
    assert_close(found, base(ids, attention_mask=torch.ones_like(ids), labels=values).loss)


FLOATS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
PROBLEMS = [
    (3, None, torch.tensor([0, 2]), "single_label_classification"),
    (3, None, FLOATS, "multi_label_classification"),
    (3, "regression", FLOATS, "regression"),
    (1, None, torch.tensor([1.5, -2.0]), "regression"),
]


@pytest.mark.parametrize(("labels", "asked", "values", "problem"), PROBLEMS)
@pytest.mark.parametrize("onto", ["its own base", "a given base"])
def test_the_kind_of_problem_is_that_of_the_first_labels_and_is_saved_loaded_and_detached(
    tmp_path, labels, asked, values, problem, onto
):
    source = tiny_base(labels=labels, dtype=torch.float32)
    source.save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    base.config.problem_type = asked
    model = get_shadow_model(base, tiny_config(task_type="SEQ_CLS", adapter_dtype="float32")).eval()
    randomise(model.network())
    expected = model(tokens(), labels=values, output_shadow_logits=True)
    assert model.config.problem_type == problem
    model.save_pretrained(tmp_path / "adapter")
    given = None if onto == "its own base" else AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    loaded = ShadowModel.from_pretrained(tmp_path / "adapter", given)
    assert loaded.config.problem_type == problem
    assert_close(loaded(tokens(), labels=values).loss, expected.loss)
    detached = loaded.detach()
    assert detached.config.problem_type == problem
    assert_close(detached(tokens(), labels=values).loss, expected.shadow_loss)


def test_an_adapter_that_does_not_say_its_kind_of_problem_loads_and_one_that_says_nonsense_does_not(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    path = tmp_path / "shadow_config.json"
    described = json.loads(path.read_text())
    for value, is_right in (("multi_label_classification", True), (["regression"], False), ("clustering", False)):
        described["base"]["problem_type"] = value
        path.write_text(json.dumps(described))
        with nullcontext() if is_right else pytest.raises(CheckpointError, match=r"base\.problem_type"):
            assert ShadowModel.from_pretrained(tmp_path, tiny_base(labels=3)).config.problem_type == value
    del described["base"]["problem_type"]
    path.write_text(json.dumps(described))
    assert ShadowModel.from_pretrained(tmp_path, tiny_base(labels=3)).config.problem_type is None


def test_two_adapters_keep_heads_of_their_own():
    model, ids = adapted(), tokens()
    model.add_adapter("second", tiny_config(task_type="SEQ_CLS"))
    assert model.network().head is not model.network("second").head
    assert not torch.equal(model(ids).logits, model(ids, adapter="second").logits)


def test_a_task_type_that_does_not_fit_the_model_is_refused():
    with pytest.raises(ConfigError, match="task_type='CAUSAL_LM' does not fit LlamaForSequenceClassification"):
        get_shadow_model(tiny_base(labels=3), tiny_config())


def test_distillation_of_next_tokens_into_a_classifier_is_refused():
    with pytest.raises(ConfigError, match=r"distillation_weight=0\.5 would be ignored"):
        adapted(distillation_weight=0.5)

"""ShadowTrainer and transformers' own Trainer on a shadow model: evaluating, the best checkpoint, several GPUs."""

import os

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from models import tiny_base, tiny_config, tokens
from shadowpeft import ShadowModelForCausalLM, ShadowModelForSequenceClassification, get_shadow_model
from shadowpeft.errors import ConfigError
from shadowpeft.train import ShadowTrainer, parameter_groups
from shadowpeft.train.finite import NotFiniteError
from shadowpeft.train.saving import SafeTrainer


def made(kind, **config):
    """(a model, its rows)."""
    base = tiny_base(dtype=torch.float32, labels=3 if kind == "classifier" else None)
    task = "SEQ_CLS" if kind == "classifier" else "CAUSAL_LM"
    model = get_shadow_model(base, tiny_config(adapter_dtype="float32", task_type=task, **config))
    labels = (lambda row, index: index % 3) if kind == "classifier" else (lambda row, index: row)
    return model, [{"input_ids": row, "labels": labels(row, index)} for index, row in enumerate(tokens(4, 6))]


def trainer(trainer_class, folder, model, rows, *, compute_metrics=None, **options):
    arguments = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        **{"max_steps": 3, "save_strategy": "no", "learning_rate": 1e-2} | options,
    )  # fmt: skip
    return trainer_class(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_metrics)


def test_transformers_finds_one_column_of_labels_in_a_models_signature():
    for model_class in (ShadowModelForCausalLM, ShadowModelForSequenceClassification):
        assert find_labels(model_class) == ["labels"]


@pytest.mark.parametrize("kind", ["language model", "classifier"])
@pytest.mark.parametrize("trainer_class", [Trainer, ShadowTrainer])
def test_evaluating_gives_the_models_loss_and_calls_the_metric(tmp_path, trainer_class, kind):
    model, rows = made(kind)
    found = trainer(trainer_class, tmp_path, model, rows, compute_metrics=lambda _: {"ours": 7.0}).evaluate()
    ids, labels = (torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in ("input_ids", "labels"))
    expected = model.eval()(ids, labels=labels).loss.item()
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)  # sums of float32 in another order
    assert found["eval_ours"] == 7.0


@pytest.mark.parametrize("metric", ["loss", "ours"])
@pytest.mark.parametrize("kind", ["language model", "classifier"])
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, kind, metric):
    model, rows = made(kind)
    values = iter([1.0, 3.0, 2.0])
    options = {"greater_is_better": True, "metric_for_best_model": "ours"} if metric == "ours" else {}
    best = trainer(
        ShadowTrainer, tmp_path, model, rows, compute_metrics=lambda _: {"ours": next(values)},
        load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, **options,
    )  # fmt: skip
    best.train()
    losses = [entry["eval_loss"] for entry in best.state.log_history if "eval_loss" in entry]
    expected = 2 if metric == "ours" else 1 + losses.index(min(losses))
    folder = tmp_path / f"checkpoint-{expected}"
    assert best.state.best_model_checkpoint == str(folder)
    assert_close(dict(model.network().state_dict()), load_file(folder / "shadow_model.safetensors"))


def test_the_best_checkpoint_is_found_again_where_the_run_was_moved_to(tmp_path):
    values = iter([3.0, 1.0, 2.0])
    options = dict(
        compute_metrics=lambda _: {"ours": next(values)}, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, save_total_limit=2, greater_is_better=True, metric_for_best_model="ours",
    )  # fmt: skip
    begun = trainer(ShadowTrainer, tmp_path / "there", *made("language model"), max_steps=2, **options)
    begun.train()
    (tmp_path / "there").rename(tmp_path / "here")
    model, rows = made("language model")
    going_on = trainer(ShadowTrainer, tmp_path / "here", model, rows, max_steps=3, **options)
    going_on.train(resume_from_checkpoint=str(tmp_path / "here" / "checkpoint-2"))
    best = tmp_path / "here" / "checkpoint-1"
    assert going_on.state.best_model_checkpoint == str(best)
    assert_close(dict(model.network().state_dict()), load_file(best / "shadow_model.safetensors"))


def test_a_plain_classifiers_gradients_are_those_of_the_whole_step_however_it_is_cut_into_batches(tmp_path):
    """transformers sums over batches what is a mean of each already."""
    found = []
    for rows_a_batch, batches in ((4, 1), (1, 4)):
        base = tiny_base(dtype=torch.float32, labels=3)
        _, rows = made("classifier")
        trainer(
            ShadowTrainer, tmp_path, base, rows, per_device_train_batch_size=rows_a_batch, gradient_accumulation_steps=batches,
            max_steps=1, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
        ).train()  # fmt: skip
        found.append(base.score.weight.detach().clone())
    assert_close(*found)


def test_a_checkpoint_that_an_earlier_run_left_does_not_cost_the_new_ones(tmp_path):
    stale = tmp_path / "checkpoint-900"
    stale.mkdir()
    os.utime(stale, (1, 1))
    model, rows = made("language model")
    trainer(ShadowTrainer, tmp_path, model, rows, save_strategy="steps", save_steps=1, save_total_limit=2).train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-3"}


def test_the_logged_parts_are_means_over_steps_also_where_an_epochs_last_step_has_fewer_batches(tmp_path):
    """Three batches of one row an epoch, two a step: the second step of an epoch has one batch."""
    model, rows = made("language model")
    options = dict(gradient_accumulation_steps=2, per_device_train_batch_size=1, max_steps=4, logging_steps=2)
    one = trainer(ShadowTrainer, tmp_path, model, rows[:3], **options)
    one.train()
    weight = model.network().config.auxiliary_loss_weight
    logged = [entry for entry in one.state.log_history if "main_loss" in entry]
    assert len(logged) == 2
    for entry in logged:
        assert entry["main_loss"] + weight * entry["shadow_loss"] == pytest.approx(entry["loss"], abs=2e-4)  # four decimals


def test_an_optimizer_from_elsewhere_says_that_no_weights_have_a_rate_of_their_own(tmp_path):
    model, rows = made("language model", shadow_lr_multiplier=0.5)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])

    def create(optimizer, **own):
        return ShadowTrainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None), **own).create_optimizer()

    trained = [weight for weight in model.parameters() if weight.requires_grad]
    mixed = torch.optim.AdamW(trained, lr=1e-2)
    with pytest.warns(UserWarning, match=r"learn at 0\.5 times its rate.*shadowpeft\.train\.parameter_groups"):
        assert create(mixed) is mixed
    with pytest.raises(ConfigError, match=r"learn at 0\.1 times its rate"):
        create(mixed, shadow_lr_multiplier=0.1)
    split = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-2))
    assert create(split) is split  # and nothing is said
    ours = ShadowTrainer(model, arguments, train_dataset=rows)
    assert ours.create_optimizer() is ours.create_optimizer()


@pytest.mark.parametrize("trainer_class", [SafeTrainer, ShadowTrainer])
def test_a_process_that_sees_several_gpus_uses_one_and_says_how_to_use_all(tmp_path, trainer_class):
    """transformers would wrap the model in nn.DataParallel; on a CPU its count of GPUs has to be made up."""
    model, rows = made("language model")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[], per_device_train_batch_size=2)
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 2
    with pytest.warns(UserWarning, match=r"sees 2 GPUs and trains on the first alone.*accelerate launch --num_processes 2"):
        one = trainer_class(model, arguments, train_dataset=rows)
    assert one._wrap_model(model) is model
    assert next(iter(one.get_train_dataloader()))["input_ids"].shape == (2, 6)


def test_what_the_tutorial_says_of_the_plain_trainer_is_so(tmp_path):
    model, rows = made("classifier", shadow_lr_multiplier=0.5)
    kinds = []
    plain = trainer(
        Trainer, tmp_path, model, rows, compute_metrics=lambda found: kinds.append(type(found.predictions)) or {},
        max_steps=1, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    assert {group["lr"] for group in plain.create_optimizer().param_groups} == {1e-2}
    with pytest.warns(UserWarning, match=r"asks for 0\.5 times that \(shadow_lr_multiplier\)"):
        plain.train()
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        plain.train(resume_from_checkpoint=True)
    assert not any((tmp_path / "checkpoint-1" / name).exists() for name in ("model.safetensors", "pytorch_model.bin"))
    plain.evaluate()
    assert kinds == [tuple]


def test_label_smoothing_reaches_both_heads_of_a_classifier(tmp_path):
    """transformers' smoother takes the labels away, and the head of the shadow had no loss at all."""
    model, rows = made("classifier", auxiliary_loss_weight=0.5)
    ids, labels = torch.stack([row["input_ids"] for row in rows]), torch.tensor([row["labels"] for row in rows])
    smoothing = trainer(ShadowTrainer, tmp_path, model, rows, label_smoothing_factor=0.1)
    found = smoothing.compute_loss(model.eval(), {"input_ids": ids, "labels": labels})
    out = model(ids, output_shadow_logits=True)
    main, shadow = (cross_entropy(logits, labels, label_smoothing=0.1) for logits in (out.logits, out.shadow_logits))
    assert_close(found, main + 0.5 * shadow)
    found.backward()
    assert model.network().shadow_head.weight.grad.abs().sum() > 0
    alone = model(ids, adapter="__base__", labels=labels, label_smoothing=0.1)
    assert_close(alone.loss, cross_entropy(alone.logits, labels, label_smoothing=0.1))
    loss, logits = model(ids, adapter="__base__", labels=labels, label_smoothing=0.1, return_dict=False)[:2]
    assert torch.equal(loss, alone.loss) and torch.equal(logits, alone.logits)


def test_label_smoothing_over_anything_but_one_class_a_row_is_refused():
    model, rows = made("classifier")
    ids = torch.stack([row["input_ids"] for row in rows])
    for adapter in ("default", "__base__"):
        with pytest.raises(ConfigError, match=r"label_smoothing=0\.1 is for one class a row, and this is multi_label"):
            model(ids, labels=torch.zeros(4, 3), label_smoothing=0.1, adapter=adapter)


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_gradient_that_is_no_number_reaches_no_weight_whether_gradients_are_clipped_or_not(tmp_path, clip):
    model, rows = made("language model")
    before = {name: weight.clone() for name, weight in model.network().state_dict().items()}
    model.network().injections[0].W_up.register_hook(lambda gradient: gradient + float("inf"))
    with pytest.raises(NotFiniteError, match=r"gradient norm is inf in step 1 .*1 of .*injections\.0\.W_up"):
        trainer(ShadowTrainer, tmp_path, model, rows, max_grad_norm=clip).train()
    assert_close(dict(model.network().state_dict()), before)

"""What would favour one method without anybody noticing: precision, accumulation, devices."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

import comparisons
from shadowpeft.evaluate.compare import plan
from shadowpeft.evaluate.compare.budget import shadow_config
from shadowpeft.evaluate.compare.plan import plan_cells
from shadowpeft.evaluate.compare.recipe import BaseSpec, MethodSpec, Recipe, TaskSpec, read_recipe, shadow_settings
from shadowpeft.evaluate.compare.runner import devices_of
from shadowpeft.evaluate.compare.store import Store
from shadowpeft.evaluate.compare.training import train_method

pytest.importorskip("peft", reason="peft is not installed (pip install peft==0.21.2)")
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning")

TRAINED = ("probe", "lora", "dora", "shadow", "full")


def store_of(root: Path, folder: Path, **train) -> Store:
    values = comparisons.small_recipe(seeds=[0])
    values["train"] |= train
    recipe = read_recipe(comparisons.write_recipe(folder / "small.yaml", values))
    return Store(recipe=recipe, output=folder, data_root=root)


def main_cell(store: Store, task: str, method: str):
    cells = [cell for cell in plan_cells(store.recipe) if cell.section == "main"]
    return next(cell for cell in cells if (cell.task, cell.method) == (task, method))


@pytest.mark.parametrize("task", ["classes", "e2e"])
@pytest.mark.parametrize("method", TRAINED)
def test_every_method_trains_fp32_weights_on_a_bf16_base(root, tmp_path, task, method):
    """At 1e-5 an update of a bf16 weight is rounded away: a head or a base of bf16 weights would not learn."""
    if (task, method) == ("e2e", "probe"):
        pytest.skip("a probe needs labels")
    store = store_of(root, tmp_path, dtype="bfloat16")
    cell = main_cell(store, task, method)
    before = train_method(cell, store, {"learning_rate": 1e-12}, seed=0).model.state_dict()
    model = train_method(cell, store, {"learning_rate": 1e-5}, seed=0).model
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and {weight.dtype for weight in trained.values()} == {torch.float32}
    # Weights beside nothing (norms' ones, LoRA's zeros) move at any precision; those of a usual size must too.
    usual = [name for name, weight in trained.items() if before[name].abs().mean() > 1e-2 and weight.ndim == 2]
    assert usual and all((trained[name] != before[name]).any() for name in usual)
    if method != "full":  # the base stays as it is stored
        assert torch.bfloat16 in {weight.dtype for weight in model.parameters()}


@pytest.mark.parametrize("method", ["probe", "lora", "shadow"])
@pytest.mark.parametrize("task", ["classes", "e2e"])
def test_accumulated_batches_are_one_batch_to_every_method(root, tmp_path, task, method):
    """The loss of the first step, before anything was learnt, of 8 rows at once and of 4 and 4."""
    if (task, method) == ("e2e", "probe"):
        pytest.skip("a probe needs labels")
    losses = []
    for size, accumulation in ((8, 1), (4, 2)):
        (tmp_path / f"{size}").mkdir()
        store = store_of(root, tmp_path / f"{size}", batch_size=size, gradient_accumulation=accumulation, max_steps=1)
        cell = main_cell(store, task, method)
        losses.append(train_method(cell, store, {"learning_rate": 1e-3}, seed=0).cost["first_loss"])
    # Dropout draws other masks for other batches, and moves LoRA's loss by well below one percent before anything is learnt.
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        (None, 0, [None, None, None]),
        (None, 2, ["0", "1", "0"]),
        ("3, 5", 2, ["3", "5", "3"]),
        ("MIG-a", 1, ["MIG-a"] * 3),
        ("", 0, [None, None, None]),
    ],
)
def test_each_worker_sees_one_accelerator(monkeypatch, visible, count, expected):
    """With several, transformers' Trainer would take as many batches a step as there are."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices_of(3) == expected


@pytest.mark.parametrize(
    ("train", "methods"),
    [
        ({"dtype": "float32"}, set()),
        ({"dtype": "bfloat16"}, {"probe", "lora", "dora", "full"}),
        ({"dtype": "float32", "gradient_accumulation": 2}, {"probe", "lora", "dora", "full"}),
    ],
)
def test_results_of_another_training_than_todays_are_out_of_date_and_no_others(tmp_path, monkeypatch, train, methods):
    store = store_of(tmp_path, tmp_path, **train)
    cells = [cell for cell in plan_cells(store.recipe) if cell.task == "classes"]
    today = {cell.id: plan.fingerprint(store.recipe, cell) for cell in cells}
    monkeypatch.setattr(plan, "_trains_otherwise_than_before", lambda *args: False)
    changed = {cell.method for cell in cells if plan.fingerprint(store.recipe, cell) != today[cell.id]}
    assert changed == methods


def test_a_base_is_scored_once_whatever_seeds_a_section_has_and_whatever_it_is_called(tmp_path):
    values = comparisons.small_recipe(main={"tasks": ["classes"], "methods": ["untouched", "lora"], "seeds": [1, 2]})
    values["methods"]["untouched"] = {"kind": "none"}
    recipe = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", values))
    seeds = {name: [c.seed for c in plan_cells(recipe) if (c.section, c.method) == ("main", name)] for name in recipe.methods}
    assert seeds["untouched"] == [1] and seeds["lora"] == [1, 2]
    assert not [cell for cell in plan_cells(recipe) if (cell.section, cell.method) == ("search", "untouched")]
    assert dataclasses.asdict(recipe)["seeds"] == (0, 1)


def test_a_methods_own_shadow_settings_win_over_those_of_its_base(tmp_path):
    bases = {"base": BaseSpec(path="x", shadow={"shadow_num_attention_heads": 4, "preset": "peft"})}
    own = MethodSpec(kind="shadow", shadow={"shadow_num_attention_heads": 1, "preset": "recommended"})
    methods = {"lora": MethodSpec(kind="lora"), "shadow": MethodSpec(kind="shadow"), "own": own}
    recipe = Recipe(name="x", bases=bases, tasks={"trec": TaskSpec(task="trec")}, methods=methods)
    store = Store(recipe=recipe, output=tmp_path)
    assert store.method("shadow", "base").shadow == bases["base"].shadow
    assert store.method("own", "base").shadow == own.shadow
    preset = plan._preset(own, bases["base"])
    assert preset["auxiliary_loss_weight"] == 8.0 and not preset["use_update"]  # what results are held against


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("tasks", {"classes": {"num_rows": 100, "mean_tokens": 12, "num_labels": 6}}),
        ("bases", {"tiny": {"step_seconds": {"lora": 0.1}, "step_tokens": 50, "measured_on": "a clock"}}),
        ("methods", {"shadow": {"trials": [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}]}}),
    ],
)
def test_what_decides_no_result_makes_none_out_of_date(tmp_path, where, changes):
    """What only ``--plan`` reads, and the reference's own trials, which change its cells alone."""
    values = comparisons.small_recipe()
    before = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", values))
    for name, more in changes.items():
        values[where][name] |= more
    after = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", values))
    changed = {c.method for c in plan_cells(after) if plan.fingerprint(before, c) != plan.fingerprint(after, c)}
    assert changed == ({"shadow"} if where == "methods" else set())


@pytest.mark.parametrize("parameters", [None, 12000])
def test_the_references_size_makes_all_out_of_date_where_it_is_the_budget(tmp_path, parameters):
    values = comparisons.small_recipe()
    values["bases"]["tiny"]["parameters"] = parameters
    before = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", values))
    values["methods"]["shadow"]["shadow"]["r"] = 3
    after = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", values))
    changed = {c.method for c in plan_cells(after) if plan.fingerprint(before, c) != plan.fingerprint(after, c)}
    assert changed == ({"shadow"} if parameters else set(after.methods))


def test_a_bases_sizes_of_a_shadow_are_not_asked_of_one_that_brings_its_own(tmp_path):
    base = BaseSpec(path="x", shadow={"shadow_num_attention_heads": 2})
    pretrained = MethodSpec(kind="shadow-pretrained", shadow={"shadow_model": "x", "r": 2})
    assert shadow_settings(pretrained, base) == {"shadow_model": "x", "r": 2}
    # A variant of another shadow than the method has: the sizes that were given and solved are of the former.
    given = MethodSpec(kind="shadow", shadow={"shadow_num_attention_heads": 2, "r": 2})
    config = shadow_config(given, is_classifier=False, shadow_model="base:first:1", shadow_intermediate_size=19)
    assert config.idle_sizes == {} and config.r == 2


@pytest.mark.parametrize("method", ["lora", "probe", "full", "shadow"])
def test_no_autocast_of_the_training_stays_on_a_model_that_is_scored(root, tmp_path, monkeypatch, method):
    """On a CPU, where the run itself asks for no autocast: what it does on a GPU."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which the arguments change
    monkeypatch.setattr(
        "shadowpeft.train.arguments.TrainingArguments", lambda **given: TrainingArguments(**given | {"bf16": True})
    )
    store = store_of(root, tmp_path, dtype="bfloat16", max_steps=1)
    model = train_method(main_cell(store, "classes", method), store, {"learning_rate": 1e-3}, seed=0).model
    assert not hasattr(model, "_original_forward")  # accelerate's
    assert model(input_ids=torch.arange(3, 12)[None]).logits.isfinite().all()

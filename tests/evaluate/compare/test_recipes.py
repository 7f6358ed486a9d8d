"""The recipes that come with the project: read, planned and solved, without a network and without weights."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from shadowpeft.evaluate.compare.estimate import estimate
from shadowpeft.evaluate.compare.plan import cells_of, fingerprint, plan_cells, scaling_cells
from shadowpeft.evaluate.compare.recipe import Recipe, read_recipe
from shadowpeft.evaluate.compare.store import Store

RECIPES = Path(__file__).parents[3] / "recipes"
RESULTS = RECIPES.parent / "results"
PAPER = sorted((RECIPES / "paper").glob("*.yaml"))
# What --plan would read from the bases of the recipes.
EMBEDDED = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "tie_word_embeddings": True,
}
BABYLLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 361,
    "tie_word_embeddings": True,
}
LABELS = {"trec": 6, "sst2": 2, "clinc150": 150, "home_commands": 46, "20news": 20}


def test_there_is_one_recipe_for_each_base_and_task_of_the_paper_one_for_the_board_one_for_transfer_and_one_for_scaling():
    assert len(PAPER) == 3 * 5 + 1 + 2
    transfer, scaling = (read_recipe(RECIPES / "paper" / f"qwen3-{name}.yaml") for name in ("4b-transfer", "8b-scaling"))
    trained = [cell for cell in plan_cells(transfer) if cell.section == "main"]
    assert {cell.task for cell in trained} == {"gsm8k", "squad_v2", "mmlu"}
    assert all(set(cell.score_on) == {"gsm8k", "squad_v2", "mmlu"} for cell in trained)
    budgets = {cell.parameters for cell in plan_cells(scaling) if cell.section == "scaling"}
    assert budgets == {100_000_000 * tenth for tenth in range(1, 6)}


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_a_paper_recipe_solves_every_equal_budget_within_two_percent_and_knows_its_steps(path, tmp_path):
    recipe = read_recipe(path)
    for line in estimate(plan_cells(recipe), Store(recipe=recipe, output=tmp_path)):
        assert line.problem is None, line
        assert line.steps is not None
        if line.sized.target is not None:
            assert line.sized.trainable == pytest.approx(line.sized.target, rel=0.02)
        # No step of a linear probe, of all weights or of another model's has been measured.
        assert (line.hours is None) == (recipe.methods[line.method].kind in ("probe", "full", "shadow-pretrained")) or (
            path.stem.startswith("llama") and line.method == "dora"
        )


def test_hours_go_by_the_tokens_of_a_step(tmp_path):
    recipe = read_recipe(RECIPES / "paper" / "qwen3-8b-gsm8k.yaml")
    lines = estimate(plan_cells(recipe), Store(recipe=recipe, output=tmp_path))
    (lora,) = [line for line in lines if (line.section, line.method) == ("main", "lora")]
    seconds = next(row["seconds"] for row in measured_steps("8B") if row["row"] == "LoRA attention")
    # 16 rows of 240 tokens, of a measured step of 4,096; four epochs of 7,473 rows, three seeds.
    assert lora.hours == pytest.approx(3 * 4 * math.ceil(7473 / 16) * seconds * 16 * 240 / 4096 / 3600, rel=0.01)


@pytest.mark.parametrize("size", ["0.6B", "4B", "8B"])
def test_step_times_of_the_paper_s_recipes_are_those_of_the_results(size):
    found = {row["row"]: row["seconds"] for row in measured_steps(size)}
    for path in (path for path in PAPER if path.stem.startswith(f"qwen3-{size.lower()}")):
        (base,) = read_recipe(path).bases.values()
        expected = {"lora": found["LoRA attention"], "dora": found["DoRA all linear"], "shadow": found["ours"]}
        assert base.step_seconds == pytest.approx(expected, abs=5e-4)  # as rounded in the recipe


def measured_steps(size: str) -> list[dict]:
    return json.loads((RESULTS / f"train_step-{size}.json").read_text())["rows"]


def test_the_board_recipe_estimates_hours_from_its_published_step_times(tmp_path):
    recipe = read_recipe(RECIPES / "paper" / "llama-3.2-3b-metamathqa.yaml")
    lines = estimate(plan_cells(recipe), Store(recipe=recipe, output=tmp_path))
    hours = {(line.section, line.method): line.hours for line in lines}
    assert hours["main", "lora"] == pytest.approx(3 * 5000 * 0.188 / 3600)
    assert hours["main", "dora"] is None


def without_files(name: str) -> Recipe:
    """A recipe of this machine's size with the shapes of its bases and the labels of its tasks."""
    recipe = read_recipe(RECIPES / name)
    shapes = {"embedded": EMBEDDED, "babyllama": BABYLLAMA}
    return dataclasses.replace(
        recipe,
        bases={name: dataclasses.replace(spec, config=shapes[name]) for name, spec in recipe.bases.items()},
        tasks={
            name: dataclasses.replace(task, num_labels=LABELS.get(name), num_rows=4000)
            for name, task in recipe.tasks.items()
        },
    )


def test_the_long_recipe_solves_its_budget_for_every_method(tmp_path):
    recipe = without_files("compare_long.yaml")
    lines = estimate(plan_cells(recipe), Store(recipe=recipe, output=tmp_path))
    assert {(line.section, line.method) for line in lines if line.section != "search"} == {
        ("main", method) for method in ("none", "lora", "dora", "shadow")
    }
    sized = [line.sized for line in lines if line.method != "none"]
    assert all(each is not None and each.trainable == pytest.approx(300000, rel=0.02) for each in sized)


def test_a_search_for_each_budget_of_scaling_tries_weights_of_that_budget(tmp_path):
    recipe = without_files("compare_small.yaml")
    scaling = {**recipe.sections["scaling"], "search": True}
    recipe = dataclasses.replace(recipe, sections={"main": recipe.sections["main"], "scaling": scaling})
    cells = cells_of(recipe, ["scaling"])
    lines = estimate(cells, Store(recipe=recipe, output=tmp_path))
    of_search = {(each.task, each.method, each.variant): each.sized for each in lines if each.section == "search"}
    of_scaling = {(each.task, each.method, each.variant): each.sized for each in lines if each.section == "scaling"}
    # Tasks, methods and budgets besides the base's own, which the main table has of those that are in it.
    assert len(of_scaling) == 2 * (3 * 4 + 5)
    for (task, method, budget), sized in of_scaling.items():
        assert of_search[task, method, "" if budget == "300000" else budget] == sized
    assert {variant for _, _, variant in of_search} == {"", "180000", "600000", "1200000", "2400000"}


def test_the_small_recipe_solves_every_budget_of_every_section(tmp_path):
    recipe = without_files("compare_small.yaml")
    lines = estimate(plan_cells(recipe), Store(recipe=recipe, output=tmp_path))
    # Every task of transfer is one of the main table's too, so its cells are there.
    assert {line.section for line in lines} == {"search", "main", "ablations", "scaling", "latency"}
    transfer, methods = (set(recipe.sections["transfer"][key]) for key in ("tasks", "methods"))
    trained = [cell for cell in plan_cells(recipe) if cell.section == "main" and cell.method in methods]
    scored = [set(cell.score_on) for cell in trained if cell.task in transfer and cell.seed in recipe.seeds]
    assert len(scored) > 0 and all(transfer <= each for each in scored)
    assert not [line.problem for line in lines if line.problem]
    sized = [line.sized for line in lines if line.sized is not None and line.sized.target is not None]
    assert all(each.trainable == pytest.approx(each.target, rel=0.02) for each in sized)
    # One of the budgets is the base's own, whose trainings are the main table's.
    assert len({cell.parameters for cell in scaling_cells(recipe)}) >= 5


def test_the_recipe_of_the_other_base_solves_its_budget_and_keeps_a_methods_own_heads(tmp_path):
    store = Store(recipe=without_files("compare_babyllama.yaml"), output=tmp_path)
    lines = estimate(plan_cells(store.recipe), store)
    assert not [line.problem for line in lines if line.problem]
    sized = [line.sized for line in lines if line.sized is not None and line.sized.target is not None]
    assert len(sized) > 0 and all(each.trainable == pytest.approx(each.target, rel=0.02) for each in sized)
    names = ("shadow", "attached", "sublayers")
    heads = {name: store.method(name, "babyllama").shadow["shadow_num_attention_heads"] for name in names}
    assert heads == {"shadow": 4, "attached": 1, "sublayers": 1}


LARGE = (
    *("compare_small", "compare_long", "compare_babyllama", "compare_unread", "confirm"),
    *("other_base_search", "rank_search", "sublayer_search"),
)


@pytest.mark.parametrize(("name", "more_than"), [*((name, 10) for name in LARGE), ("longer_search", 1), ("head_search", 4)])
def test_every_result_in_the_repository_is_what_the_recipe_would_make_today(name, more_than):
    """A new field of ShadowConfig, another preset or another setting makes results out of date: run these again, take
    them out, or (a field at which nothing changes) name it in ``ADDED``."""
    recipe = read_recipe(RECIPES / f"{name}.yaml")
    today = {cell.id: fingerprint(recipe, cell) for cell in plan_cells(recipe)}
    there = {file.stem: json.loads(file.read_text()) for file in (RESULTS / name / "cells").glob("*.json")}
    assert len(there) > more_than
    assert {each for each, result in there.items() if result["fingerprint"] != today.get(each)} == set()

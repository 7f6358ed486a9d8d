"""Whole comparisons on a tiny random base and generated data."""

import dataclasses
import gzip
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

import comparisons
from shadowpeft.core.config import PRESETS, ShadowConfig
from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.compare import compare, latency, read_recipe
from shadowpeft.evaluate.compare.cells import run_cell
from shadowpeft.evaluate.compare.command import show_plan
from shadowpeft.evaluate.compare.estimate import StepTime
from shadowpeft.evaluate.compare.gather import gather
from shadowpeft.evaluate.compare.plan import ADDED, cells_of, fingerprint, plan_cells
from shadowpeft.evaluate.compare.results import read_result
from shadowpeft.evaluate.compare.runner import pending_cells
from shadowpeft.evaluate.compare.store import Store
from shadowpeft.evaluate.compare.tables import main_table, search_table, variant_table
from shadowpeft.evaluate.compare.training import train_method
from shadowpeft.evaluate.compare.worker import serve
from shadowpeft.train.groups import heads_of

pytest.importorskip("peft", reason="peft is not installed (pip install peft==0.21.2)")
# transformers 5.23 has renamed what PEFT 0.21 and transformers 5.17 know under this name.
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning")

EVERYTHING = {
    "main": {"tasks": ["classes", "e2e"], "score_detached": True},
    "further_baselines": ["dora"],
    "transfer": {"tasks": ["commands", "orders"], "methods": ["none", "lora", "shadow"], "seeds": [0]},
    "scaling": {"tasks": ["e2e"], "methods": ["lora", "shadow"], "budgets": [10000, 14000], "seeds": [0]},
    "ablations": {
        "tasks": ["classes"],
        "variants": {"no update": {"use_update": False}, "peft": {"preset": "peft"}},
        "seeds": [0],
    },
    "latency": {"task": "e2e", "prompts": 2, "prompt_tokens": 8, "new_tokens": 3, "batch_sizes": [1, 2], "rounds": 1},
}


@pytest.fixture(scope="module")
def everything(root, tmp_path_factory) -> tuple[Path, Path]:
    """(recipe, output) of a comparison with every section, run in this process."""
    folder = tmp_path_factory.mktemp("everything")
    recipe = comparisons.write_recipe(folder / "small.yaml", comparisons.small_recipe(**EVERYTHING))
    run_here(recipe, folder / "out", root)
    compare(recipe, Console(quiet=True), output=folder / "out", data_root=root, report_only=True)
    return recipe, folder / "out"


def run_here(recipe: Path, output: Path, root: Path) -> list[str]:
    read = read_recipe(recipe)
    ids = [cell.id for cell in pending_cells(read, output, retry_failed=False)]
    answers = io.StringIO()
    serve(Store(recipe=read, output=output, data_root=root), io.StringIO("".join(f"{i}\n" for i in ids)), answers)
    return answers.getvalue().splitlines()


def results_of(output: Path, section: str) -> list[dict]:
    found = [json.loads(path.read_text()) for path in sorted((output / "cells").glob(f"{section}--*.json"))]
    assert found
    return found


def test_every_planned_cell_has_a_result_with_its_origin_and_is_small(everything):
    recipe, output = everything
    cells = plan_cells(read_recipe(recipe))
    for cell in cells:
        result = read_result(output, cell.id)
        assert result["status"] == "done" and result["origin"]["versions"]["torch"]
        assert (output / "cells" / f"{cell.id}.json").stat().st_size < 100_000
    assert pending_cells(read_recipe(recipe), output, retry_failed=True) == []


def test_all_methods_of_equal_budget_train_the_same_number_of_parameters_within_two_percent(everything):
    for result in results_of(everything[1], "main"):
        if result["cell"]["method"] in ("lora", "dora", "shadow"):
            assert result["trainable"] == pytest.approx(result["target"], rel=0.02)


def test_every_trained_method_had_the_same_number_of_trials_on_validation_rows(everything):
    results = results_of(everything[1], "search")
    assert {len(result["trials"]) for result in results} == {2}
    assert {trial["train"]["steps"] for result in results for trial in result["trials"]} == {1}


def test_a_search_never_reads_test_rows(root, tmp_path, monkeypatch):
    recipe = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", comparisons.small_recipe()))
    splits, read = set(), Store.rows

    def rows(store, name, split, limit=None):
        splits.add(split)
        return read(store, name, split, limit)

    monkeypatch.setattr(Store, "rows", rows)
    for cell in plan_cells(recipe):
        if cell.section == "search" and cell.method == "lora":
            run_cell(cell, Store(recipe=recipe, output=tmp_path, data_root=root))
    assert splits == {"train", "validation"}


def test_the_chosen_setting_is_the_one_that_the_final_runs_train_with(everything):
    """Those of the main table from its search, those of another budget from one at that budget."""
    names = ("base", "task", "method", "variant")
    found = {tuple(map(r["cell"].get, names)): r for r in results_of(everything[1], "search")}
    assert {name[3] for name in found} == {None, "10000", "14000"}
    for result in (*results_of(everything[1], "main"), *results_of(everything[1], "scaling")):
        if result["trainable"]:
            search = found[tuple(map(result["cell"].get, names))]
            assert result["setting"] == search["chosen"]
            assert result["config"]["learning_rate"] == result["setting"]["learning_rate"]
            assert search["cell"].get("parameters") == result["cell"].get("parameters")
            assert result["cell"]["needs"] == [search["id"]]


def test_scaling_without_a_search_takes_the_settings_of_the_main_table(everything):
    recipe = read_recipe(everything[0])
    settings = {**recipe.sections["scaling"], "search": False}
    changed = dataclasses.replace(recipe, sections={**recipe.sections, "scaling": settings})
    cells = [cell for cell in plan_cells(changed) if cell.section == "scaling"]
    assert {needed for cell in cells for needed in cell.needs} == {f"search--tiny--e2e--{name}" for name in ("lora", "shadow")}
    # Nothing but these cells is out of date with it.
    assert {cell.id for cell in pending_cells(changed, everything[1], retry_failed=False)} == {cell.id for cell in cells}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": "main"}, "search='main' is not valid; choose true"),
        ({"budgets": [1e5]}, "whole numbers of parameters such as 300000, not"),
        ({"budgets": ["300000"]}, "whole numbers"),
        ({"budgets": None}, "whole numbers"),
    ],
)
def test_scaling_that_cannot_be_planned_is_refused_with_the_reason(everything, settings, message):
    recipe = read_recipe(everything[0])
    scaling = {**recipe.sections["scaling"], **settings}
    with pytest.raises(ConfigError, match=message):
        plan_cells(dataclasses.replace(recipe, sections={**recipe.sections, "scaling": scaling}))


def test_the_report_shows_every_trial_and_marks_the_chosen_one(everything):
    results = results_of(everything[1], "search")
    shown = json.loads((everything[1] / "summary.json").read_text())["tables"]["search"]
    assert len(shown) == sum(len(result["trials"]) for result in results)
    chosen = [(row["base"], row["task"], row["method"], row["setting"]) for row in shown if row["is_chosen"]]
    wanted = [(*(r["cell"][n] for n in ("base", "task", "method")), r["chosen"]) for r in results]
    assert sorted(chosen, key=str) == sorted(wanted, key=str)
    for row in shown:  # only a shadow can be detached, and it is not what is chosen by
        assert (row["detached_loss"] is not None) == (row["method"] == "shadow")
    assert "## Search" in (everything[1] / "report.md").read_text()


def test_a_setting_may_give_the_shadow_a_learning_rate_of_its_own(root, tmp_path):
    recipe = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", comparisons.small_recipe()))
    store = Store(recipe=recipe, output=tmp_path, data_root=root)
    cell = next(cell for cell in plan_cells(recipe) if cell.section == "main" and cell.method == "shadow")
    settings = [{"learning_rate": rate, "shadow_lr_multiplier": 0.0} for rate in (1e-2, 1e-3)]
    one, other = (train_method(cell, store, setting, seed=0).model.network() for setting in settings)
    for name, weight in one.backbone.state_dict().items():
        assert weight.equal(other.backbone.state_dict()[name]), name
    assert not all(map(torch.equal, one.parameters(), other.parameters()))


@pytest.mark.parametrize("method", ["lora", "shadow"])
def test_heads_of_every_method_take_the_recipes_learning_rate_for_heads(root, tmp_path, method):

    def heads(multiplier: float) -> list[torch.Tensor]:
        values = comparisons.small_recipe()
        values["train"]["head_lr_multiplier"] = multiplier
        recipe = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", values))
        store = Store(recipe=recipe, output=tmp_path, data_root=root)
        cells = [cell for cell in plan_cells(recipe) if (cell.section, cell.task) == ("main", "classes")]
        cell = next(cell for cell in cells if cell.method == method)
        model = train_method(cell, store, {"learning_rate": 1e-2}, seed=0).model
        return [head for head in heads_of(model.network() if method == "shadow" else model) if head.requires_grad]

    still, moved = heads(1e-6), heads(1.0)
    assert len(moved) == (2 if method == "shadow" else 1)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(still, moved, strict=True))


def test_searches_can_be_run_alone(root, tmp_path):
    recipe = comparisons.write_recipe(tmp_path / "small.yaml", comparisons.small_recipe())
    cells = pending_cells(read_recipe(recipe), tmp_path / "out", retry_failed=False, sections=["search"])
    assert cells and {cell.section for cell in cells} == {"search"}
    plan = compare(recipe, Console(quiet=True), output=tmp_path, data_root=root, sections=["search"], plan=True)
    assert isinstance(plan, list) and {line.section for line in plan} == {"search"}


def test_all_methods_see_the_same_rows_and_steps(everything):
    results = results_of(everything[1], "main")
    for task in ("classes", "e2e"):
        own = [result for result in results if result["cell"]["task"] == task]
        assert len({result["scores"][task]["revision"] for result in own}) == 1
        trained = [result["train"] for result in own if result["train"]]
        assert len({(cost["revision"], cost["steps"]) for cost in trained}) == 1


def test_raw_generations_are_kept_beside_each_result(everything):
    for result in results_of(everything[1], "main"):
        packed = (everything[1] / "cells" / result["generations"]["file"]).read_bytes()
        rows = [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]
        models = 2 if "detached" in result else 1
        assert len(rows) == result["generations"]["rows_kept"] == 12 * models
        assert {"task", "prompt", "prediction", "extracted", "target", "score"} == set(rows[0])


def test_the_untouched_base_answers_a_classification_with_the_most_frequent_label(everything):
    result = read_result(everything[1], "main--tiny--classes--none--seed0")
    assert result["scores"]["classes"]["metrics"]["accuracy"] == result["scores"]["classes"]["majority"]
    assert result["trainable"] == 0 and result["train"] == {}


def test_transfer_scores_each_training_on_every_task_and_the_base_too(everything):
    for method in ("none", "lora", "shadow"):
        result = read_result(everything[1], f"transfer--tiny--commands--{method}--seed0")
        assert set(result["scores"]) == {"commands", "orders"}
        assert all(score["answer_loss"] > 0 for score in result["scores"].values())


def test_an_ablation_changes_one_thing_and_keeps_the_searched_setting(everything):
    unchanged = read_result(everything[1], "main--tiny--classes--shadow--seed0")
    changed = read_result(everything[1], "ablations--tiny--classes--shadow--no update--seed0")
    assert changed["setting"] == unchanged["setting"] and changed["trainable"] < unchanged["trainable"]


def test_latency_holds_merged_and_unmerged_lora_and_the_shadow_attached_and_detached(everything):
    entries = read_result(everything[1], "latency--tiny--e2e--all--seed0")["latency"]
    names = {entry["variant"] for entry in entries}
    assert {
        "base",
        "lora (merged)",
        "lora (unmerged)",
        "dora (merged)",
        "dora (unmerged)",
        "shadow (attached)",
        "shadow (attached, speculative)",
        "shadow (detached)",
    } <= names
    assert {entry["batch_size"] for entry in entries} == {1, 2}
    assert {entry["prompt_tokens"] for entry in entries} == {8}  # of both batch sizes, so they can be compared
    drafting = [entry for entry in entries if entry["variant"] == "shadow (attached, speculative)"]
    assert [entry["equal_tokens"] for entry in drafting] == [1, 1]
    assert all(1 <= entry["tokens_a_pass"] <= 3 for entry in drafting)  # of three new tokens
    assert all("tokens_a_pass" not in entry for entry in entries if entry not in drafting)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_drafting_variant_that_writes_other_tokens_is_not_timed_unless_tokens_can_be_level(dtype):
    class Other(torch.nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.dtype = dtype

        def generate(self, input_ids, speculative=None, **options):
            return torch.cat([input_ids, torch.full_like(input_ids[:, :1], 1 if speculative else 2)], 1)

    variants = {"shadow (attached)": (Other(), {}), "shadow (attached, speculative)": (Other(), {"speculative": 4})}
    batch, tokenizer = {"input_ids": torch.ones(1, 2, dtype=torch.long)}, comparisons.byte_tokenizer()
    if dtype == torch.bfloat16:
        assert latency._check_drafting(variants, batch, 1, tokenizer) == {
            "shadow (attached, speculative)": {"equal_tokens": 0.0, "tokens_a_pass": None}
        }
        return
    with pytest.raises(RuntimeError, match=r"speculative.* generates other tokens than plain decoding"):
        latency._check_drafting(variants, batch, 1, tokenizer)


def test_the_report_has_every_part_and_its_pictures(everything):
    output = everything[1]
    text = (output / "report.md").read_text()
    for heading in (
        "Main table: tiny",
        "Difference to lora: tiny",
        "Difference to dora: tiny",
        "Other metrics",
        "Transfer",
        "Scaling",
        "Ablations",
        "Latency",
        "Cost",
    ):
        assert f"## {heading}" in text
    assert "Failed and missing" not in text and "Student" in text
    assert all((output / name).stat().st_size for name in ("main.png", "scaling.png", "latency.png", "summary.json"))
    page = (output / "report.html").read_text()
    assert page.count("<table>") == text.count("\n|---") and page.count("data:image/png") == 3


def test_a_second_baseline_has_its_own_differences(everything):
    rows = main_table(gather(read_recipe(everything[0]), everything[1]))
    found = {(row["method"], row["task"] or row["mean_of"]): row for row in rows}
    to_lora, to_dora = (
        found["shadow", "classes"]["score"].value - found[other, "classes"]["score"].value for other in ("lora", "dora")
    )
    assert found["shadow", "classes"]["difference"].value == pytest.approx(to_lora)
    assert found["shadow", "classes"]["further"]["dora"].value == pytest.approx(to_dora)
    assert found["lora", "classes"]["difference"] is None and set(found["lora", "classes"]["further"]) == {"dora"}
    # Corrected for the tasks of the method, of either kind; a mean over them is one difference.
    of_tasks = [row["difference"] for row in rows if row["method"] == "shadow" and row["scored"]]
    assert len(of_tasks) > 1 and max(gap.p_holm / gap.p for gap in of_tasks if gap.p < 1) <= len(of_tasks)
    assert min(gap.p_holm for gap in of_tasks) == pytest.approx(min(1.0, len(of_tasks) * min(gap.p for gap in of_tasks)))
    assert found["shadow", "classes"]["difference"].p_holm is None


def test_a_result_says_its_seed_and_its_base_and_keeps_what_the_detached_shadow_wrote(everything):
    result = read_result(everything[1], "main--tiny--e2e--shadow--seed0")
    assert result["cell"]["seed"] == 0 and len(result["base_revision"]) == 64
    assert "seed" not in read_result(everything[1], "search--tiny--e2e--shadow")["cell"]
    lines = gzip.decompress((everything[1] / "cells" / result["generations"]["file"]).read_bytes()).decode().splitlines()
    modes = [json.loads(line).get("mode", "attached") for line in lines]
    assert modes == ["attached"] * 12 + ["detached"] * 12


def test_the_report_tells_where_a_search_ended_at_the_edge_of_its_range(everything):
    rows = search_table(gather(read_recipe(everything[0]), everything[1]))
    assert {row["is_end"] for row in rows} == {True}  # two trials have no middle
    assert "yes, the range's end" in (everything[1] / "report.md").read_text()


def test_an_ablation_stands_beside_the_unchanged_method_with_the_same_seeds(everything):
    gathered = gather(read_recipe(everything[0]), everything[1])
    (row,) = [row for row in variant_table(gathered, "ablations") if row["variant"] == "no update"]
    unchanged = read_result(everything[1], "main--tiny--classes--shadow--seed0")  # of the ablation's only seed
    assert row["unchanged"].value == pytest.approx(unchanged["scores"]["classes"]["metrics"]["accuracy"])
    assert row["unchanged_trainable"] > row["trainable"]


def test_an_ablation_can_name_the_method_it_changes(tmp_path):
    variants = {"shared": {"share_steps": True}, "other, no update": {"method": "other", "use_update": False}}
    values = comparisons.small_recipe(ablations={"tasks": ["classes"], "variants": variants})
    values["methods"]["other"] = {"kind": "shadow", "shadow": {"r": 4}}
    cells = plan_cells(read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", values)))
    found = {cell.variant: (cell.method, dict(cell.overrides), cell.needs) for cell in cells if cell.section == "ablations"}
    assert found == {
        "shared": ("shadow", {"share_steps": True}, ("search--tiny--classes--shadow",)),
        "other, no update": ("other", {"use_update": False}, ("search--tiny--classes--other",)),
    }


def test_rows_left_out_are_those_that_a_limit_takes(root, tmp_path):
    values = comparisons.small_recipe()
    stores = []
    for left_out in (0, 12):
        values["tasks"]["commands"]["leave_out"] = left_out
        recipe = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", values))
        stores.append(Store(recipe=recipe, output=tmp_path, data_root=root))
    before, rest = stores[0].rows("commands", "test", 12), stores[1].rows("commands", "test")
    positions = [next(i for i, row in enumerate(stores[0].rows("commands", "test")) if row is each) for each in before]
    assert len(before) == 12 and len(rest) == 8  # of 20 test rows
    kept = [row for i, row in enumerate(stores[0].rows("commands", "test")) if i not in positions]
    assert rest == kept and stores[0].rows("commands", "train") == stores[1].rows("commands", "train")
    values["tasks"]["commands"]["leave_out"] = 20
    recipe = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", values))
    with pytest.raises(ConfigError, match="has 20 test rows and leaves out 20: none is left"):
        Store(recipe=recipe, output=tmp_path, data_root=root).rows("commands", "test")


def test_a_single_trial_is_taken_without_a_search(root, tmp_path):
    values = comparisons.small_recipe(seeds=[0], main={"tasks": ["commands"], "methods": ["none", "lora"]})
    values["search"] = {"trials": 1}
    values["tasks"]["commands"]["trials"] = {"lora": [{"learning_rate": 0.0123}]}
    recipe = comparisons.write_recipe(tmp_path / "small.yaml", values)
    assert {cell.section for cell in plan_cells(read_recipe(recipe))} == {"main"}
    assert len(run_here(recipe, tmp_path / "out", root)) == 2
    assert read_result(tmp_path / "out", "main--tiny--commands--lora--seed0")["setting"] == {"learning_rate": 0.0123}
    compare(recipe, Console(quiet=True), output=tmp_path / "out", data_root=root, report_only=True)
    assert "nothing was searched" in (tmp_path / "out" / "report.md").read_text()


def test_methods_that_no_section_has_are_named(root, tmp_path):
    values = comparisons.small_recipe(main={"tasks": ["commands"], "methods": ["none", "lora", "shadow"]})
    recipe = comparisons.write_recipe(tmp_path / "small.yaml", values)
    said = io.StringIO()
    compare(recipe, Console(file=said, width=200), output=tmp_path / "out", data_root=root, plan=True)
    assert "in no section of the recipe, so never run: probe, dora, full" in said.getvalue()


def test_results_name_no_place_of_this_machine(everything, root):
    for path in (everything[1] / "cells").glob("*.json"):
        assert str(root) not in path.read_text() and os.getcwd() not in path.read_text()


def test_changed_settings_make_results_out_of_date(everything, tmp_path):
    changed = comparisons.small_recipe(**EVERYTHING)
    changed["methods"]["lora"] = {"dropout": 0.5}
    recipe = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", changed))
    pending = pending_cells(recipe, everything[1], retry_failed=False)
    assert {cell.method for cell in pending} == {"lora", "all"}


# ---------------------------------------------------------------- processes


def test_another_meaning_of_a_preset_makes_the_shadows_results_out_of_date_and_no_others(everything, monkeypatch):
    recipe, output = read_recipe(everything[0]), everything[1]
    preset = recipe.methods["shadow"].shadow.get("preset", "paper")
    monkeypatch.setitem(PRESETS, preset, {**PRESETS[preset], "auxiliary_loss_weight": 7.0})
    cells = pending_cells(recipe, output, retry_failed=False)
    assert {cell.method for cell in cells} == {"shadow", "all"}
    # Variants with a preset of their own too: their sizes and learning rate are found with the method's.
    assert {cell.id for cell in cells} == {cell.id for cell in plan_cells(recipe) if cell.method in ("shadow", "all")}


def test_a_field_added_since_touches_no_result_until_a_preset_sets_it(everything, monkeypatch):
    recipe, output = read_recipe(everything[0]), everything[1]
    assert all(getattr(ShadowConfig(), name) == value for name, value in ADDED.items())
    cells = plan_cells(recipe)
    before = {cell.id: fingerprint(recipe, cell) for cell in cells}
    for name in tuple(ADDED):
        monkeypatch.delitem(ADDED, name)
        assert {cell.id for cell in cells if fingerprint(recipe, cell) != before[cell.id]}  # without the rule it would
    monkeypatch.undo()
    preset = recipe.methods["shadow"].shadow.get("preset", "paper")
    monkeypatch.setitem(PRESETS, preset, {**PRESETS[preset], "alpha_rank": 4})
    pending = {cell.method for cell in pending_cells(recipe, output, retry_failed=False) if cell.section == "main"}
    assert pending == {"shadow"}


def test_another_meaning_of_a_variants_own_preset_makes_that_variant_out_of_date_and_nothing_else(everything, monkeypatch):
    recipe, output = read_recipe(everything[0]), everything[1]
    monkeypatch.setitem(PRESETS, "peft", {**PRESETS["peft"], "auxiliary_loss_weight": 7.0})
    assert {cell.variant for cell in pending_cells(recipe, output, retry_failed=False)} == {"peft"}


def test_a_preset_decides_lora_where_its_size_is_the_budget(everything, monkeypatch):
    recipe = read_recipe(everything[0])
    lora = next(cell for cell in plan_cells(recipe) if cell.method == "lora")
    without = dataclasses.replace(recipe, bases={"tiny": dataclasses.replace(recipe.bases["tiny"], parameters=None)})
    before = [fingerprint(each, lora) for each in (recipe, without)]
    monkeypatch.setitem(PRESETS, "paper", {**PRESETS["paper"], "use_update": False})
    after = [fingerprint(each, lora) for each in (recipe, without)]
    assert after[0] == before[0] and after[1] != before[1]


def test_trials_of_one_task_make_the_results_of_their_method_there_out_of_date_and_no_others(everything):
    recipe, output = read_recipe(everything[0]), everything[1]
    trials = {"lora": [{"learning_rate": 0.1}] * recipe.search.trials}
    tasks = {**recipe.tasks, "commands": dataclasses.replace(recipe.tasks["commands"], trials=trials)}
    changed = dataclasses.replace(recipe, tasks=tasks)
    pending = {cell.id for cell in pending_cells(changed, output, retry_failed=False)}
    assert pending == {cell.id for cell in plan_cells(recipe) if cell.task == "commands" and cell.method in ("lora", "all")}


def test_scaling_takes_the_budget_of_the_main_table_from_there(everything):
    """The same recipe with the base's own budget among those of scaling needs no more cells, and shows what main shows."""
    recipe, output = read_recipe(everything[0]), everything[1]
    own = recipe.bases["tiny"].parameters
    settings = {**recipe.sections["scaling"], "tasks": ["classes"], "budgets": [own], "seeds": recipe.seeds}
    changed = dataclasses.replace(recipe, sections={**recipe.sections, "scaling": settings})
    assert not [cell for cell in plan_cells(changed) if cell.section == "scaling"]
    needed = {(cell.section, cell.task, cell.method) for cell in cells_of(changed, ["scaling"])}
    assert needed == {(section, "classes", method) for section in ("search", "main") for method in ("lora", "shadow")}
    gathered = gather(changed, output)
    shown, main = variant_table(gathered, "scaling"), main_table(gathered)
    assert [entry["method"] for entry in shown] == settings["methods"]
    for entry in shown:
        same = next(each for each in main if (each["method"], each["task"]) == (entry["method"], entry["task"]))
        assert (entry["score"], entry["variant"]) == (same["score"], str(own))


def test_one_section_comes_with_what_it_is_compared_with(everything):
    recipe = read_recipe(everything[0])
    found = {(cell.section, cell.task, cell.method) for cell in cells_of(recipe, ["ablations"])}
    assert found == {(section, "classes", "shadow") for section in ("search", "main", "ablations")}
    both = {**recipe.sections, "main": {**recipe.sections["main"], "tasks": ["classes", "commands", "orders"]}}
    changed = dataclasses.replace(recipe, sections=both)
    assert {cell.task for cell in cells_of(changed, ["transfer"])} == {"commands", "orders"}


def test_a_training_that_counts_for_scaling_too_brings_only_its_own_tasks_score(everything):
    """A main cell that transfer scores on a second task: scaling has one line of it, not two."""
    recipe, output = read_recipe(everything[0]), everything[1]
    settings = {"tasks": ["commands"], "methods": ["lora"], "budgets": [recipe.bases["tiny"].parameters], "seeds": [0]}
    gathered = gather(dataclasses.replace(recipe, sections={**recipe.sections, "scaling": settings}), output)
    assert [(key.task, key.scored) for key in gathered.scores if key.section == "scaling"] == [("commands", "commands")]


def test_the_mean_is_over_tasks_of_one_kind(everything):
    rows = [row for row in main_table(gather(read_recipe(everything[0]), everything[1])) if row["method"] == "lora"]
    means = {row["mean_of"]: row for row in rows if row["task"] is None}
    scores = {row["task"]: row["score"].value for row in rows if row["task"] is not None}
    assert means["classes"]["score"].value == pytest.approx(scores["classes"]) and means["classes"]["num_tasks"] == 1
    written = [value for task, value in scores.items() if task != "classes"]
    assert means["written answers"]["score"].value == pytest.approx(sum(written) / len(written))


def test_a_search_tries_what_a_task_gives_for_its_method(root, tmp_path):
    values = comparisons.small_recipe(seeds=[0], main={"tasks": ["commands"], "methods": ["lora"]})
    given = [{"learning_rate": 0.25 + number} for number in range(values["search"]["trials"])]
    values["tasks"]["commands"] |= {"trials": {"lora": given}}
    recipe = comparisons.write_recipe(tmp_path / "small.yaml", values)
    compare(recipe, Console(quiet=True), output=tmp_path / "out", data_root=root)
    found = read_result(tmp_path / "out", "search--tiny--commands--lora")
    assert [trial["setting"] for trial in found["trials"]] == given


def test_a_crashed_cell_is_on_record_blocks_only_what_needs_it_and_is_retried_on_demand(root, tmp_path):
    values = comparisons.small_recipe(seeds=[0], main={"tasks": ["orders", "commands"], "methods": ["none", "lora"]})
    values["search"] = {"trials": 2, "share": 0.5, "limit_validation": 4, "criterion": "loss"}
    (tmp_path / "data").mkdir()
    for name in ("base", "commands"):
        (tmp_path / "data" / name).symlink_to(root / name)
    (tmp_path / "data" / "orders").mkdir()
    (tmp_path / "data" / "orders" / "train.jsonl").write_text("not JSON\n")
    recipe, output = comparisons.write_recipe(tmp_path / "small.yaml", values), tmp_path / "out"
    said = io.StringIO()
    options = {"output": output, "data_root": tmp_path / "data", "workers": 2}
    counts = compare(recipe, Console(file=said, width=200), **options)
    assert (counts.done, counts.failed, counts.skipped) == (3, 3, 0)
    failed = read_result(output, "search--tiny--orders--lora")
    assert failed["status"] == "failed" and "not valid JSON" in failed["error"][-1]
    told = [line for line in said.getvalue().splitlines() if "FAILED" in line and "not run" not in line]
    assert told and all("not valid JSON" in line for line in told), told
    blocked = read_result(output, "main--tiny--orders--lora--seed0")
    assert blocked["error"] == ["not run: search--tiny--orders--lora failed"]
    assert "Failed and missing cells" in (output / "report.md").read_text()
    assert "--retry-failed" in said.getvalue()

    again = compare(recipe, Console(quiet=True), **options)
    assert (again.done, again.failed) == (0, 0)
    (tmp_path / "data" / "orders" / "train.jsonl").unlink()
    (tmp_path / "data" / "orders").rmdir()
    (tmp_path / "data" / "orders").symlink_to(root / "orders")
    retried = compare(recipe, Console(quiet=True), retry_failed=True, **options)
    assert (retried.done, retried.failed) == (3, 0)
    assert "Failed and missing cells" not in (output / "report.md").read_text()


def test_a_cell_past_its_time_limit_is_stopped_and_recorded(root, tmp_path):
    values = comparisons.small_recipe(seeds=[0], main={"tasks": ["commands"], "methods": ["none", "lora"]})
    recipe = comparisons.write_recipe(tmp_path / "small.yaml", values)
    counts = compare(recipe, Console(quiet=True), output=tmp_path / "out", data_root=root, timeout=0.05)
    assert (counts.done, counts.failed) == (0, 3)
    stopped = read_result(tmp_path / "out", "main--tiny--commands--none--seed0")
    assert "the limit for one cell" in stopped["error"][-1]


# ---------------------------------------------------------------- plan


def test_the_plan_prints_cells_and_sizes_and_runs_nothing(root, tmp_path):
    recipe = comparisons.write_recipe(tmp_path / "small.yaml", comparisons.small_recipe(**EVERYTHING))
    said = io.StringIO()
    lines = compare(recipe, Console(file=said, width=200), output=tmp_path / "out", data_root=root, plan=True)
    assert sum(line.cells for line in lines) == len(plan_cells(read_recipe(recipe)))
    assert not any(line.problem for line in lines) and not (tmp_path / "out").exists()
    assert "trained parameters" in said.getvalue() and "without a measured step time" in said.getvalue()


def test_hours_follow_from_measured_step_times(root, tmp_path):
    values = comparisons.small_recipe(main={"tasks": ["commands"], "methods": ["lora"]})
    values["bases"]["tiny"] |= {"step_seconds": {"lora": 36.0}, "measured_on": "a test"}
    recipe = comparisons.write_recipe(tmp_path / "small.yaml", values)
    lines = compare(recipe, Console(quiet=True), output=tmp_path / "out", data_root=root, plan=True)
    hours = {line.section: line.hours for line in lines}
    assert hours == {"search": 2 * 1 * 36 / 3600, "main": 2 * 2 * 36 / 3600}


def test_a_plan_takes_step_times_from_the_results_there_are_and_says_what_is_left(everything, root, tmp_path):
    recipe, output = everything
    said = io.StringIO()
    lines = compare(recipe, Console(file=said), output=output, data_root=root, plan=True)
    assert {line.left for line in lines} == {0}
    assert "hours, 0.0 of them left" in said.getvalue() and f"the results in {output}" in said.getvalue()
    costs = [r["train"] for section in ("main", "transfer") for r in results_of(output, section) if is_lora_on_orders(r)]
    costs += [trial["train"] for r in results_of(output, "search") if is_lora_on_orders(r) for trial in r["trials"]]
    assert len(costs) > 2
    mean = sum(cost["minutes"] for cost in costs) / sum(cost["steps"] for cost in costs)
    line = next(line for line in lines if (line.section, line.task, line.method) == ("transfer", "orders", "lora"))
    assert line.hours == pytest.approx(mean / 60 * line.steps)
    fresh = compare(recipe, Console(quiet=True), output=tmp_path / "none", data_root=root, plan=True)
    assert all(line.left == line.cells for line in fresh)


def test_step_times_measured_now_go_before_results_and_those_before_the_recipes(everything, root, monkeypatch):
    recipe, output = read_recipe(everything[0]), everything[1]
    key = ("tiny", "classes", "lora")
    now = {key: StepTime(seconds=7.0, source="this machine")}
    monkeypatch.setattr("shadowpeft.evaluate.compare.command.measure_steps", lambda *args: now)
    spec = dataclasses.replace(recipe.bases["tiny"], step_seconds={"lora": 36.0}, measured_on="a test")
    timed = dataclasses.replace(recipe, bases={"tiny": spec})
    said, console = {}, Console(quiet=True)
    for name, folder, measure in (("now", output, True), ("results", output, False), ("recipe", root / "none", False)):
        store = Store(recipe=timed, output=folder, data_root=root)
        lines = show_plan(store, console, ["main"], measure=measure)
        line = next(each for each in lines if (each.base, each.task, each.method) == key and each.section == "main")
        said[name] = (line.source, line.hours)
    assert said["now"] == ("this machine", pytest.approx(7.0 * line.steps / 3600))
    assert said["results"][0] == f"the results in {output}"
    assert said["recipe"] == ("a test", pytest.approx(36.0 * line.steps / 3600))


def test_the_plan_cuts_no_name_off(root, tmp_path):
    """In a file every row is one line; in a narrow terminal a name takes several."""
    name = "an ablation whose name is longer than a narrow terminal leaves room for"
    ablations = {"tasks": ["classes"], "variants": {name: {"use_update": False}}}
    recipe = comparisons.write_recipe(tmp_path / "small.yaml", comparisons.small_recipe(ablations=ablations))
    for terminal in (False, True):
        said = io.StringIO()
        console = Console(file=said, force_terminal=terminal, no_color=True, width=None if not terminal else 80)
        compare(recipe, console, output=tmp_path / "out", data_root=root, plan=True)
        assert "…" not in said.getvalue()
        assert (name in said.getvalue()) is not terminal


def is_lora_on_orders(result: dict) -> bool:
    return (result["cell"]["task"], result["cell"]["method"]) == ("orders", "lora")


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bases": {}}, "at least one entry under 'bases'"),
        ({"basis": {}}, "did you mean"),
        ({"tasks": {"unknown": {}}}, "unknown task 'unknown'"),
        ({"methods": {"lora": {}, "shadow": {}, "magic": {}}}, "unknown kind 'magic'"),
        ({"baseline": "ia3"}, "unknown method 'ia3'"),
        ({"main": {"tasks": ["nothing"]}}, "unknown task 'nothing'"),
        ({"main": {"task": ["classes"]}}, "did you mean 'tasks'"),
        ({"methods": {"lora": {"trials": [{"learning_rate": 0.1}]}, "shadow": {}}}, "same number"),
        ({"tasks": {"trec": {"trials": {"lora": [{"learning_rate": 0.1}]}}}}, "'lora' on task 'trec' has 1 trials"),
        ({"tasks": {"trec": {"trials": {"ia3": []}}}}, "unknown method 'ia3'"),
        ({"tasks": {"trec": {"trials": {"lora": None}}}}, "must be a list of settings"),
        ({"tasks": {"trec": {"trials": {"lora": [{"learning_rat": 0.1}] * 2}}}}, "did you mean 'learning_rate'"),
        ({"tasks": {"trec": {"trials": {"lora": [{"shadow_alpha": 0.1}] * 2}}}}, "unknown key 'shadow_alpha'"),
        ({"methods": {"lora": {}, "shadow": {}, "shadow-pretrained": {}}}, "shadow_model"),
        ({"bases": {"a--b": {"path": "base"}}}, "cannot name an entry"),
        ({"methods": {"lora": {"train": {"batch_size": 8}}, "shadow": {}}}, "'lora' sets batch_size, which all methods have"),
        ({"tasks": {"trec": {"trials": {"lora": [{"max_steps": 9}] * 2}}}}, "sets max_steps, which all methods have alike"),
        ({"ablations": {"variants": {"a": {"method": "typo"}}}}, "unknown method 'typo'"),
        ({"further_baselines": ["typo"]}, "unknown method 'typo'"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_refused_with_the_reason(tmp_path, changes, message):
    path = comparisons.write_recipe(tmp_path / "small.yaml", comparisons.small_recipe(**changes))
    with pytest.raises(ConfigError, match=message):
        read_recipe(path)


def test_an_ablation_that_changes_nothing_and_scaling_of_a_fixed_size_are_refused(tmp_path):
    values = comparisons.small_recipe(ablations={"tasks": ["classes"], "variants": {"block 1": {"first_block": 1}}})
    with pytest.raises(ConfigError, match="'block 1' changes nothing"):
        plan_cells(read_recipe(comparisons.write_recipe(tmp_path / "ablation.yaml", values)))
    values = comparisons.small_recipe(scaling={"tasks": ["classes"], "methods": ["full"], "budgets": [1000]})
    with pytest.raises(ConfigError, match="cannot change the size of 'full'"):
        plan_cells(read_recipe(comparisons.write_recipe(tmp_path / "scaling.yaml", values)))


def test_transfer_of_a_classification_head_is_refused(tmp_path):
    values = comparisons.small_recipe(transfer={"tasks": ["classes", "commands"]})
    recipe = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", values))
    with pytest.raises(ConfigError, match="knows only the labels it was trained on"):
        plan_cells(recipe)


def test_searches_come_right_before_the_first_cell_that_needs_them_and_seeds_one_after_another(tmp_path):
    recipe = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", comparisons.small_recipe()))
    cells = plan_cells(recipe)
    places = {cell.id: index for index, cell in enumerate(cells)}
    assert all(places[needed] < places[cell.id] for cell in cells for needed in cell.needs)
    seeds = [cell.seed for cell in cells if cell.section == "main"]
    assert seeds == sorted(seeds)


@pytest.fixture(scope="module")
def letters(root, tmp_path_factory) -> tuple[Path, Path]:
    """(recipe, output) of tasks answered by a choice, one of them also scored after another's training."""
    folder = tmp_path_factory.mktemp("letters")
    shutil.copytree(root / "base", folder / "root" / "base")
    for name in ("easy", "hard"):
        rows = [{"subject": "s", "question": f"{name} {n}", "choices": ["a", "b"], "answer": n % 2} for n in range(80)]
        comparisons.write_rows(folder / "root" / name, rows)
    tasks = {"easy": {"task": "mmlu", "data": "easy", "score_on": ["easy", "hard"]}, "hard": {"task": "mmlu", "data": "hard"}}
    values = comparisons.small_recipe(tasks=tasks, main={"methods": ["none", "lora", "shadow"]}, seeds=[0])
    recipe = comparisons.write_recipe(folder / "small.yaml", values)
    run_here(recipe, folder / "out", folder / "root")
    compare(recipe, Console(quiet=True), output=folder / "out", data_root=folder / "root", report_only=True)
    return recipe, folder / "out"


def test_tasks_answered_by_a_choice_are_reported_with_a_mean_of_their_own(letters):
    gathered = gather(read_recipe(letters[0]), letters[1])
    assert not gathered.failed and not gathered.missing
    assert {entry["mean_of"] for entry in main_table(gathered) if entry["scored"] is None} == {"choices"}
    assert "mean of choices" in (letters[1] / "report.md").read_text()


def test_two_trainings_that_are_scored_on_one_task_have_a_column_each(letters):
    text = (letters[1] / "report.md").read_text()
    assert "| method | easy (accuracy) | hard (trained on easy) (accuracy) | hard (accuracy) | mean of choices |" in text
    table = json.loads((letters[1] / "summary.json").read_text())["tables"]["main"]
    assert sorted(e["task"] for e in table if e["method"] == "lora" and e["scored"] == "hard") == ["easy", "hard"]


def test_steps_are_measured_without_data_and_without_weights(root, tmp_path):
    values = comparisons.small_recipe(main={"tasks": ["e2e"], "methods": ["none", "lora", "shadow", "own"]}, seeds=[0])
    values["bases"]["tiny"]["config"] = json.loads((root / "base" / "config.json").read_text())
    values["tasks"]["e2e"] = {"mean_tokens": 12, "num_rows": 100}
    values["methods"]["own"] = {
        "kind": "shadow-pretrained", "shadow": {"shadow_model": "no/where"}, "shadow_shape": values["bases"]["tiny"]["config"]
    }  # fmt: skip
    recipe = comparisons.write_recipe(tmp_path / "small.yaml", values)
    lines = compare(recipe, Console(quiet=True), output=tmp_path / "out", plan=True, measure=True)
    assert isinstance(lines, list)
    hours = {line.method: line.hours for line in lines if line.section == "main"}
    assert hours["none"] == 0 and hours["own"] is None  # its weights would have to be there
    assert hours["lora"] > 0 and hours["shadow"] > 0
    assert {line.source for line in lines if line.hours} == {"this machine"}

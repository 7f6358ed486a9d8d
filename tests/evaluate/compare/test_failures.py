"""What goes wrong in a long comparison: diverged trials, other data, other settings, a full disk."""

import dataclasses
import io
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from rich.console import Console

import comparisons
from shadowpeft.errors import ConfigError, DataError
from shadowpeft.evaluate.compare import cells as cells_module
from shadowpeft.evaluate.compare import compare, read_recipe, runner
from shadowpeft.evaluate.compare.cells import run_cell
from shadowpeft.evaluate.compare.gather import gather
from shadowpeft.evaluate.compare.plan import Cell, fingerprint, plan_cells
from shadowpeft.evaluate.compare.report import write_report
from shadowpeft.evaluate.compare.results import write_failed
from shadowpeft.evaluate.compare.runner import run_cells
from shadowpeft.evaluate.compare.store import Store
from shadowpeft.files import SaveError
from shadowpeft.train.finite import NotFiniteError

pytest.importorskip("peft", reason="peft is not installed (pip install peft==0.21.2)")
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory) -> tuple[Path, Path]:
    """(recipe, output) of LoRA and a shadow on one task, two seeds."""
    folder = tmp_path_factory.mktemp("finished")
    values = comparisons.small_recipe(main={"tasks": ["commands"], "methods": ["none", "lora", "shadow"]})
    recipe = comparisons.write_recipe(folder / "small.yaml", values)
    assert compare(recipe, Console(quiet=True), output=folder / "out", data_root=root).failed == 0
    return recipe, folder / "out"


def search_cell(store: Store, method: str):
    return next(cell for cell in plan_cells(store.recipe) if (cell.section, cell.method) == ("search", method))


def copy_of(finished: tuple[Path, Path], folder: Path) -> Path:
    (folder / "cells").mkdir(parents=True)
    for file in (finished[1] / "cells").iterdir():
        (folder / "cells" / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_trial_that_diverges_loses_and_the_others_decide(finished, root, tmp_path, monkeypatch):
    store = Store(recipe=read_recipe(finished[0]), output=tmp_path, data_root=root)
    train, rates = cells_module.train_method, []

    def diverges_first(cell, store, setting, **options):
        rates.append(setting["learning_rate"])
        if len(rates) == 1:
            raise NotFiniteError("the loss is nan in step 1")
        return train(cell, store, setting, **options)

    monkeypatch.setattr(cells_module, "train_method", diverges_first)
    payload, _ = run_cell(search_cell(store, "lora"), store)
    assert payload["chosen"] == {"learning_rate": rates[1]}
    assert payload["trials"][0] == {
        "setting": {"learning_rate": rates[0]}, "metric": None, "loss": None, "train": {},
        "diverged": "the loss is nan in step 1",
    }  # fmt: skip


def test_a_search_whose_trials_all_diverge_fails_with_the_way_out(finished, root, tmp_path, monkeypatch):
    store = Store(recipe=read_recipe(finished[0]), output=tmp_path, data_root=root)

    def diverges(*args, **options):
        raise NotFiniteError("the loss is nan in step 1")

    monkeypatch.setattr(cells_module, "train_method", diverges)
    with pytest.raises(NotFiniteError, match=r"every trial of search--tiny--commands--lora diverged.*lower rates"):
        run_cell(search_cell(store, "lora"), store)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_a_search_without_a_finite_loss_chooses_nothing(finished, root, tmp_path, monkeypatch, loss):
    store = Store(recipe=read_recipe(finished[0]), output=tmp_path, data_root=root)
    monkeypatch.setattr(cells_module, "_trial", lambda *args: {"metric": 0.9, "loss": loss, "train": {}})
    with pytest.raises(NotFiniteError, match=r"every trial of search--tiny--commands--lora diverged"):
        run_cell(search_cell(store, "lora"), store)


def test_a_process_that_cannot_be_started_ends_the_run_with_the_reason(finished, tmp_path):
    """Two workers: one would wait for the other's search for ever."""
    recipe = read_recipe(finished[0])
    cells = plan_cells(recipe)
    with pytest.raises(FileNotFoundError):
        run_cells(recipe, cells, tmp_path, ["/no/such/program"], workers=2, threads=1, timeout=1.0, tell=lambda line: None)


def test_latencies_are_timed_with_nothing_beside():
    timed = Cell(section="latency", base="b", task="t", method="all")
    others = [Cell(section="main", base="b", task="t", method="lora", seed=seed) for seed in range(2)]
    queue = runner.Queue(pending=[others[0], timed, others[1]])
    first, second = queue.take(), queue.take()
    assert (first, second) == (others[0], others[1])  # the timed cell waits
    queue.finish(first, is_failed=False)
    queue.finish(second, is_failed=False)
    assert queue.take() == timed
    queue.pending.append(others[0])
    waiting = threading.Thread(target=queue.take, daemon=True)
    waiting.start()
    waiting.join(timeout=0.2)  # seconds; it must not get a cell
    assert waiting.is_alive() and queue.pending == [others[0]]
    queue.finish(timed, is_failed=False)
    waiting.join(timeout=60)
    assert queue.pending == []


@pytest.mark.parametrize("what", ["test", "training"])
def test_a_result_on_other_rows_than_the_rest_is_kept_apart_and_said(finished, tmp_path, what):
    output = copy_of(finished, tmp_path / "out")
    changed = output / "cells" / "main--tiny--commands--lora--seed1.json"
    result = json.loads(changed.read_text())
    if what == "test":
        result["scores"]["commands"]["revision"] = "0" * 64
    else:
        result["train"]["revision"] = "0" * 64
    changed.write_text(json.dumps(result))
    gathered = gather(read_recipe(finished[0]), output)
    ((cell, failed),) = gathered.failed
    assert cell.id == changed.stem
    assert failed["error"][-1].startswith(f"{what} rows of commands")
    assert f"are not those of the other cells; delete {changed.name}" in failed["error"][-1]
    assert all(sorted(seeds) == [0] for key, seeds in gathered.scores.items() if key.method == "lora")
    write_report(read_recipe(finished[0]), output)
    lora, shadow = (
        next(line for line in (output / "report.md").read_text().splitlines() if line.startswith(f"| {name} |"))
        for name in ("lora", "shadow")
    )
    assert "(seeds: 1)" in lora and "seeds:" not in shadow  # it has the two that are planned


@pytest.mark.parametrize("what", ["validation rows of commands (at most 8)", "weights of tiny"])
def test_a_result_of_another_search_or_base_is_kept_apart_and_said(finished, tmp_path, what):
    output = copy_of(finished, tmp_path / "out")
    is_search = what.startswith("validation")
    name = "search--tiny--commands--shadow" if is_search else "main--tiny--commands--lora--seed1"
    changed = output / "cells" / f"{name}.json"
    result = json.loads(changed.read_text())
    result["validation_revision" if is_search else "base_revision"] = "0" * 64
    changed.write_text(json.dumps(result))
    ((cell, failed),) = gather(read_recipe(finished[0]), output).failed
    assert cell.id == changed.stem and failed["error"][-1].startswith(f"{what} are not those of the other cells")


def test_a_base_with_fewer_rows_of_its_own_is_no_other_data(root, tmp_path):
    values = comparisons.small_recipe(seeds=[0], main={"tasks": ["commands"], "methods": ["none", "lora"]})
    values["bases"]["short"] = {**values["bases"]["tiny"], "train": {"limit_eval": 5, "limit_train": 20}}
    recipe = comparisons.write_recipe(tmp_path / "small.yaml", values)
    compare(recipe, Console(quiet=True), output=tmp_path / "out", data_root=root)
    gathered = gather(read_recipe(recipe), tmp_path / "out")
    assert not gathered.failed and not gathered.missing
    assert {(key.base, next(iter(scores.values()))["n"]) for key, scores in gathered.scores.items()} == {
        ("tiny", 12), ("short", 5)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("train", "shadow", "message"),
    [
        ({"dtype": "auto"}, {}, "is stored in float16"),
        ({"dtype": "float16"}, {"adapter_dtype": "base"}, "would be trained in float16"),
    ],
)
def test_float16_is_not_trained_without_a_scaler_here_either(root, tmp_path, train, shadow, message):
    comparisons.write_base(tmp_path / "root" / "base", dtype=torch.float16)
    (tmp_path / "root" / "commands").symlink_to(root / "commands")
    values = comparisons.small_recipe(seeds=[0], main={"tasks": ["commands"], "methods": ["shadow"]})
    values["train"] |= train
    values["methods"]["shadow"]["shadow"] |= shadow
    recipe = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", values))
    store = Store(recipe=recipe, output=tmp_path, data_root=tmp_path / "root")
    with pytest.raises(ConfigError, match=message):
        run_cell(search_cell(store, "shadow"), store)


def test_a_final_run_takes_no_setting_from_a_search_of_other_settings(finished, root):
    recipe = read_recipe(finished[0])
    changed = dataclasses.replace(recipe, search=dataclasses.replace(recipe.search, share=0.9))
    store = Store(recipe=changed, output=finished[1], data_root=root)
    cell = next(cell for cell in plan_cells(changed) if (cell.section, cell.method) == ("main", "lora"))
    with pytest.raises(ConfigError, match="search--tiny--commands--lora was made with other settings than the recipe has"):
        store.setting(cell, "lora")


def test_workers_go_on_with_the_recipe_as_it_was(root, tmp_path, monkeypatch):
    """The file is rewritten after the run began and before the first worker reads it."""
    values = comparisons.small_recipe(seeds=[0], main={"tasks": ["commands"], "methods": ["none"]})
    recipe = comparisons.write_recipe(tmp_path / "small.yaml", values)
    start = runner.Worker._start

    def edit_then_start(worker):
        comparisons.write_recipe(recipe, {**values, "main": {"tasks": ["orders"], "methods": ["none"]}})
        start(worker)

    monkeypatch.setattr(runner.Worker, "_start", edit_then_start)
    counts = compare(recipe, Console(quiet=True), output=tmp_path / "out", data_root=root)
    assert (counts.done, counts.failed) == (1, 0)
    assert (tmp_path / "out" / "cells" / "main--tiny--commands--none--seed0.json").exists()


def test_a_failure_that_cannot_be_written_down_ends_the_run_with_the_reason(finished, tmp_path, monkeypatch):
    """Two workers: one would wait for the other's search for ever."""
    recipe = read_recipe(finished[0])

    def full(*args):
        raise SaveError("no space left")

    monkeypatch.setattr(runner, "write_failed", full)
    monkeypatch.setattr(runner.Worker, "run", lambda worker, cell: "died")
    found = []

    def run():
        cells = plan_cells(recipe)
        try:
            run_cells(recipe, cells, tmp_path, [], workers=2, threads=1, timeout=1.0, tell=lambda line: None)
        except SaveError as error:
            found.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=60)  # seconds; nothing is run, so it ends at once
    assert not thread.is_alive() and found == ["no space left"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"trials": 2, "criterion": "accuracy"}}, "criterion='accuracy' is not valid; choose 'metric' or 'loss'"),
        ({"latency": {}}, "'latency' has no 'task'"),
        ({"latency": {"task": "typo"}}, "unknown task 'typo'"),
        ({"ablations": {"tasks": ["classes"]}}, "'ablations' has no 'variants'"),
        ({"ablations": {"method": "typo", "variants": {"a": {"use_update": False}}}}, "unknown method 'typo'"),
        ({"scaling": {"tasks": ["classes"]}}, "'scaling' has no 'budgets'"),
        ({"methods": ["lora", "shadow"]}, r"methods must hold `key: value` lines, not a list"),
        ({"bases": {"small": "models/x"}}, r"small must hold `key: value` lines, not a str"),
        ({"main": ["classes"]}, r"main must hold `key: value` lines, not a list"),
        ({"seeds": 3}, r"seeds must be a list of whole numbers of at least 0 such as \[0\], not 3"),
        ({"main": {"seeds": ["a"]}}, r"the seeds of section 'main' must be a list of whole numbers"),
        ({"latency": {"task": "classes"}}, "latency cannot time 'classes': a classifier writes nothing"),
        ({"latency": {"task": "e2e", "methods": ["full"]}}, "latency cannot time 'full'"),
        ({"latency": {"task": "e2e", "new_tokens": 1}}, "new_tokens=1 is not valid: expected a whole number of at least 2"),
        ({"latency": {"task": "e2e", "batch_sizes": 8}}, "latency: batch_sizes must be a list of whole numbers"),
        ({"train": {"max_step": 2}}, "did you mean 'max_steps'"),
    ],
)
def test_a_recipe_that_would_fail_cell_by_cell_is_refused_at_once(tmp_path, changes, message):
    path = comparisons.write_recipe(tmp_path / "small.yaml", comparisons.small_recipe(**changes))
    with pytest.raises(ConfigError, match=message):
        read_recipe(path)


def test_settings_that_are_no_numbers_are_reported_too(finished, tmp_path):
    output = copy_of(finished, tmp_path / "out")
    for name in ("main--tiny--commands--shadow--seed0", "search--tiny--commands--shadow"):
        file = output / "cells" / f"{name}.json"
        result = json.loads(file.read_text())
        chosen = {"learning_rate": 0.001, "inject_activation": "none"}
        result |= {"setting": chosen} if "setting" in result else {"chosen": chosen}
        file.write_text(json.dumps(result))
    compare(finished[0], Console(quiet=True), output=output, report_only=True)
    assert "learning_rate 0.001, inject_activation none" in (output / "report.md").read_text()


def test_a_recipe_without_a_section_has_nothing_to_run_and_says_so(tmp_path):
    values = comparisons.small_recipe()
    del values["main"]
    with pytest.raises(ConfigError, match=r"has no section, so there is nothing to run; add 'main: \{\}'"):
        read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", values))


def test_an_empty_train_is_none(tmp_path):
    assert read_recipe(comparisons.write_recipe(tmp_path / "a.yaml", comparisons.small_recipe(train=None))).train == {}


def test_a_classification_cannot_be_scored_on_another_task(tmp_path):
    values = comparisons.small_recipe()
    values["tasks"]["classes"]["score_on"] = ["classes", "e2e"]
    with pytest.raises(ConfigError, match="task 'classes' cannot be scored on 'e2e': a classification head knows only"):
        read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", values))


def test_what_was_trained_with_another_setting_than_its_search_has_chosen_is_out_of_date(finished, tmp_path):
    output = copy_of(finished, tmp_path / "out")
    recipe = read_recipe(finished[0])
    file = output / "cells" / "search--tiny--commands--lora.json"
    result = json.loads(file.read_text())
    (other,) = [trial["setting"] for trial in result["trials"] if trial["setting"] != result["chosen"]]
    file.write_text(json.dumps(result | {"chosen": other}))
    lora = {f"main--tiny--commands--lora--seed{seed}" for seed in (0, 1)}
    assert {cell.id for cell in gather(recipe, output).missing} == lora
    assert {cell.id for cell in runner.pending_cells(recipe, output, retry_failed=False)} == lora


def test_two_comparisons_do_not_share_a_folder(finished, tmp_path):
    lock = FileLock(tmp_path / ".lock")
    with lock, pytest.raises(ConfigError, match=r"another comparison is running in .*--workers"):
        compare(finished[0], Console(quiet=True), output=tmp_path)
    assert not (tmp_path / "cells").exists()


def test_a_result_of_other_rows_is_not_said_to_be_tried_again(finished, root, tmp_path):
    output = copy_of(finished, tmp_path / "out")
    file = output / "cells" / "main--tiny--commands--lora--seed1.json"
    result = json.loads(file.read_text())
    result["scores"]["commands"]["revision"] = "0" * 64
    file.write_text(json.dumps(result))
    said = Console(record=True, width=400, file=io.StringIO())
    compare(finished[0], said, output=output, data_root=root, report_only=True)
    text = said.export_text()
    assert "1 of the failed were made of other data than the rest" in text and "--retry-failed" not in text


def test_seeds_that_diverged_are_counted_beside_the_mean_of_the_others(finished, tmp_path):
    output = copy_of(finished, tmp_path / "out")
    recipe = read_recipe(finished[0])
    cell = next(c for c in plan_cells(recipe) if (c.section, c.method, c.seed) == ("main", "lora", 1))
    why = "...\nshadowpeft.train.finite.NotFiniteError: the loss is nan in step 1"
    write_failed(output, cell, fingerprint(recipe, cell), why)
    write_report(recipe, output)
    lines = (output / "report.md").read_text().splitlines()
    assert "(seeds: 1) (diverged: 1)" in next(line for line in lines if line.startswith("| lora |"))
    assert "diverged" not in next(line for line in lines if line.startswith("| shadow |"))


def test_data_is_looked_for_where_the_recipe_says_before_it_comes_from_the_hub(root, tmp_path, monkeypatch, caplog):
    recipe = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", comparisons.small_recipe()))
    store = Store(recipe=recipe, output=tmp_path)
    monkeypatch.chdir(root)
    assert store._source("e2e") == Path("e2e")
    monkeypatch.chdir(tmp_path)
    assert store._source("e2e") is None and "there is no e2e and no --data-root" in caplog.text
    with pytest.raises(ConfigError, match="pass --data-root FOLDER"):  # no data set of the hub
        store._source("commands")


def test_a_label_that_training_never_sees_is_found_before_training(root, tmp_path, monkeypatch):
    for name in ("base", "classes"):
        shutil.copytree(root / name, tmp_path / "root" / name)
    with (tmp_path / "root" / "classes" / "test.jsonl").open("a") as file:
        file.write(json.dumps({"text": "what is this", "label": "unheard"}) + "\n")
    values = comparisons.small_recipe(seeds=[0], main={"tasks": ["classes"], "methods": ["lora"]})
    values["train"]["limit_eval"] = 1000
    recipe = read_recipe(comparisons.write_recipe(tmp_path / "small.yaml", values))
    monkeypatch.setattr(cells_module, "train_method", lambda *args, **options: pytest.fail("trained"))
    cell = next(cell for cell in plan_cells(recipe) if cell.section == "main")
    with pytest.raises(DataError, match="the label 'unheard' is not among those of the training rows"):
        run_cell(cell, Store(recipe=recipe, output=tmp_path, data_root=tmp_path / "root"))

"""From a recipe to a list of cells, in an order that gives a balanced table at any time."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from shadowpeft.core import ShadowConfig
from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.compare.budget import shadow_config
from shadowpeft.evaluate.compare.recipe import ADAPTERS, BaseSpec, MethodSpec, Recipe, TaskSpec, methods_of, shadow_settings
from shadowpeft.train.tasks import TASKS

# Fields of ShadowConfig that came after the first results, with the value at which they change nothing.
ADDED = {"alpha_rank": None, "inject_between": "blocks", "inject_branch": False}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One result file: a search, one training with its scores, or one base's latencies.

    Attributes:
        section: search, main, transfer, scaling, ablations or latency.
        variant: what differs from the main table's cell, or its search's; empty there.
        score_on: task entries that are scored.
        overrides: fields of ``ShadowConfig`` that the variant changes after sizes are solved.
        parameters: budget without heads; None: the base's.
        needs: ids of the searches that must be done first.
        score_detached: also score the stand-alone shadow.
    """

    section: str
    base: str
    task: str
    method: str
    seed: int = 0
    variant: str = ""
    score_on: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Any], ...] = ()
    parameters: int | None = None
    needs: tuple[str, ...] = ()
    score_detached: bool = False

    @property
    def id(self) -> str:
        parts = (self.section, self.base, self.task, self.method, self.variant)
        return "--".join([part for part in parts if part] + ([] if self.section == "search" else [f"seed{self.seed}"]))


def plan_cells(recipe: Recipe) -> list[Cell]:
    """All cells: section by section, in it seed by seed, all methods of a task next to each other, and searches right
    in front of what needs them. Whatever is done at any time compares like with like.

    Raises:
        ConfigError: a section that the recipe's entries cannot serve.
    """
    main, scaling = _main(recipe), scaling_cells(recipe)
    there = {variant.id for cell in main for variant in scaling if is_same_training(recipe, cell, variant)}
    cells = [
        *main,
        *(cell for cell in scaling if cell.id not in there),
        *_ablations(recipe),
        *_latency(recipe),
    ]
    rank = {name: index for index, name in enumerate(("main", "transfer", "ablations", "scaling", "latency"))}
    ordered = sorted(cells, key=lambda cell: (rank[cell.section], cell.seed))
    return _with_searches(ordered)


def cells_of(recipe: Recipe, sections: list[str] | None) -> list[Cell]:
    """All cells of some sections (all, if none are named): also what these take from the main table, and needed searches.

    Scaling takes the main table's trainings at the base's own budget, transfer those of tasks that both have, ablations the
    unchanged method.
    """
    cells = plan_cells(recipe)
    if not sections:
        return cells
    wanted = {cell.id for cell in cells if cell.section in sections}
    main = [cell for cell in cells if cell.section == "main"]
    if "scaling" in sections:
        variants = scaling_cells(recipe)
        wanted |= {cell.id for cell in main for variant in variants if is_same_training(recipe, cell, variant)}
    if "transfer" in sections:
        tasks = _entries(recipe.sections.get("transfer", {}), "tasks", recipe.tasks)
        wanted |= {cell.id for cell in main if cell.task in tasks and set(tasks) <= set(cell.score_on)}
    if "ablations" in sections:
        changed = {(cell.base, cell.task, cell.method, cell.seed) for cell in cells if cell.section == "ablations"}
        wanted |= {cell.id for cell in main if (cell.base, cell.task, cell.method, cell.seed) in changed}
    needed = {each for cell in cells if cell.id in wanted for each in cell.needs}
    return [cell for cell in cells if cell.id in wanted | needed]


def is_same_training(recipe: Recipe, cell: Cell, variant: Cell) -> bool:
    """Whether a cell of the main table trains what a scaling cell would: the same, at the base's own budget."""
    of_cell, of_variant = ((one.base, one.task, one.method, one.seed) for one in (cell, variant))
    is_own_budget = variant.parameters == recipe.bases[cell.base].parameters
    return cell.section in ("main", "transfer") and of_cell == of_variant and is_own_budget


def _main(recipe: Recipe) -> list[Cell]:
    """Cells of the main table, and of transfer: the same training scored on more tasks, where both ask for it."""
    chosen: dict[tuple, Cell] = {}
    for section in ("main", "transfer"):
        settings = recipe.sections.get(section)
        if settings is None:
            continue
        tasks = _entries(settings, "tasks", recipe.tasks)
        if section == "transfer":
            _check_transfer(recipe, tasks)
        seeds = settings.get("seeds", recipe.seeds)
        for seed in seeds:
            for base in _entries(settings, "bases", recipe.bases):
                for task in tasks:
                    own = recipe.tasks[task].score_on or (task,)
                    for method in methods_of(recipe, section):
                        key = (base, task, method, seed)
                        if not _applies(recipe, task, method) or (recipe.is_untrained(method) and seed != seeds[0]):
                            continue
                        before = chosen.get(key)
                        scored = (*(before.score_on if before else ()), *own, *(tasks if section == "transfer" else ()))
                        chosen[key] = Cell(
                            section=before.section if before else section,
                            base=base,
                            task=task,
                            method=method,
                            seed=seed,
                            score_on=tuple(dict.fromkeys(scored)),
                            needs=_search_ids(recipe, base, task, [method]),
                            score_detached=bool(settings.get("score_detached") or (before and before.score_detached)),
                        )
    return list(chosen.values())


def _check_transfer(recipe: Recipe, tasks: Iterable[str]) -> None:
    for task in tasks:
        if TASKS[recipe.tasks[task].task].kind == "classification":
            raise ConfigError(
                f"transfer cannot score {task!r}: a classification head knows only the labels it was trained on; "
                "choose tasks that are answered by text"
            )


def scaling_cells(recipe: Recipe) -> list[Cell]:
    """All cells of the section, those included that the main table trains."""
    settings = recipe.sections.get("scaling")
    if settings is None:
        return []
    methods = methods_of(recipe, "scaling")
    for name in methods:
        if recipe.methods[name].kind not in ADAPTERS or recipe.methods[name].budget != "equal":
            raise ConfigError(f"scaling cannot change the size of {name!r}: choose LoRA, DoRA or a shadow of equal budget")
    is_searched, budgets = settings.get("search", True), settings.get("budgets")
    if not isinstance(is_searched, bool):
        raise ConfigError(f"scaling: search={is_searched!r} is not valid; choose true (each budget has its own) or false")
    if not isinstance(budgets, list) or not all(type(each) is int for each in budgets):
        raise ConfigError(f"scaling: budgets must be whole numbers of parameters such as 300000, not {budgets!r}")

    def variant_of_search(base: str, parameters: int) -> str:
        return f"{parameters}" if is_searched and parameters != recipe.bases[base].parameters else ""

    return [
        Cell(
            section="scaling",
            base=base,
            task=task,
            method=method,
            seed=seed,
            variant=f"{parameters}",
            parameters=parameters,
            score_on=recipe.tasks[task].score_on or (task,),
            needs=_search_ids(recipe, base, task, [method], variant_of_search(base, parameters)),
        )
        for seed in settings.get("seeds", recipe.seeds)
        for base in _entries(settings, "bases", recipe.bases)
        for task in _entries(settings, "tasks", recipe.tasks)
        for parameters in budgets
        for method in methods
        if _applies(recipe, task, method)
    ]


def _ablations(recipe: Recipe) -> list[Cell]:
    settings = recipe.sections.get("ablations")
    if settings is None:
        return []
    usual = settings.get("method", recipe.reference)
    variants = {name: (changes.get("method", usual), _changed(changes)) for name, changes in settings["variants"].items()}
    for name, (method, overrides) in variants.items():
        _check_variant(name, recipe.methods[method], overrides)
    return [
        Cell(
            section="ablations",
            base=base,
            task=task,
            method=method,
            seed=seed,
            variant=name,
            overrides=tuple(sorted(overrides.items())),
            score_on=recipe.tasks[task].score_on or (task,),
            needs=_search_ids(recipe, base, task, [method]),
        )
        for seed in settings.get("seeds", recipe.seeds)
        for base in _entries(settings, "bases", recipe.bases)
        for task in _entries(settings, "tasks", recipe.tasks)
        for name, (method, overrides) in variants.items()
    ]


def _changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``ShadowConfig`` that a variant changes, without the method it changes them of."""
    return {name: value for name, value in changes.items() if name != "method"}


def _check_variant(name: str, spec: MethodSpec, overrides: dict[str, Any]) -> None:
    """Refuses a variant that changes nothing: it would be the main table's training under another name."""
    if not spec.kind.startswith("shadow"):
        raise ConfigError(f"ablations change fields of ShadowConfig; their method is of kind {spec.kind!r}, not a shadow")
    if shadow_config(spec, is_classifier=False, **overrides) == shadow_config(spec, is_classifier=False):
        raise ConfigError(f"ablation {name!r} changes nothing: the method has {overrides} already; leave it out")


def _latency(recipe: Recipe) -> list[Cell]:
    settings = recipe.sections.get("latency")
    if settings is None:
        return []
    task = settings["task"]
    return [
        Cell(
            section="latency",
            base=base,
            task=task,
            method="all",
            seed=recipe.seeds[0],
            needs=_search_ids(recipe, base, task, methods_of(recipe, "latency")),
        )
        for base in _entries(settings, "bases", recipe.bases)
    ]


def _entries(settings: dict[str, Any], key: str, default: Iterable[str]) -> list[str]:
    return list(settings.get(key, default))


def _applies(recipe: Recipe, task: str, method: str) -> bool:
    """A linear probe needs labels; everything else fits every task."""
    return recipe.methods[method].kind != "probe" or TASKS[recipe.tasks[task].task].kind == "classification"


def _search_ids(recipe: Recipe, base: str, task: str, methods: Iterable[str], variant: str = "") -> tuple[str, ...]:
    if recipe.search.trials <= 1:
        return ()
    return tuple(
        Cell(section="search", base=base, task=task, method=method, variant=variant).id
        for method in methods
        if not recipe.is_untrained(method)
    )


def _with_searches(cells: list[Cell]) -> list[Cell]:
    """Each search once, right in front of the first cell that needs it."""
    ordered: dict[str, Cell] = {}
    for cell in cells:
        for needed in cell.needs:
            ordered.setdefault(needed, search_of(cell, needed))
        ordered[cell.id] = cell
    return list(ordered.values())


def search_of(cell: Cell, needed: str) -> Cell:
    """The search of an id: at the budget of the cell that needs it where it is the search of a variant."""
    _, base, task, method, *variant = needed.split("--")
    found = Cell(section="search", base=base, task=task, method=method)
    return dataclasses.replace(found, variant=variant[0], parameters=cell.parameters) if variant else found


def fingerprint(recipe: Recipe, cell: Cell) -> str:
    """Hash of all settings that decide a cell's result; a result with another one is out of date."""
    names = methods_of(recipe, "latency") if cell.section == "latency" else [cell.method]
    methods = {name: recipe.methods[name] for name in names}
    base = recipe.bases[cell.base]
    parts = {
        "cell": dataclasses.asdict(cell),
        "train": recipe.train,
        "base": _without(dataclasses.asdict(base), "step_seconds", "step_tokens", "measured_on"),
        "tasks": {name: _that_counts(recipe.tasks[name]) for name in {cell.task, *cell.score_on}},
        "methods": {name: dataclasses.asdict(spec) for name, spec in methods.items()},
        "reference": _decides_size(recipe.methods[recipe.reference], is_given=_is_given(recipe, cell)),
        "tolerance": recipe.tolerance,
        "search": dataclasses.asdict(recipe.search),
        "latency": recipe.sections.get("latency") if cell.section == "latency" else None,
    }
    if any(_trains_otherwise_than_before(recipe, cell, name) for name in methods):
        parts["training"] = 2
    trials = {name: recipe.tasks[cell.task].trials[name] for name in methods if name in recipe.tasks[cell.task].trials}
    if trials:
        parts["trials"] = trials
    # The recipe has a preset's name only; what the name stands for can change.
    presets = {name: _preset(spec, base) for name, spec in methods.items() if spec.kind.startswith("shadow")}
    if presets:
        parts["presets"] = presets
    if "preset" in dict(cell.overrides):  # trained with its own, but sized and searched with the method's
        parts["own preset"] = _as_before(ShadowConfig.preset(dict(cell.overrides)["preset"]))
    if not _is_given(recipe, cell):  # the budget is the reference's size
        parts["size of"] = _preset(recipe.methods[recipe.reference], base)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _trains_otherwise_than_before(recipe: Recipe, cell: Cell, method: str) -> bool:
    """Whether results of the first version are of another training: trained weights were as narrow as the base, and the
    gradients of transformers' classifiers grew with the batches that were accumulated. A shadow's were right.
    """
    if recipe.is_untrained(method) or recipe.methods[method].kind.startswith("shadow"):
        return False
    config = recipe.train_config(cell.base, cell.task, method)
    is_class = TASKS[recipe.tasks[cell.task].task].kind == "classification"
    return config.dtype != "float32" or (is_class and config.gradient_accumulation > 1)


def _is_given(recipe: Recipe, cell: Cell) -> bool:
    """Whether a cell's budget is a number of its own, and not the size of the reference method."""
    return cell.parameters is not None or recipe.bases[cell.base].parameters is not None


def _decides_size(reference: MethodSpec, *, is_given: bool) -> dict[str, Any]:
    """What the budget reads of the reference method: under a given number, how many heads that is to be added for."""
    return {"kind": reference.kind} if is_given else _without(dataclasses.asdict(reference), "trials", "train")


def _that_counts(task: TaskSpec) -> dict[str, Any]:
    """What decides a result. Another method's trials do not, nor does what ``--plan`` alone reads."""
    return _without(dataclasses.asdict(task), "trials", "num_labels", "num_rows", "mean_tokens")


def _without(told: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in told.items() if name not in names}


def _preset(spec: MethodSpec, base: BaseSpec) -> dict[str, Any]:
    """What a method's preset on a base stands for."""
    return _as_before(ShadowConfig.preset(shadow_settings(spec, base).get("preset", "paper")))


def _as_before(config: ShadowConfig) -> dict[str, Any]:
    """All fields, without those added since where they change nothing: results from before stay what they are."""
    return {name: value for name, value in config.to_dict().items() if name not in ADDED or value != ADDED[name]}

"""What a comparison consists of, as one YAML file."""

import itertools
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from shadowpeft.core.config import IMPLICIT_SIZES, ShadowConfig, check_keys, require
from shadowpeft.errors import ConfigError
from shadowpeft.train.config import TrainConfig, as_mapping, read_yaml
from shadowpeft.train.tasks import TASKS

KINDS = ("none", "probe", "lora", "dora", "shadow", "shadow-pretrained", "full")
ADAPTERS = ("lora", "dora", "shadow")
# What every method has alike; a method or one of its trials that had its own would be compared with others' training.
EQUAL = frozenset(
    {"base", "task", "data", "output", "resume", "max_steps", "epochs", "batch_size", "gradient_accumulation", "max_length",
     "limit_train", "limit_eval", "seed", "dtype"}
)  # fmt: skip
DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class BaseSpec:
    """A base.

    Attributes:
        path: folder below the data root, hub name, or ``embedded``.
        config: a transformers config as a mapping; ``--plan`` then needs neither files nor network.
        parameters: the budget without classification heads; None: the size of the reference method.
        train: fields of ``TrainConfig`` for this base.
        shadow: fields of ``ShadowConfig`` for shadows on this base, such as their number of heads; a method's own win.
        step_seconds: method -> measured seconds of one optimizer step, for ``--plan``.
        step_tokens: tokens of the step that was measured; a task's step is taken to cost in proportion. None: as long as here.
        measured_on: what measured them.
    """

    path: str
    config: dict[str, Any] | None = None
    parameters: int | None = None
    train: dict[str, Any] = field(default_factory=dict)
    shadow: dict[str, Any] = field(default_factory=dict)
    step_seconds: dict[str, float] = field(default_factory=dict)
    step_tokens: int | None = None
    measured_on: str | None = None


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """A task.

    Attributes:
        task: name in ``TASKS``; default: the entry's own name.
        data: folder or file below the data root; None: the hub.
        score_on: entries scored after training; default: this one.
        train: fields of ``TrainConfig`` for this task (``limit_train`` and ``limit_eval`` among them).
        trials: method -> settings to try here instead of the method's own, for tasks whose best settings lie elsewhere.
        leave_out: test rows that a ``limit_eval`` of this size takes are left out, so that what was found on them can be
            confirmed on others.
        num_labels, num_rows, mean_tokens: what ``--plan`` assumes without reading the data.
    """

    task: str
    data: str | None = None
    score_on: tuple[str, ...] = ()
    train: dict[str, Any] = field(default_factory=dict)
    trials: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    leave_out: int = 0
    num_labels: int | None = None
    num_rows: int | None = None
    mean_tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method.

    Attributes:
        kind: one of ``KINDS``; default: the entry's own name.
        budget: ``equal`` (sizes are solved for) or ``own`` (sizes are as given).
        targets: modules that LoRA and DoRA adapt.
        r: rank of LoRA and DoRA under an ``own`` budget.
        scale: alpha / r of LoRA and DoRA.
        dropout: of LoRA and DoRA.
        shadow: fields of ``ShadowConfig``, and ``preset``.
        shadow_shape: a transformers config of a pretrained shadow, so that ``--plan`` needs no files of it.
        train: fields of ``TrainConfig`` for this method, but for those that all methods have alike (``EQUAL``).
        trials: settings to try in the search, each ``{"learning_rate": ..., "shadow_alpha": ...}``; default: a
            spread over the method's usual range.
    """

    kind: str
    budget: str = "equal"
    targets: tuple[str, ...] = DEFAULT_TARGETS
    r: int = 16
    scale: float = 1.0
    dropout: float = 0.05
    shadow: dict[str, Any] = field(default_factory=dict)
    shadow_shape: dict[str, Any] | None = None
    train: dict[str, Any] = field(default_factory=dict)
    trials: tuple[dict[str, float], ...] = ()


def shadow_settings(method: MethodSpec, base: BaseSpec) -> dict[str, Any]:
    """Fields of ``ShadowConfig``, and ``preset``, of a method on a base: the base's where the method has none of its own, but
    for sizes where the method has a shadow that brings its own."""
    shadow = {**base.shadow, **method.shadow}
    is_implicit = shadow.get("shadow_model", "implicit") == "implicit"
    return {name: value for name, value in shadow.items() if is_implicit or name in method.shadow or name not in IMPLICIT_SIZES}


@dataclass(frozen=True, kw_only=True)
class SearchSpec:
    """The search every trained method gets: ``trials`` short runs, scored on validation rows.

    Attributes:
        trials: runs of each method; with 1 (or 0) nothing is searched, and a method's only setting is taken.
        share: part of the full run's optimizer steps that a trial takes.
        limit_validation: validation rows scored.
        criterion: ``metric`` (the task's headline; ties go to the lower loss) or ``loss``.
        seed: of the trials; no final run uses it.
    """

    trials: int = 3
    share: float = 0.34
    limit_validation: int = 200
    criterion: str = "metric"
    seed: int = 1000


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole comparison.

    Attributes:
        reference: method whose size is the budget.
        baseline: method that differences are taken to.
        further_baselines: more of them, each with a table of its own.
        sections: main, transfer, scaling, ablations and latency -> their own settings.
    """

    name: str
    bases: dict[str, BaseSpec]
    tasks: dict[str, TaskSpec]
    methods: dict[str, MethodSpec]
    seeds: tuple[int, ...] = (0, 1, 2)
    reference: str = "shadow"
    baseline: str = "lora"
    further_baselines: tuple[str, ...] = ()
    tolerance: float = 0.02
    train: dict[str, Any] = field(default_factory=dict)
    search: SearchSpec = SearchSpec()
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)

    def is_untrained(self, method: str) -> bool:
        """Whether a method is the untouched base; the name of a detached shadow is no entry, and so is none."""
        return method in self.methods and self.methods[method].kind == "none"

    def train_config(self, base: str, task: str, method: str, **changes: Any) -> TrainConfig:
        """Settings of one run: the recipe's, then the task's, the base's, the method's, then ``changes``."""
        parts = (self.train, self.tasks[task].train, self.bases[base].train, self.methods[method].train, changes)
        merged = {key: value for part in parts for key, value in part.items()}
        return TrainConfig.from_dict({"base": self.bases[base].path, "task": self.tasks[task].task, **merged})


SEARCH = "search"  # of the settings; no section of a recipe, but cells that can be run alone
ENTRIES = ("bases", "tasks", "methods")
SECTIONS = {
    "main": {"bases", "tasks", "methods", "seeds", "score_detached"},
    "transfer": {"bases", "tasks", "methods", "seeds"},
    "scaling": {"bases", "tasks", "methods", "seeds", "budgets", "search"},
    "ablations": {"bases", "tasks", "method", "seeds", "variants"},
    "latency": {"bases", "task", "methods", "prompts", "prompt_tokens", "new_tokens", "batch_sizes", "rounds"},
}
NEEDED = {"scaling": {"budgets"}, "ablations": {"variants"}, "latency": {"task"}}


def read_recipe(path: Path) -> Recipe:
    """Reads and checks a recipe; nothing is loaded.

    Raises:
        ConfigError: an unknown key or name, or a search that is not equal.
    """
    values = read_yaml(path)
    names = {item.name for item in fields(Recipe)} - {"sections"} | set(SECTIONS)
    check_keys(values, names, what="recipe")
    values |= {name: as_mapping(values[name], name) for name in (*ENTRIES, *SECTIONS, "train", "search") if name in values}
    for name in ENTRIES:
        if not values.get(name):
            raise ConfigError(f"{path}: expected at least one entry under {name!r}")
    sections = {name: values.pop(name) for name in SECTIONS if name in values}
    if not sections:
        raise ConfigError(f"{path} has no section, so there is nothing to run; add 'main: {{}}', or {', '.join(SECTIONS)}")
    recipe = Recipe(
        **{
            "name": path.stem,
            **values,
            "bases": {name: _spec(BaseSpec, entry, name, path=name) for name, entry in values["bases"].items()},
            "tasks": {name: _spec(TaskSpec, entry, name, task=name) for name, entry in values["tasks"].items()},
            "methods": {name: _spec(MethodSpec, entry, name, kind=name) for name, entry in values["methods"].items()},
            "search": _spec(SearchSpec, values.get("search"), "search"),
            "seeds": _whole_numbers(values.get("seeds", list(Recipe.seeds)), "seeds", at_least=0),
            "further_baselines": tuple(values.get("further_baselines", ())),
            "sections": sections,
        }
    )
    _check(recipe)
    return recipe


def _spec(spec: type, entry: Any, name: str, **defaults: Any) -> Any:
    values = {**defaults, **as_mapping(entry, name)}
    check_keys(values, {item.name for item in fields(spec)}, what=spec.__name__.removesuffix("Spec").lower())
    return spec(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _whole_numbers(values: Any, name: str, *, at_least: int) -> tuple[int, ...]:
    is_list = isinstance(values, list | tuple) and values
    if not is_list or not all(type(each) is int and each >= at_least for each in values):
        raise ConfigError(f"{name} must be a list of whole numbers of at least {at_least} such as [{at_least}], not {values!r}")
    return tuple(values)


def _check(recipe: Recipe) -> None:
    for name, task in recipe.tasks.items():
        if task.task not in TASKS:
            raise ConfigError(f"task {name!r}: unknown task {task.task!r}; choose one of {', '.join(sorted(TASKS))}")
        known(recipe.tasks, task.score_on, "task")
        _check_scored(recipe, name, task)
        known(recipe.methods, task.trials, "method")
        for method, trials in task.trials.items():
            _check_trials(recipe, method, f"method {method!r} on task {name!r}", trials)
    for name in (*recipe.bases, *recipe.tasks, *recipe.methods):
        if "--" in name or "/" in name:
            raise ConfigError(f"{name!r} cannot name an entry: names become file names; leave out '--' and '/'")
    known(recipe.methods, [recipe.reference, recipe.baseline, *recipe.further_baselines], "method")
    if recipe.search.criterion not in ("metric", "loss"):
        raise ConfigError(f"search: criterion={recipe.search.criterion!r} is not valid; choose 'metric' or 'loss'")
    for name, method in recipe.methods.items():
        _check_method(recipe, name, method)
    for name, section in recipe.sections.items():
        check_keys(section, SECTIONS[name], what=f"section {name!r}")
        for key in NEEDED.get(name, set()) - section.keys():
            raise ConfigError(f"section {name!r} has no {key!r}; it needs one")
        known(recipe.tasks, [section["task"]] if "task" in section else (), "task")
        known(recipe.methods, methods_of(recipe, name), "method")
        for key, entries in (("bases", recipe.bases), ("tasks", recipe.tasks)):
            known(entries, section.get(key, ()), key.removesuffix("s"))
        if "seeds" in section:
            _whole_numbers(section["seeds"], f"the seeds of section {name!r}", at_least=0)
    if "latency" in recipe.sections:
        _check_latency(recipe, recipe.sections["latency"])
    for base, task, method in itertools.product(recipe.bases, recipe.tasks, recipe.methods):
        recipe.train_config(base, task, method)  # a setting that no training would take is found before the first one


def _check_scored(recipe: Recipe, name: str, task: TaskSpec) -> None:
    for other in task.score_on:
        is_class = "classification" in (TASKS[task.task].kind, TASKS[recipe.tasks[other].task].kind)
        if is_class and other != name:
            raise ConfigError(
                f"task {name!r} cannot be scored on {other!r}: a classification head knows only the labels it was trained on"
            )


def _check_latency(recipe: Recipe, section: dict[str, Any]) -> None:
    """Refuses what could only fail when all adapters have been trained."""
    if TASKS[recipe.tasks[section["task"]].task].kind == "classification":
        raise ConfigError(f"latency cannot time {section['task']!r}: a classifier writes nothing; choose a written task")
    for name in methods_of(recipe, "latency"):
        if recipe.methods[name].kind not in (*ADAPTERS, "shadow-pretrained"):
            raise ConfigError(f"latency cannot time {name!r}: the base is timed anyway, beside it LoRA, DoRA and shadows")
    for key, least in (("prompts", 1), ("prompt_tokens", 1), ("new_tokens", 2), ("rounds", 1)):
        value = section.get(key, least)
        require(type(value) is int and value >= least, f"latency: {key}", value, f"a whole number of at least {least}")
    _whole_numbers(section.get("batch_sizes", [1]), "latency: batch_sizes", at_least=1)


def methods_of(recipe: Recipe, name: str) -> list[str]:
    """The methods of a section: those it names, else all that it can take."""
    section = recipe.sections[name]
    if name == "ablations":
        usual = section.get("method", recipe.reference)
        return [usual, *(changes["method"] for changes in section["variants"].values() if "method" in changes)]
    adapters = [method for method, spec in recipe.methods.items() if spec.kind in ADAPTERS]
    return list(section.get("methods", adapters if name in ("scaling", "latency") else recipe.methods))


def unused_methods(recipe: Recipe) -> list[str]:
    """Methods that no section takes up: they are never run, which a report does not show."""
    used = {recipe.reference, recipe.baseline}.union(*(methods_of(recipe, name) for name in recipe.sections))
    return [name for name in recipe.methods if recipe.sections and name not in used]


def _check_method(recipe: Recipe, name: str, method: MethodSpec) -> None:
    if method.kind not in KINDS:
        raise ConfigError(f"method {name!r}: unknown kind {method.kind!r}; choose one of {', '.join(KINDS)}")
    if method.budget not in ("equal", "own"):
        raise ConfigError(f"method {name!r}: budget={method.budget!r} is not valid; choose 'equal' or 'own'")
    if method.kind == "shadow-pretrained" and "shadow_model" not in method.shadow:
        raise ConfigError(f"method {name!r}: set shadow: {{shadow_model: folder or hub name}} to say which shadow")
    _check_equal(f"method {name!r}", method.train)
    if method.trials:
        _check_trials(recipe, name, f"method {name!r}", method.trials)


def _check_equal(what: str, settings: dict[str, Any]) -> None:
    unequal = sorted(EQUAL & settings.keys())
    if unequal:
        raise ConfigError(
            f"{what} sets {', '.join(unequal)}, which all methods have alike; set it under 'train:' of the recipe, a task or "
            "a base"
        )


def _check_trials(recipe: Recipe, name: str, what: str, trials: Any) -> None:
    if not isinstance(trials, list | tuple) or not all(isinstance(trial, dict) for trial in trials):
        raise ConfigError(f"{what}: trials must be a list of settings such as {{learning_rate: 1e-3}}, not {trials!r}")
    names = {item.name for item in fields(TrainConfig)} - {"shadow"}
    if recipe.methods[name].kind.startswith("shadow"):
        names |= {item.name for item in fields(ShadowConfig)}
    for trial in trials:
        check_keys(trial, names, what=f"the trials of {what}")
        _check_equal(f"a trial of {what}", trial)
    if len(trials) != recipe.search.trials:
        raise ConfigError(
            f"{what} has {len(trials)} trials, but search.trials is {recipe.search.trials}: every method gets the same number"
        )


def known(entries: dict[str, Any], names: Any, what: str) -> None:
    """Raises ConfigError for the first of ``names`` that is not an entry."""
    for name in names:
        if name not in entries:
            raise ConfigError(f"unknown {what} {name!r}; the recipe has {', '.join(entries)}")

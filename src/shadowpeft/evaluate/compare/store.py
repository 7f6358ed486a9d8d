"""Rows, labels and searches that several cells of one process share."""

import dataclasses
import logging
import random
from dataclasses import dataclass, field
from pathlib import Path

from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.compare import results
from shadowpeft.evaluate.compare.budget import Sized, base_config, meta_base, solve, target_of
from shadowpeft.evaluate.compare.methods import resolve, trials_of
from shadowpeft.evaluate.compare.plan import Cell, fingerprint, search_of
from shadowpeft.evaluate.compare.recipe import MethodSpec, Recipe, shadow_settings
from shadowpeft.train.answers import Row
from shadowpeft.train.data import load_rows
from shadowpeft.train.tasks import TASKS, Task

logger = logging.getLogger(__name__)
SAMPLE_SEED = 0  # the same rows for all seeds and methods, so that differences can be paired


@dataclass(kw_only=True)
class Store:
    """What cells read: the recipe, where data and results are, and rows that were read before."""

    recipe: Recipe
    output: Path
    data_root: Path | None = None
    _rows: dict[tuple[str, str], list[Row]] = field(default_factory=dict)
    _sizes: dict[tuple, Sized] = field(default_factory=dict)

    def task(self, name: str) -> Task:
        return TASKS[self.recipe.tasks[name].task]

    def base_path(self, name: str) -> str:
        return resolve(self.recipe.bases[name].path, self.data_root)

    def method(self, name: str, base: str) -> MethodSpec:
        """A method of the recipe with the base's settings where it has none, and its pretrained shadow found on disk."""
        spec = self.recipe.methods[name]
        shadow = shadow_settings(spec, self.recipe.bases[base])
        if "shadow_model" in shadow:
            shadow["shadow_model"] = resolve(shadow["shadow_model"], self.data_root)
        return dataclasses.replace(spec, shadow=shadow)

    def rows(self, name: str, split: str, limit: int | None = None) -> list[Row]:
        """Rows of a task entry, of test rows without those the entry leaves out; a random sample of ``limit``, the same one
        every time.

        Raises:
            ConfigError: the entry names data below a data root, and there is none.
        """
        if (name, split) not in self._rows:
            rows = load_rows(self.task(name), split, source=self._source(name))
            self._rows[name, split] = rows if split != "test" else self._not_left_out(name, rows)
        rows = self._rows[name, split]
        return rows if limit is None or limit >= len(rows) else [rows[index] for index in _sample(len(rows), limit)]

    def _not_left_out(self, name: str, rows: list[Row]) -> list[Row]:
        num_left_out = self.recipe.tasks[name].leave_out
        if num_left_out >= len(rows):
            raise ConfigError(f"task {name!r} has {len(rows)} test rows and leaves out {num_left_out}: none is left")
        left_out = set(_sample(len(rows), num_left_out))
        return [row for index, row in enumerate(rows) if index not in left_out]

    def _source(self, name: str) -> Path | None:
        """Where a task entry's data is; None: on the hub. Without a data root, a path is one from the working directory."""
        data = self.recipe.tasks[name].data
        if data is None:
            return None
        if self.data_root is not None or Path(data).exists():
            return (self.data_root or Path()) / data
        if self.task(name).hub_name is None:
            raise ConfigError(f"the data of task {name!r} is at {data!r} below a data root; pass --data-root FOLDER")
        logger.warning("%s: there is no %s and no --data-root, so its data comes from the hub", name, data)
        return None

    def labels(self, name: str) -> list[str] | None:
        """All labels of the training rows, sorted; None for tasks answered by text."""
        task = self.task(name)
        if task.kind != "classification":
            return None
        return sorted({task.target(row) for row in self.rows(name, "train")})

    def size(self, cell: Cell, num_labels: int | None) -> Sized:
        """The sizes of a cell's method, solved once for each budget from the base's config alone.

        Raises:
            ConfigError: the budget cannot be met.
        """
        key = (cell.base, cell.method, cell.parameters, num_labels)
        if key not in self._sizes:
            self._sizes[key] = self._solve(cell, num_labels)
        return self._sizes[key]

    def _solve(self, cell: Cell, num_labels: int | None) -> Sized:
        recipe, spec = self.recipe, self.recipe.bases[cell.base]
        base = meta_base(base_config(self.base_path(cell.base), spec.config), num_labels)
        parameters = cell.parameters if cell.parameters is not None else spec.parameters
        target = target_of(parameters, self.method(recipe.reference, cell.base), base, recipe.tolerance)
        return solve(self.method(cell.method, cell.base), base, target, recipe.tolerance)

    def setting(self, cell: Cell, method: str) -> dict[str, float]:
        """What the search of a cell chose for a method; with a single trial that one, and empty where nothing is trained."""
        needed = [each for each in cell.needs if search_of(cell, each).method == method]
        if not needed:
            return self._only_setting(cell.task, method, cell.base)
        found = results.read_result(self.output, needed[0])
        if found is None or found["status"] != "done":
            raise ConfigError(f"the search {needed[0]} is not done; run it first, or --retry-failed")
        if found["fingerprint"] != fingerprint(self.recipe, search_of(cell, needed[0])):
            raise ConfigError(f"the search {needed[0]} was made with other settings than the recipe has; run it again first")
        return found["chosen"]

    def _only_setting(self, task: str, method: str, base: str) -> dict[str, float]:
        recipe = self.recipe
        if recipe.search.trials != 1 or recipe.is_untrained(method):
            return {}
        return trials_of(self.method(method, base), 1, recipe.tasks[task].trials.get(method, ()))[0]


def _sample(count: int, limit: int) -> list[int]:
    """The same indices every time, in order."""
    return sorted(random.Random(SAMPLE_SEED).sample(range(count), limit))

"""Fair comparisons of adaptation methods: equal budgets, equal search, paired statistics; see docs/compare.md."""

from shadowpeft.evaluate.compare.command import compare
from shadowpeft.evaluate.compare.plan import Cell, plan_cells
from shadowpeft.evaluate.compare.recipe import Recipe, read_recipe
from shadowpeft.evaluate.compare.report import write_report

__all__ = ["Cell", "Recipe", "compare", "plan_cells", "read_recipe", "write_report"]

"""A process that runs one cell after another: ids come in on stdin, ``done ID`` goes out; an error ends the process.

Started by :mod:`shadowpeft.evaluate.compare.runner`, which reads the traceback from the log of a process that died.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TextIO

from transformers.utils import logging as transformers_logging

from shadowpeft.evaluate.compare.cells import run_cell
from shadowpeft.evaluate.compare.plan import fingerprint, plan_cells
from shadowpeft.evaluate.compare.recipe import read_recipe
from shadowpeft.evaluate.compare.results import write_done
from shadowpeft.evaluate.compare.store import Store


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data-root", type=Path)
    arguments = parser.parse_args()
    answers = _own_stdout()
    transformers_logging.set_verbosity_error()
    store = Store(recipe=read_recipe(arguments.recipe), output=arguments.output, data_root=arguments.data_root)
    serve(store, sys.stdin, answers)


def _own_stdout() -> TextIO:
    """Stdout for answers alone: whatever a library prints goes to stderr from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def serve(store: Store, ids: TextIO, answers: TextIO) -> None:
    """Runs the named cells until ``ids`` ends."""
    cells = {cell.id: cell for cell in plan_cells(store.recipe)}
    for line in ids:
        cell = cells[line.strip()]
        payload, generations = run_cell(cell, store)
        write_done(store.output, cell, fingerprint(store.recipe, cell), payload, generations)
        print("done", cell.id, file=answers, flush=True)


if __name__ == "__main__":
    main()

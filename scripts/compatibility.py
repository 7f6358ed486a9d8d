"""The contract tests under other versions of Python, torch and transformers: `python scripts/compatibility.py`.

Every cell gets an environment of its own, with this package as it is installed for a user, and runs the tests that are
marked `contract`. `results/compatibility.json` has each cell as soon as it has ended: passed, failed with the names of
the tests, or not installed with the reason; cells of earlier calls stay until they are run again. Interpreters are looked
for on PATH and among pyenv's. `--only 3.11` or `--only torch=2.8.0` runs the cells that have all of these.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from shadowpeft.evaluate.record import origin, write_record

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "compatibility.json"
NEWEST = "newest"
TEST_PACKAGES = ("pytest>=8", "pytest-xdist>=3.6", "jaxtyping>=0.2.36", "beartype>=0.19")
# One process, as a machine that runs this may have one core. A newer release may deprecate what an older one needs: that is
# no failure here.
PYTEST = ("-n", "1", "-m", "contract", "-p", "no:cacheprovider", "-W", "default")
MARK = "pytest.mark.contract"
INSTALL_SECONDS, TEST_SECONDS = 1800, 1200
# In a new environment: the versions that were found, and the requirements of this package that are not pinned by a cell.
VERSIONS = (
    "import json, platform; from importlib.metadata import version; "
    "print(json.dumps({'python': platform.python_version(), **{n: version(n) for n in ('torch', 'transformers')}}))"
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One environment. ``python`` is a minor version; the others are releases, or ``newest`` that installs."""

    python: str
    torch: str
    transformers: str


# The newest release that pyproject.toml admits; NEWEST says whether the range may grow.
ADMITTED = "5.24.0"
CELLS = [
    *(Cell(python="3.11", torch=torch, transformers="5.17.0") for torch in ("2.6.0", "2.8.0", "2.13.0")),
    *(Cell(python="3.11", torch=torch, transformers=ADMITTED) for torch in ("2.7.1", "2.8.0")),
    *(Cell(python="3.11", torch="2.13.0", transformers=release) for release in ("5.23.0", NEWEST)),
    Cell(python="3.11", torch=NEWEST, transformers=ADMITTED),
    Cell(python="3.10", torch="2.13.0", transformers="5.20.2"),  # the last that installs there
    *(Cell(python=p, torch="2.13.0", transformers=ADMITTED) for p in ("3.12", "3.13")),
]


def interpreter(minor: str) -> str | None:
    """A Python of this minor version that runs; pyenv's names on PATH lead nowhere for versions not chosen."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{minor}"), *map(str, sorted(pyenv.glob(f"{minor}.*/bin/python")))]
    ask = ["-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    for candidate in candidates:
        if candidate and subprocess.run([candidate, *ask], capture_output=True, text=True).stdout.strip() == minor:
            return candidate
    return None


def requirements(cell: Cell) -> list[str]:
    """What to install beside this package: its requirements, with the cell's releases where it names one.

    The ranges of pyproject.toml for torch and transformers are left out, as it is they that are tried.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (block,) = re.findall(r"^dependencies = \[\n(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    pins = {name: name if release == NEWEST else f"{name}=={release}" for name, release in asdict(cell).items()}
    names = re.findall(r'"([^"]+)"', block)
    return [pins.get(re.split(r"[<>=]", name)[0], name) for name in names]


def contract_files() -> list[str]:
    """The test files that carry the mark, so that no other file, and what it needs, is imported."""
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in tests if MARK in path.read_text(encoding="utf-8")]


def run(cell: Cell) -> dict[str, Any]:
    """The outcome of a cell: ``status`` is passed, failed, not installed or no interpreter; ``reason`` says why not passed."""
    python = interpreter(cell.python)
    if python is None:
        return {"status": "no interpreter", "reason": f"no Python {cell.python} was found here"}
    with tempfile.TemporaryDirectory(prefix="compatibility-") as folder:
        subprocess.run([python, "-m", "venv", folder], check=True, capture_output=True)
        own = str(Path(folder) / "bin" / "python")
        pip = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        for what in ([*requirements(cell), *TEST_PACKAGES], ["--no-deps", str(ROOT)]):
            problem = _problem([*pip, *what], INSTALL_SECONDS)
            if problem is not None:
                return {"status": "not installed", "reason": problem}
        versions = json.loads(subprocess.run([own, "-c", VERSIONS], capture_output=True, check=True, text=True).stdout)
        report = Path(folder) / "report.xml"
        # A user's site-packages and the sources of this checkout stay out of it.
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        problem = _problem(
            [own, "-m", "pytest", *PYTEST, f"--junitxml={report}", *contract_files()], TEST_SECONDS, env=clean
        )
        return {"versions": versions, **outcome(report, problem)}


def _problem(command: list[str], seconds: float, **options: Any) -> str | None:
    """Runs a command; the last line that tells what went wrong, or None."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, **options)
    except subprocess.TimeoutExpired:
        return f"not finished after {seconds:.0f} s"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"exit status {done.returncode}"])[-1][:300]


def outcome(report: Path, problem: str | None) -> dict[str, Any]:
    """What pytest's JUnit file says; without one, or with no test in it, the cell has failed for ``problem``."""
    cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    broken = [case.attrib["name"] for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    counts = {"passed": len(cases) - len(broken) - skipped, "failed": len(broken), "skipped": skipped}
    if not problem and counts["passed"]:
        return {"status": "passed", "tests": counts}
    reason = "; ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
    return {"status": "failed", "tests": counts, "reason": reason or problem or "no test ran"}


def save(cell: Cell, found: dict[str, Any], path: Path = RESULT) -> None:
    """Puts a cell in the place of its last outcome; in the order of ``CELLS``, whose cells alone stay."""
    old = json.loads(path.read_text(encoding="utf-8"))["cells"] if path.is_file() else []
    mine = {"asked": asdict(cell), **found, "commit": origin()["commit"], "time": origin()["time"]}
    cells = [entry for entry in old if entry["asked"] != asdict(cell)] + [mine]
    order = [asdict(known) for known in CELLS]
    if asdict(cell) in order:  # what is asked for no more would stand there for ever
        cells = sorted((entry for entry in cells if entry["asked"] in order), key=lambda entry: order.index(entry["asked"]))
    write_record(path, {"cells": cells})


def chosen(only: list[str]) -> list[Cell]:
    """Cells that have every value: ``3.11`` for a Python, ``torch=2.8.0`` for the others."""
    wanted = dict(part.split("=", 1) if "=" in part else ("python", part) for part in only)
    return [cell for cell in CELLS if all(asdict(cell).get(name) == value for name, value in wanted.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="3.11, torch=2.8.0, transformers=newest")
    parser.add_argument("--out", type=Path, default=RESULT, help="file of the outcomes")
    options = parser.parse_args()
    cells, bad = chosen(options.only), []
    if not cells:
        sys.exit(f"no cell has {' '.join(options.only)}")
    for cell in cells:
        found = run(cell)
        save(cell, found, options.out)
        print(json.dumps({**asdict(cell), **found}), flush=True)
        bad += [cell] if found["status"] == "failed" else []
    if bad:
        sys.exit(f"{len(bad)} of {len(cells)} cells failed")


if __name__ == "__main__":
    main()

"""The rules of the house, on the package itself; and each rule on code that breaks it."""

import re
from pathlib import Path

import pytest

import house

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "shadowpeft"
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
TEXTS = sorted(
    path
    for folder in ("src", "tests", "recipes", "benchmarks", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".md", ".toml", ".yaml", ".yml", ".json", ".txt"}
)

# What may change an object after it was made, and why that is no state of a call.
RUN = "a run is one call's own value, made for it and dropped with it"
CHANGES = {
    **{("core/run.py", "ShadowRun.step", name): RUN for name in ("_states", "_inputs", "_stream")},
    **{("core/run.py", "ShadowRun.between", name): RUN for name in ("_last_between", "_stream")},
    **{("core/run.py", "ShadowRun.release", name): RUN for name in ("_states", "_inputs", "_stream")},
    ("core/lean.py", "_Recorder._keep", "_kept"): "a recorder is one forward pass's own value, dropped with its graph",
    ("core/lean.py", "_Recorder._note", "_origins"): "a recorder is one forward pass's own value, dropped with its graph",
    ("model/adapters.py", "AdaptedModel.set_adapter", "active_adapter"): "the user's setting; a call never changes it",
    ("model/adapters.py", "AdaptedModel._register", "networks"): "adding an adapter, asked for by the user",
    ("model/adapters.py", "AdaptedModel.delete_adapter", "networks"): "deleting an adapter, asked for by the user",
    ("model/adapters.py", "AdaptedModel.unload", "_is_on_base"): "taking it off its base, asked for by the user",
    ("model/tasks.py", "ShadowModelForSequenceClassification.forward", "config"): (
        "the kind of problem, which its labels say once and for all, as in transformers' own classifiers"
    ),
}


def complaints(rule, *, below=""):
    return [found for path, source in SOURCES.items() if path.startswith(below) for found in rule(path, source)]


def test_there_is_something_to_check():
    assert {"core", "model", "train", "evaluate"} <= {path.split("/")[0] for path in SOURCES}
    assert len(TEXTS) > 50


def test_imports_never_run_up_and_core_knows_torch_alone():
    assert complaints(house.wrong_imports) == []


def test_no_object_of_core_and_model_changes_outside_construction():
    found = {found for below in ("core/", "model/") for found in complaints(house.changed_on_self, below=below)}
    assert found - CHANGES.keys() == set()
    assert CHANGES.keys() - found == set(), "an exception that is no longer needed"


def test_no_except_is_broad():
    # The decoder's outer boundary: any fault of one batch ends its rows with an error, not the server.
    found = [found for found in complaints(house.broad_excepts) if not found.startswith("deploy/serve/scheduler.py")]
    assert found == []


def test_nothing_is_pickled():
    assert complaints(house.pickling) == []


def test_every_folder_is_a_package_that_says_what_it_offers():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert [folder.name for folder in folders if not (folder / "__init__.py").is_file()] == []
    inits = {path: source for path, source in SOURCES.items() if path.endswith("__init__.py")}
    assert [found for path, source in inits.items() for found in house.missing_all(path, source)] == []


def test_no_file_holds_a_path_of_somebodys_machine():
    found = [found for path in TEXTS for found in house.places(path.name, path.read_text(encoding="utf-8"))]
    # This file and the records' test hold such paths to show that they are caught.
    assert [line for line in found if not line.startswith(("test_house_rules.py", "test_record.py"))] == []


def test_the_table_of_defects_names_tests_that_exist():
    path = None
    names = re.findall(r"`([a-z_/]+\.py)?::(test_\w+)`", (ROOT / "tests" / "README.md").read_text(encoding="utf-8"))
    for file, name in names:
        path = file or path
        assert f"def {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), f"{path}::{name}"
    assert len(names) > 30


# ---------------------------------------------------------------- each rule bites


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("core/step.py", "import transformers"),
        ("core/step.py", "import numpy as np"),
        ("core/step.py", "from shadowpeft.model.attach import attach"),
        ("core/step.py", "from jaxtyping import Float"),
        ("core/step.py", "from shadowpeft import get_shadow_model"),
        ("model/attach.py", "from shadowpeft.train.config import TrainConfig"),
        ("model/attach.py", "def late():\n    import shadowpeft.cli"),
        ("generate/sample.py", "from shadowpeft.evaluate import evaluate"),
        ("train/run.py", "from shadowpeft.evaluate.score import Evaluation"),
        ("train/run.py", "from shadowpeft import commands"),
        ("evaluate/score.py", "from shadowpeft.deploy import route"),
        ("errors.py", "from shadowpeft.core import ShadowConfig"),
        ("model/tasks.py", "from .wrapper import ShadowModel"),
    ],
)
def test_an_import_that_runs_up_is_caught(path, line):
    assert len(house.wrong_imports(path, line)) == 1


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("core/step.py", "import math\nimport torch\nfrom shadowpeft.errors import ConfigError"),
        ("core/shapes.py", "from jaxtyping import Float"),
        ("model/tasks.py", "import transformers\nfrom shadowpeft import files\nfrom shadowpeft.core import Run"),
        ("evaluate/score.py", "from shadowpeft.train.tasks import Task\nfrom shadowpeft.generate import speculative"),
        ("cli.py", "from shadowpeft import commands"),
    ],
)
def test_an_import_that_runs_down_is_not(path, line):
    assert house.wrong_imports(path, line) == []


@pytest.mark.parametrize(
    "body",
    [
        "self.state = h",
        "self.state += h",
        "self.state: int = 1",
        "self.states[0] = h",
        "self.config.state = h",
        "other, self.state = h",
        "setattr(self, 'state', h)",
        "del self.state",
    ],
)
def test_a_state_kept_on_an_object_is_caught(body):
    made = "class Block:\n    def __init__(self):\n        self.width = 3\n"
    source = f"{made}    def forward(self, h):\n        {body}\n"
    assert [method for _, method, _ in house.changed_on_self("core/x.py", source)] == ["Block.forward"]


def test_a_local_name_and_another_object_are_not():
    lines = ["class Block:", " def forward(self, h):", "  state = h", "  out.x = self.y", "  setattr(h, 'x', 1)"]
    source = "\n".join(lines)
    assert house.changed_on_self("core/x.py", source) == []


@pytest.mark.parametrize("clause", ["except:", "except Exception:", "except (OSError, BaseException) as error:"])
def test_a_broad_except_is_caught(clause):
    assert len(house.broad_excepts("x.py", f"try:\n    pass\n{clause}\n    pass\n")) == 1
    assert house.broad_excepts("x.py", "try:\n    pass\nexcept (OSError, ValueError):\n    pass\n") == []


@pytest.mark.parametrize(
    "line", ["import pickle", "from pickle import loads", "torch.load(path)", "torch.save(x, path)", "import joblib"]
)
def test_pickling_is_caught(line):
    assert len(house.pickling("x.py", line)) == 1
    assert house.pickling("x.py", "json.load(file)\nsafetensors.torch.load(data)") == []


def test_a_package_without_its_list_of_names_is_caught():
    assert house.missing_all("__init__.py", "from a import b") == ["__init__.py: no __all__"]
    assert house.missing_all("__init__.py", "from a import b, c\n__all__ = ['b']") == [
        "__init__.py: c is imported but not in __all__"
    ]
    assert house.missing_all("__init__.py", "from a import b\n__all__ = ['b']") == []


@pytest.mark.parametrize("text", ["base = '/home/me/model'", "see /work/shared/data", "cd /root/x", "path: /Users/me"])
def test_a_path_of_a_machine_is_caught(text):
    assert len(house.places("x.py", text)) == 1
    assert house.places("x.py", "https://a.org/home/page and ../shared/data and /proc/cpuinfo") == []

"""Every block of every tutorial is run."""

from pathlib import Path

import pytest

from tutorials import run_page

FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
# (blocks of Python, files, verbs, packages they need) of each page, so that a block the runner overlooks is missed.
PAGES = {
    "first-shadow": (4, 0, ["train", "generate", "info", "train"], ()),
    "pretrain-detach": (3, 0, ["pretrain", "train", "detach"], ()),
    "speculative": (2, 0, ["train", "generate"], ()),
    "edge-cloud": (3, 0, ["train", "calibrate", "detach", "serve", "edge"], ("fastapi", "uvicorn", "prometheus_client")),
    "compare-lora": (1, 1, ["compare", "compare"], ("peft",)),
    "migrate": (4, 0, ["convert", "convert"], ("peft", "shadow_peft")),
}
# Raised by the peers under transformers 5.23 and 5.24.
pytestmark = pytest.mark.filterwarnings("ignore:.((is_)?gradient_checkpointing|past_key_values). is deprecated:FutureWarning")


def test_every_tutorial_is_listed_here():
    assert {path.stem for path in FOLDER.glob("*.md")} == PAGES.keys()


@pytest.mark.parametrize("name", PAGES)
def test_a_tutorial_runs_from_top_to_bottom(name, tmp_path, monkeypatch):
    python, files, verbs, packages = PAGES[name]
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    ran = run_page(FOLDER / f"{name}.md", monkeypatch)
    assert (ran.python, ran.files, ran.commands) == (python, files, verbs)

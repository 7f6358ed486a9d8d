"""The site builds without a warning, and its lists are those of the code."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from shadowpeft import cli
from shadowpeft.train.config import TrainConfig

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason="the site's builder is not installed (pip install '.[docs]')")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    settings = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert "scale of the injected correction" in settings, "the help texts of settings are missing"


def test_the_page_of_the_command_line_lists_every_verb():
    listed = re.findall(r"^\| `([a-z-]+)` \|", (DOCS / "cli.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(typer.main.get_command(cli.app).commands)


def test_the_settings_file_of_the_how_to_is_read(tmp_path):
    (text,) = re.findall(r"```yaml.*?\n(.*?)```", (DOCS / "how-to.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "my.yaml").write_text(text, encoding="utf-8")
    config = TrainConfig.from_yaml(tmp_path / "my.yaml")
    assert (config.learning_rate, config.shadow.r) == (1e-3, 32)


def test_the_citation_has_the_version_of_the_package():
    from shadowpeft import __version__

    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")

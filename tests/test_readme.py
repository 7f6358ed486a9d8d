"""The README is run: its Python block, its command lines, and its tables against results/."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from comparisons import byte_tokenizer
from models import tiny_base
from shadowpeft import cli, commands

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks("python")
    monkeypatch.chdir(tmp_path)
    tiny_base("qwen3", vocab_size=259).save_pretrained("Qwen/Qwen3-0.6B")  # a local folder wins over the hub
    byte_tokenizer().save_pretrained("Qwen/Qwen3-0.6B")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert type(names["shadow"]).__name__ == "Qwen3ForCausalLM"
    assert (tmp_path / "shadow" / "model.safetensors").is_file()


def test_every_command_line_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("shadowpeft ")]
    called = []
    for name in ("train", "evaluate", "generate", "info", "demo"):
        monkeypatch.setattr(commands, name, lambda *args, name=name, **kwargs: called.append(name))
    monkeypatch.chdir(tmp_path)
    Path("my.yaml").write_text("task: robot\n")
    for line in lines:
        outcome = CliRunner().invoke(cli.app, shlex.split(line, comments=True)[1:])
        assert outcome.exit_code == 0, f"{line}: {outcome.output}"
    assert len(called) == len(lines) == 5


def test_the_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = set(re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE))
    assert used == {"demo", "test"} <= targets


def test_the_tables_say_what_the_results_say() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "render.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

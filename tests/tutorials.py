"""Runs a tutorial as its reader would, block by block, in the current folder."""

import re
import shlex
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shadowpeft import cli
from shadowpeft.deploy.system_eval.processes import ServerProcess, free_port

FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PORTS = ("8000", "8001")


@dataclass
class Ran:
    """What a page held and what was run of it."""

    python: int = 0
    files: int = 0
    commands: list[str] = field(default_factory=list)
    installs: int = 0


def run_page(page: Path, monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Python blocks share one namespace; titled blocks are written; ``shadowpeft`` lines run, those with ``&`` as servers.

    The servers get free ports in place of those on the page, and are stopped behind the last block.
    """
    text, ran = page.read_text(encoding="utf-8"), Ran()
    for port in PORTS:
        text = text.replace(port, str(free_port()))
    names: dict[str, Any] = {}
    with ExitStack() as servers:
        for language, title, code in FENCE.findall(text):
            if title:
                Path(title).write_text(code, encoding="utf-8")
                ran.files += 1
            elif language == "python":
                exec(compile(code, page.name, "exec"), names)
                ran.python += 1
            elif language == "bash":
                run_lines(code, monkeypatch, servers, ran)
            else:
                raise AssertionError(f"{page.name}: a block of {language!r} is neither run nor written")
    return ran


def run_lines(code: str, monkeypatch: pytest.MonkeyPatch, servers: ExitStack, ran: Ran) -> None:
    for line in code.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "pip":
            ran.installs += 1
            continue
        assert program == "shadowpeft", line
        ran.commands.append(arguments[0])
        if arguments[-1] == "&":
            servers.enter_context(Served(arguments[:-1]))
        else:
            assert run_command(arguments, monkeypatch) == 0, line


def run_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["shadowpeft", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


class Served:
    """A server that is healthy within the block."""

    def __init__(self, arguments: list[str]) -> None:
        at = arguments.index("--port")
        self._process = ServerProcess(arguments[:at] + arguments[at + 2 :], port=int(arguments[at + 1]))

    def __enter__(self) -> None:
        self._process.start()

    def __exit__(self, *_: object) -> None:
        assert self._process.stop() == 0
        self._process.close()

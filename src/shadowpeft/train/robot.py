"""Generated commands for a small robot dog, after the paper's system-level set-up.

The answer to a request is the call of one of 34 skills, or ``[REMOTE]`` for what the robot cannot do itself:
then the large model in the cloud is asked. The rows are written by a grammar and are not the paper's own. Its
templates are disjoint between the splits, so the test asks for known skills in new phrases.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import cycle, islice, product
from pathlib import Path

from shadowpeft.train.robot_templates import CARRIERS, REMOTE_TEMPLATES, SKILLS, WAKE_WORDS, WORDS

REMOTE = "[REMOTE]"

# The paper: 3,400 + 1,047 remote to train, 306 + 18 to test.
ROWS_PER_SKILL = {"train": 100, "validation": 4, "test": 9}
REMOTE_ROWS = {"train": 1050, "validation": 14, "test": 30}


def generate_robot_commands(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Train, validation and test rows of ``text`` and ``intent``; a seed gives the same rows everywhere."""
    return {
        split: [{"text": row["text"], "intent": row["intent"]} for row in rows]
        for split, rows in generate_with_templates(seed).items()
    }


def generate_with_templates(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """The same rows in the same order, each with the ``template`` that wrote it."""
    seen: set[str] = set()
    return {split: _split_rows(split, seed, seen) for split in ROWS_PER_SKILL}


def write_robot_commands(folder: Path, seed: int = 0) -> None:
    """Writes ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` into ``folder``, made if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in generate_robot_commands(seed).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="ascii", newline="\n")


@cache
def expand(template: str) -> tuple[str, ...]:
    """Every text a template can become by its ``(a|b)`` choices; slots stay."""
    parts = re.split(r"\(([^)]*)\)", template)
    choices = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    return tuple(" ".join("".join(chosen).split()).replace(" ?", "?") for chosen in product(*choices))


def _split_rows(split: str, seed: int, seen: set[str]) -> list[dict[str, str]]:
    """All rows of a split, mixed.

    Each skill has its own random stream: a change to the templates of one leaves the rows of the others.
    """
    sources = [(name, skill.templates[split], ROWS_PER_SKILL[split]) for name, skill in SKILLS.items()]
    sources.append((REMOTE, REMOTE_TEMPLATES[split], REMOTE_ROWS[split]))
    rows = []
    for name, templates, count in sources:
        new_rows = _new_rows(name, templates, random.Random(f"{seed}/{split}/{name}"), seen)
        rows.extend(islice(new_rows, count))
    random.Random(f"{seed}/{split}").shuffle(rows)
    return rows


def _new_rows(
    name: str, templates: Sequence[str], rng: random.Random, seen: set[str]
) -> Iterator[dict[str, str]]:
    """Rows without end, the templates in turn; never a text that is in ``seen`` but for case and marks."""
    for template in cycle(templates):
        request, values = _fill(rng.choice(expand(template)), rng)
        text = _say(request, rng)
        key = re.sub(r"[^a-z0-9 ]", "", text.lower())
        if key not in seen:
            seen.add(key)
            yield {"text": text, "intent": _intent(name, values), "template": template}


def _intent(name: str, values: dict[str, str]) -> str:
    if name == REMOTE:
        return REMOTE
    argument = SKILLS[name].argument
    return f"{name}({argument}={values[argument]})" if argument else f"{name}()"


def _fill(template: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    """The template with a word in each slot, and the last word chosen for each kind of slot."""
    values: dict[str, str] = {}

    def choose(slot: re.Match[str]) -> str:
        values[slot[1]] = rng.choice(WORDS[slot[1]])
        return values[slot[1]]

    return re.sub(r"\{(\w+)\}", choose, template), values


def _say(request: str, rng: random.Random) -> str:
    """The request as a person may put it: wake word, politeness, first letter and final mark vary."""
    carrier = "{}" if request.endswith("?") else rng.choice(CARRIERS)
    text = rng.choice(WAKE_WORDS) + carrier.format(request)
    marks = ("?", "?", "") if text.endswith("?") else ("", "", ".", "!")
    text = text.rstrip("?") + rng.choice(marks)
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text

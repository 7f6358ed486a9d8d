import hashlib
import json
import re
from collections import Counter
from itertools import chain

import pytest

from shadowpeft.train.robot import (
    REMOTE,
    expand,
    generate_robot_commands,
    generate_with_templates,
    write_robot_commands,
)
from shadowpeft.train.robot_templates import REMOTE_TEMPLATES, SKILLS, WORDS

# After a wanted change of the rows: run the test, the new value is in its failure message.
GOLDEN = "86511bba41c984c8ffe3c1da74d151afb29b65430e9635b18078d8027cd45328"
INTENT = re.compile(r"\[REMOTE\]|(?P<skill>[a-z_]+)\((?:(?P<argument>[a-z]+)=(?P<value>[A-Za-z0-9]+))?\)")
COUNTS = {"train": (3400, 1050), "validation": (136, 14), "test": (306, 30)}


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, str]]]:
    return generate_with_templates(0)


@pytest.fixture(scope="module")
def rows(splits) -> list[dict[str, str]]:
    return list(chain.from_iterable(splits.values()))


def skill_of(row: dict[str, str]) -> str:
    return row["intent"].split("(")[0]


def all_templates() -> list[tuple[str, str, str]]:
    """Every template with its owner and its split."""
    tables = {name: skill.templates for name, skill in SKILLS.items()} | {REMOTE: REMOTE_TEMPLATES}
    return [
        (owner, split, template)
        for owner, templates in tables.items()
        for split in COUNTS
        for template in templates[split]
    ]


def test_there_are_34_described_skills_a_third_with_an_argument():
    assert len(SKILLS) == 34
    assert sum(skill.argument is not None for skill in SKILLS.values()) == 12
    assert all(skill.description.endswith(".") and "\n" not in skill.description for skill in SKILLS.values())


@pytest.mark.parametrize(("split", "minimum"), [("train", 8), ("validation", 2), ("test", 3)])
def test_every_skill_has_enough_templates(split, minimum):
    assert min(len(set(skill.templates[split])) for skill in SKILLS.values()) >= minimum


def test_a_skill_template_has_the_slot_of_its_argument_and_no_other():
    for owner, _, template in all_templates():
        if owner != REMOTE:
            argument = SKILLS[owner].argument
            expected = [argument] if argument else []
            assert all(re.findall(r"\{(\w+)\}", text) == expected for text in expand(template)), template


def test_every_word_table_is_used_and_every_slot_has_one():
    used = {slot for _, _, template in all_templates() for slot in re.findall(r"\{(\w+)\}", template)}
    assert used == set(WORDS)


def test_no_two_templates_can_write_the_same_request():
    requests = Counter(request for _, _, template in all_templates() for request in expand(template))
    assert [request for request, count in requests.items() if count > 1] == []


@pytest.mark.parametrize("split", COUNTS)
def test_splits_have_the_stated_sizes(splits, split):
    num_remote = sum(row["intent"] == REMOTE for row in splits[split])
    assert (len(splits[split]) - num_remote, num_remote) == COUNTS[split]


@pytest.mark.parametrize(("split", "expected"), [("train", 100), ("validation", 4), ("test", 9)])
def test_every_skill_is_equally_frequent_in_every_split(splits, split, expected):
    counts = Counter(skill_of(row) for row in splits[split] if row["intent"] != REMOTE)
    assert counts == dict.fromkeys(SKILLS, expected)


def test_every_template_writes_rows_of_its_own_split_only(splits):
    for split, rows in splits.items():
        expected = {template for _, owner_split, template in all_templates() if owner_split == split}
        assert {row["template"] for row in rows} == expected


def test_no_text_appears_twice_even_without_case_and_marks(rows):
    texts = Counter(re.sub(r"[^a-z0-9 ]", "", row["text"].lower()) for row in rows)
    assert max(texts.values()) == 1


def test_intents_are_remote_or_a_call_of_a_known_skill_with_its_argument(rows):
    for row in rows:
        match = INTENT.fullmatch(row["intent"])
        assert match, row
        if row["intent"] != REMOTE:
            assert match["argument"] == SKILLS[match["skill"]].argument, row
            assert match["value"] is None or match["value"] in WORDS[match["argument"]], row


def test_argument_values_stand_in_the_text_as_whole_words(rows):
    for row in rows:
        value = INTENT.fullmatch(row["intent"])["value"]
        assert value is None or re.search(rf"\b{value}\b", row["text"]), row


def test_every_argument_value_of_every_skill_is_seen_in_training(splits):
    seen = {row["intent"] for row in splits["train"]}
    for name, skill in SKILLS.items():
        for value in WORDS.get(skill.argument, ()):
            assert f"{name}({skill.argument}={value})" in seen


def test_texts_are_short_clean_ascii(rows):
    for row in rows:
        text = row["text"]
        assert text.isascii() and text.isprintable() and 0 < len(text) < 120, text
        assert text == " ".join(text.split()) and not re.search(r"[{}()|;]| [,.?!]", text), text


def test_same_seed_same_rows_and_another_seed_other_rows():
    assert generate_robot_commands(1) == generate_robot_commands(1)
    assert generate_robot_commands(1) != generate_robot_commands(2)


def test_public_rows_are_the_rows_without_templates(splits):
    for split, rows in generate_robot_commands(0).items():
        assert [list(row) for row in rows] == [["text", "intent"]] * len(rows)
        assert rows == [{"text": row["text"], "intent": row["intent"]} for row in splits[split]]


def test_rows_of_seed_0_never_change():
    text = json.dumps(generate_robot_commands(0), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN


def test_written_files_read_back_as_the_rows(tmp_path):
    write_robot_commands(tmp_path / "robot", seed=0)
    read = {
        path.stem: [json.loads(line) for line in path.read_text().splitlines()]
        for path in (tmp_path / "robot").glob("*.jsonl")
    }
    assert read == generate_robot_commands(0)

import gzip
import json
import sys
from pathlib import Path

import datasets
import pytest

from shadowpeft.errors import DataError
from shadowpeft.train.data import load_rows
from shadowpeft.train.sources import MissingPackageError
from shadowpeft.train.tasks import TASKS

INTENT, CLASSES = TASKS["intent"], TASKS["classification"]


def commands(count: int) -> list[dict]:
    return [{"text": f"play song {number}", "intent": "play_music"} for number in range(count)]


def write(path: Path, rows: list) -> Path:
    text = json.dumps(rows) if ".jsonl" not in path.name else "".join(json.dumps(row) + "\n" for row in rows)
    opener = gzip.open if path.name.endswith(".gz") else open
    with opener(path, "wt", encoding="utf-8") as lines:
        lines.write(text)
    return path


def splits_of(source: Path, task=INTENT) -> dict[str, list[dict]]:
    return {split: load_rows(task, split, source=source) for split in ("train", "validation", "test")}


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".json.gz"])
def test_a_folder_is_read_in_every_format(tmp_path, ending):
    rows = commands(3)
    for split, row in zip(("train", "validation", "test"), rows, strict=True):
        write(tmp_path / f"{split}{ending}", [row])
    assert splits_of(tmp_path) == {"train": rows[:1], "validation": rows[1:2], "test": rows[2:]}


def test_blank_lines_do_not_count_and_odd_line_ends_inside_a_text_do_not_split_it(tmp_path):
    row = {"text": "one\u2028two\x85three", "intent": "x"}
    text = "\n" + json.dumps(row, ensure_ascii=False) + "\r\n\n"
    (tmp_path / "test.jsonl").write_bytes(text.encode("utf-8-sig"))
    assert load_rows(INTENT, "test", source=tmp_path) == [row]


@pytest.mark.parametrize("name", ["val", "validate", "dev"])
def test_a_split_is_found_under_its_other_names(tmp_path, name):
    for split, row in zip(("train", name, "test"), commands(3), strict=True):
        write(tmp_path / f"{split}.jsonl", [row])
    assert load_rows(INTENT, "validation", source=tmp_path) == commands(3)[1:2]


def test_a_name_that_serves_as_train_does_not_serve_as_validation_too(tmp_path):
    rows = [{"mr": f"name[{number}]", "ref": f"{number}."} for number in range(60)]
    write(tmp_path / "dev.jsonl", rows[:50])
    write(tmp_path / "test.jsonl", rows[50:])
    found = splits_of(tmp_path, TASKS["e2e"])
    assert len(found["train"]) + len(found["validation"]) == 50
    assert [row["mr"] for row in found["test"]] == [row["mr"] for row in rows[50:]]


def test_references_are_gathered_before_rows_are_sampled(tmp_path):
    write(tmp_path / "test.jsonl", [{"mr": "name[X]", "ref": "One."}, {"mr": "name[X]", "ref": "Two."}])
    (row,) = load_rows(TASKS["e2e"], "test", source=tmp_path, limit=1)
    assert row["references"] == ["One.", "Two."]


# ---------------------------------------------------------------- what a source lacks


def test_a_single_file_is_carved_into_disjoint_splits_that_never_change(tmp_path):
    rows = commands(500)
    found = splits_of(write(tmp_path / "all.jsonl", rows))
    assert sorted(row["text"] for part in found.values() for row in part) == sorted(
        row["text"] for row in rows
    )
    assert (
        370 < len(found["train"]) < 430
        and 25 < len(found["validation"]) < 75
        and 25 < len(found["test"]) < 75
    )
    write(tmp_path / "all.jsonl", rows[::-1] + commands(600)[500:])
    again = splits_of(tmp_path)
    assert all(
        {row["text"] for row in found[split]} <= {row["text"] for row in again[split]} for split in found
    )


def test_validation_is_carved_out_of_train_and_the_other_split_is_the_test(tmp_path):
    rows = commands(210)
    write(tmp_path / "train.jsonl", rows[:200])
    write(tmp_path / "validate.jsonl", rows[200:])
    found = splits_of(tmp_path)
    assert found["test"] == rows[200:]
    assert 5 < len(found["validation"]) < 40
    assert sorted(row["text"] for split in ("train", "validation") for row in found[split]) == sorted(
        row["text"] for row in rows[:200]
    )


def test_rows_of_one_prompt_stay_on_one_side(tmp_path):
    rows = [row | {"intent": intent} for row in commands(100) for intent in ("a", "b")]
    found = splits_of(write(tmp_path / "mine.jsonl", rows))
    for part in found.values():
        assert len(part) == 2 * len({row["text"] for row in part})


def test_a_limit_takes_a_seeded_sample_in_the_order_of_the_source(tmp_path):
    rows = commands(50)
    write(tmp_path / "test.jsonl", rows)
    sample = load_rows(INTENT, "test", source=tmp_path, limit=9, seed=1)
    assert len(sample) == 9 and sample == [row for row in rows if row in sample]
    assert sample == load_rows(INTENT, "test", source=tmp_path, limit=9, seed=1)
    assert sample != load_rows(INTENT, "test", source=tmp_path, limit=9, seed=2)
    assert load_rows(INTENT, "test", source=tmp_path, limit=99) == rows


def test_robot_rows_come_with_the_package_unless_a_source_is_named(tmp_path):
    assert len(load_rows(TASKS["robot"], "test")) == 336
    write(tmp_path / "test.jsonl", commands(2))
    assert load_rows(TASKS["robot"], "test", source=tmp_path) == commands(2)


# ---------------------------------------------------------------- the hub


def test_hub_rows_get_our_field_names_and_the_names_of_their_classes(monkeypatch):
    features = datasets.Features(
        {"text": datasets.Value("string"), "coarse_label": datasets.ClassLabel(names=["ABBR", "HUM"])}
    )
    part = datasets.Dataset.from_dict({"text": ["Who?"], "coarse_label": [1]}, features=features)
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return datasets.DatasetDict({"train": part, "test": part})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (row,) = load_rows(TASKS["trec"], "test")
    assert TASKS["trec"].target(row) == "HUM"
    assert asked == [("CogComp/trec", None)]


@pytest.mark.parametrize("task", ["trec", "clinc150"])
def test_a_data_set_that_is_a_program_is_read_from_the_hubs_parquet_files(monkeypatch, task):
    part = datasets.Dataset.from_dict({"text": ["Who?"], "coarse_label": ["HUM"], "intent": ["ask"]})
    asked = []

    def load_dataset(*names, revision=None):
        asked.append((*names, revision))
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found trec.py")
        return datasets.DatasetDict({"test": part})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_rows(TASKS[task], "test")) == 1
    names = (TASKS[task].hub_name, TASKS[task].hub_config)
    assert asked == [(*names, None), (*names, "refs/convert/parquet")]


def test_hidden_labels_of_the_hub_are_refused_not_scored(monkeypatch):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    part = datasets.Dataset.from_dict({"text": ["x"], "label": [-1]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: datasets.DatasetDict({"test": part}))
    with pytest.raises(DataError, match="row 1: the field 'label' is null"):
        load_rows(TASKS["sst2"], "test")


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it\nmore"),
        RuntimeError("Dataset scripts are no longer supported"),
        ValueError(),
    ],
)
def test_a_hub_that_fails_ends_in_one_error_that_names_the_way_out(monkeypatch, error):
    def load_dataset(*names, revision=None):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"cannot load 'openai/gsm8k' from the hub: .*--data .* question, answer"
    ):
        load_rows(TASKS["gsm8k"], "train")


def test_a_missing_datasets_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'shadowpeft\[hub\]'.*--data"):
        load_rows(TASKS["gsm8k"], "train")


def test_a_task_of_own_data_asks_for_it():
    with pytest.raises(DataError, match=r"pass --data .* fields text, label"):
        load_rows(CLASSES, "train")


# ---------------------------------------------------------------- data that cannot be used


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.jsonl", '{"text": "a", "intent": "b"}\n{"text": \n', r"line 2: not valid JSON .*correct"),
        ("test.jsonl", '["a", "b"]\n', r"line 1: expected a JSON object with named fields, found"),
        ("test.json", '[\n{"text": "a",}]', r"test.json, line 2: not valid JSON"),
        ("test.json", '{"text": "a"}', r"expected a list of objects"),
        ("test.jsonl", "", r"test holds no rows; expected rows with the fields text, intent"),
        ("test.jsonl", '{"text": "a", "intent": "b"}\n{"text": "a", "label": 1}\n',
         r"row 2: the field 'intent' is missing; .* needs text, intent, this row has text, label"),
        ("test.jsonl", '{"text": null, "intent": "b"}\n', r"row 1: the field 'text' is null"),
        ("test.jsonl.gz", "not gzipped", r"cannot read .*gzipped if named .gz"),
        ("all.jsonl", '{"text": "a", "intent": "b"}\n', r"has 1 rows, too few .* for test; add test.jsonl"),
        ("train.csv", "a,b\n", r"holds no data that can be read; expected files ending in .jsonl"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used_is_refused_with_place_and_way_out(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_rows(INTENT, "test", source=tmp_path)


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    (tmp_path / "test.jsonl").write_bytes(b'{"text": "caf\xe9", "intent": "x"}\n')
    with pytest.raises(DataError, match="expected UTF-8 text"):
        load_rows(INTENT, "test", source=tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"there is no data at .*absent; expected a folder"):
        load_rows(INTENT, "test", source=tmp_path / "absent")


def test_a_source_without_the_asked_split_lists_what_it_has(tmp_path):
    write(tmp_path / "test.jsonl", commands(2))
    with pytest.raises(DataError, match=r"has no 'train' split: expected one of train.jsonl .*; found test"):
        load_rows(INTENT, "train", source=tmp_path)


def test_one_split_in_two_formats_is_ambiguous(tmp_path):
    write(tmp_path / "test.jsonl", commands(2))
    write(tmp_path / "test.json", commands(3))
    with pytest.raises(DataError, match=r"one name with several endings: test.json, test.jsonl; keep one"):
        load_rows(INTENT, "test", source=tmp_path)


@pytest.mark.parametrize(
    ("split", "limit", "message"), [("dev", None, "unknown split 'dev'"), ("test", 0, "limit=0")]
)
def test_unknown_splits_and_empty_limits_are_refused(split, limit, message):
    with pytest.raises(DataError, match=message):
        load_rows(INTENT, split, limit=limit)

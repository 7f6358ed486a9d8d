"""Files and requests that somebody made up: they load, or they end in one of this package's errors; nothing else.

``SHADOWPEFT_FUZZ=20000 python -m pytest tests/test_fuzz.py`` tries that many cases in all; the suite a few hundred.
"""

import contextlib
import copy
import io
import json
import os
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from models import randomise, tiny_base, tiny_config
from shadowpeft import ShadowConfig, get_shadow_model
from shadowpeft.commands.describing import info
from shadowpeft.errors import AdapterError, CheckpointError, DataError, ShadowPeftError
from shadowpeft.model import checkpoint, load
from shadowpeft.model.checkpoint import load_adapter
from shadowpeft.model.tensors import CONFIG_FILE, WEIGHTS_FILE
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.data import load_rows
from shadowpeft.train.tasks import TASKS

NUM_TARGETS = 8
CASES = int(os.environ.get("SHADOWPEFT_FUZZ", "360")) // NUM_TARGETS
fuzz = settings(max_examples=CASES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
SCALARS = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | st.floats() | st.text(max_size=12)
HOSTILE = st.sampled_from(
    ["../../etc/passwd", "/etc/passwd", "..", "", "__class__", "implicit", "a\x00b", "os.system", 10**9, -1, 0]
)
VALUES = st.recursive(
    SCALARS | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(base, folder of a good adapter, its config, its weights file)."""
    base = tiny_base(num_hidden_layers=2)
    model = get_shadow_model(base, tiny_config(shadow_hidden_size=16))
    randomise(model.network())
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    base = model.unload()
    load_adapter(base, folder)
    return base, folder, json.loads((folder / CONFIG_FILE).read_text()), (folder / WEIGHTS_FILE).read_bytes()


def leaves(value, path=()):
    """Paths of everything inside a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from leaves(child, (*path, key))


@st.composite
def changed(draw, original):
    """A JSON value with up to three places replaced, removed or added."""
    value = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        places = list(leaves(value))
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        owner = value
        for key in way:
            owner = owner[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "remove":
            del owner[last]
        elif kind == "add" and isinstance(owner, dict):
            owner[draw(st.text(max_size=8))] = draw(VALUES)
        else:
            owner[last] = draw(VALUES)
    return value


@st.composite
def changed_bytes(draw, original):
    """Bytes with some flipped, cut off or put in."""
    content = bytearray(original)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "cut", "put"]))
        if kind == "flip" and content:
            content[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del content[at:]
        else:
            content[at:at] = draw(st.binary(max_size=8))
    return bytes(content)


def refused_or_whole(base, folder):
    """Whether the adapter loads; it may fail with this package's errors only, and then changes nothing."""
    before = len(list(base.named_modules()))
    try:
        network = load_adapter(base, folder)
    except ShadowPeftError:
        network = None
    assert len(list(base.named_modules())) == before
    return network is not None


def test_a_config_file_with_anything_in_it(place, tmp_path):
    base, _, good, weights = place
    (tmp_path / WEIGHTS_FILE).write_bytes(weights)

    @fuzz
    @given(changed(good))
    def attempt(described):
        (tmp_path / CONFIG_FILE).write_text(json.dumps(described))
        refused_or_whole(base, tmp_path)

    attempt()


@pytest.mark.parametrize("is_given", [True, False])
def test_an_adapter_of_commands_with_anything_in_its_config(place, tmp_path, monkeypatch, is_given):
    """Loaded on the base it names or on a given one, and described; a base that is asked for by any name is there."""
    base, _, good, weights = place
    (tmp_path / WEIGHTS_FILE).write_bytes(weights)
    for module in (load, checkpoint):
        monkeypatch.setattr(module, "load_model", lambda name, *, labels=None, **options: base)
    monkeypatch.setattr(load, "find_tokenizer", lambda *places: None)

    @fuzz
    @given(changed(good) | changed(good["base"]).map(lambda described: {**good, "base": described}))
    def attempt(described):
        (tmp_path / CONFIG_FILE).write_text(json.dumps(described))
        for read in (
            lambda: load.load_attached(str(tmp_path), base="given" if is_given else None)[0].unload(),
            lambda: info(str(tmp_path), Console(file=io.StringIO())),
        ):
            with contextlib.suppress(ShadowPeftError):
                read()

    attempt()


def test_a_config_file_with_damaged_bytes(place, tmp_path):
    base, folder, _, weights = place
    (tmp_path / WEIGHTS_FILE).write_bytes(weights)

    @fuzz
    @given(changed_bytes((folder / CONFIG_FILE).read_bytes()))
    def attempt(content):
        (tmp_path / CONFIG_FILE).write_bytes(content)
        refused_or_whole(base, tmp_path)

    attempt()


def test_a_weights_file_with_another_header_or_damaged_bytes(place, tmp_path):
    base, _, good, weights = place
    (tmp_path / CONFIG_FILE).write_text(json.dumps(good))
    size = struct.unpack("<Q", weights[:8])[0]
    header, body = json.loads(weights[8 : 8 + size]), weights[8 + size :]

    def with_header(described):
        text = json.dumps(described).encode()
        return struct.pack("<Q", len(text)) + text + body

    @fuzz
    @given(changed(header).map(with_header) | changed_bytes(weights))
    def attempt(content):
        (tmp_path / WEIGHTS_FILE).write_bytes(content)
        refused_or_whole(base, tmp_path)

    attempt()


def test_rows_of_anything(tmp_path):
    good = [{"text": "switch on the light", "intent": "light_on"}, {"text": "stop", "intent": "stop", "more": [1]}]
    lines = st.lists(changed(good).map(lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode()), max_size=2)
    raw = changed_bytes("".join(json.dumps(row) + "\n" for row in good).encode())

    @fuzz
    @given(lines.map(b"".join) | raw, st.sampled_from(["intent", "classification", "sst2", "gsm8k", "mmlu"]))
    def attempt(content, task):
        (tmp_path / "train.jsonl").write_bytes(content)
        try:
            rows = load_rows(TASKS[task], "train", source=tmp_path)
        except DataError:
            return
        assert all(isinstance(TASKS[task].prompt(row), str) and isinstance(TASKS[task].target(row), str) for row in rows)

    attempt()


def test_settings_of_anything():
    good = {**TrainConfig().to_dict(), "shadow": ShadowConfig().to_dict()}

    @fuzz
    @given(changed(good))
    def attempt(values):
        try:
            TrainConfig.from_dict(values)
        except ShadowPeftError:
            return

    attempt()


def test_request_bodies_of_anything():
    protocol = pytest.importorskip("shadowpeft.deploy.serve.protocol", exc_type=ImportError)
    from shadowpeft.deploy.serve.errors import ApiError

    good = {"model": "robot", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "stop": ["."]}
    good |= {"temperature": 0.5, "top_p": 0.9, "n": 2, "seed": 1, "stream": False, "max_tokens": 5, "logprobs": True}

    @fuzz
    @given(changed(good).map(lambda body: json.dumps(body).encode()) | changed_bytes(json.dumps(good).encode()))
    def attempt(body):
        for kind in (protocol.ChatRequest, protocol.CompletionRequest):
            try:
                protocol.parse(kind, body)
            except ApiError as error:
                assert 400 <= error.status < 500

    attempt()


@pytest.mark.parametrize("name", ["../other", "..", "a/../../b", "/absolute", "a\\b", "a\x00b"])
def test_a_name_that_leaves_its_folder_is_no_name_of_an_adapter(place, name):
    model = get_shadow_model(tiny_base(num_hidden_layers=2), tiny_config())
    with pytest.raises(AdapterError):
        model.add_adapter(name, tiny_config())


def test_a_shard_list_that_points_out_of_its_folder_is_refused(tmp_path):
    from shadowpeft.model.pretrained import projected_tensors

    (tmp_path / "shadow").mkdir()
    (tmp_path / "secret.safetensors").write_bytes(b"")
    index = {"weight_map": {"shadow_model.x": "../secret.safetensors"}}
    (tmp_path / "shadow" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside"):
        projected_tensors(str(tmp_path / "shadow"))


def test_sizes_that_the_weights_do_not_have_are_refused_before_memory_is_asked_for(place, tmp_path):
    base, _, good, weights = place
    (tmp_path / WEIGHTS_FILE).write_bytes(weights)
    for part, name in (("shadow", "r"), ("shadow", "update_hidden_size"), ("backbone", "intermediate_size"),
                       ("backbone", "num_hidden_layers"), ("backbone", "hidden_size")):  # fmt: skip
        described = copy.deepcopy(good)
        described[part][name] = 10**12
        (tmp_path / CONFIG_FILE).write_text(json.dumps(described))
        with pytest.raises(CheckpointError):
            load_adapter(base, tmp_path)
    assert torch.isfinite(base.lm_head.weight).all()

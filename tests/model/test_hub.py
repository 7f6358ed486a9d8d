"""Adapters to and from a hub over HTTP, and without a network; each in a process with the hub's settings of its own."""

import json
import os
import subprocess
import sys

import pytest

from hub import commit_id, hub, read_folder
from workbench import write_base

TRAIN_AND_PUSH = """
import torch
from transformers import AutoModelForCausalLM
from shadowpeft import ShadowConfig, ShadowModel, get_shadow_model

base = AutoModelForCausalLM.from_pretrained("someone/tiny")
model = get_shadow_model(base, ShadowConfig(r=4, update_hidden_size=3, shadow_intermediate_size=24))
with torch.no_grad():
    for weight in model.network().parameters():
        weight.add_(torch.randn_like(weight), alpha=0.2)
print(model.push_to_hub("adapter", token="hf_secret", private=True))
loaded = ShadowModel.from_pretrained("me/adapter")
ids = torch.arange(3, 12)[None]
assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
assert not torch.equal(loaded(ids).logits, loaded(ids, adapter="__base__").logits)
"""

LOAD_OFFLINE = """
import torch
from shadowpeft import ShadowModel
from shadowpeft.errors import CheckpointError

model = ShadowModel.from_pretrained("me/adapter")
print(model(torch.arange(3, 12)[None]).logits.shape)
try:
    ShadowModel.from_pretrained("me/never-fetched")
except CheckpointError as error:
    print(error)
"""


def run(code, address, home, *arguments, offline):
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """(repositories after a push, requests, tokens, what the offline process printed, its requests)."""
    folder = tmp_path_factory.mktemp("hub")
    repositories = {"someone/tiny": read_folder(write_base(folder / "base"))}
    with hub(repositories) as server:
        printed = run(TRAIN_AND_PUSH, server.address, folder / "cache", offline=False)
        num_requests = len(server.requests)
        alone = run(LOAD_OFFLINE, server.address, folder / "cache", offline=True)
        return {
            "repositories": repositories,
            "tokens": set(server.tokens),
            "printed": printed,
            "address": server.address,
            "offline": alone,
            "asked": server.requests[:num_requests],
            "asked_offline": server.requests[num_requests:],
        }


def test_an_adapter_is_pushed_whole_with_the_token_and_loads_by_its_name(pushed):
    assert pushed["printed"].startswith(f"{pushed['address']}/me/adapter/commit/")
    assert sorted(pushed["repositories"]["me/adapter"]) == ["README.md", "shadow_config.json", "shadow_model.safetensors"]
    assert pushed["tokens"] == {"Bearer hf_secret"}
    assert b"base_model: someone/tiny" in pushed["repositories"]["me/adapter"]["README.md"]


def test_without_a_network_what_was_fetched_loads_and_nothing_is_asked(pushed):
    assert "torch.Size([1, 9, 320])" in pushed["offline"]
    assert pushed["asked_offline"] == []


def test_without_a_network_what_was_not_fetched_ends_in_one_error(pushed):
    assert "'me/never-fetched' is neither a local folder nor an adapter that could be fetched" in pushed["offline"]


def test_the_bases_commit_is_recorded_and_is_what_loading_asks_for(pushed):
    """The base was loaded by transformers alone, whose configs do not tell."""
    described = json.loads(pushed["repositories"]["me/adapter"]["shadow_config.json"])
    commit = commit_id(pushed["repositories"]["someone/tiny"])
    assert described["base"]["revision"] == commit
    assert any(f"someone/tiny/revision/{commit}" in request or f"resolve/{commit}/" in request for request in pushed["asked"])


PUSH_WHILE_TRAINING = """
import sys
import torch
from transformers import AutoModelForCausalLM, TrainingArguments
from shadowpeft import ShadowConfig, get_shadow_model
from shadowpeft.train import ShadowTrainer

base = AutoModelForCausalLM.from_pretrained("someone/tiny")
model = get_shadow_model(base, ShadowConfig(r=4, update_hidden_size=3, shadow_intermediate_size=24))
arguments = TrainingArguments(
    output_dir=sys.argv[1], use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2, save_steps=1, push_to_hub=True,
    hub_model_id="me/run", hub_token="hf_secret", hub_strategy="all_checkpoints", hub_always_push=True,
)
rows = [{"input_ids": row, "labels": row} for row in torch.arange(3, 35).view(4, 8)]
ShadowTrainer(model, arguments, train_dataset=rows).train()
"""


def test_a_run_pushes_whole_checkpoints_and_the_newest_adapter(tmp_path):
    repositories = {"someone/tiny": read_folder(write_base(tmp_path / "base"))}
    with hub(repositories) as server:
        run(PUSH_WHILE_TRAINING, server.address, tmp_path / "cache", str(tmp_path / "run"), offline=False)
    pushed, saved = repositories["me/run"], tmp_path / "run"
    for name in ("shadow_config.json", "shadow_model.safetensors", "README.md"):
        assert pushed[name] == pushed[f"checkpoint-2/{name}"] == (saved / "checkpoint-2" / name).read_bytes()
    for number in (1, 2):
        names = {path.name for path in (saved / f"checkpoint-{number}").iterdir()}
        assert names == {name.partition("/")[2] for name in pushed if name.startswith(f"checkpoint-{number}/")}
    assert not [name for name in pushed if ".saving" in name]

"""Saving and loading: exact, adapter only, and every kind of wrong file refused with one clear error."""

import errno
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import ShadowModel, get_shadow_model
from shadowpeft.errors import AdapterError, ArchitectureError, CheckpointError, ConfigError
from shadowpeft.files import SaveError
from shadowpeft.model import adapter_config, bases, checkpoint, hub
from shadowpeft.model.fingerprint import fingerprint

pytestmark = pytest.mark.contract


@pytest.fixture
def saved(tmp_path):
    model = get_shadow_model(tiny_base(), tiny_config())
    randomise(model.network())
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def edit(folder, change):
    described = json.loads((folder / "shadow_config.json").read_text())
    change(described)
    (folder / "shadow_config.json").write_text(json.dumps(described))


def edit_tensors(folder, change):
    tensors = load_file(folder / "shadow_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "shadow_model.safetensors")


def load(folder, base=None, **options):
    return ShadowModel.from_pretrained(folder, base or tiny_base(), **options)


def test_the_adapter_folder_holds_the_adapter_and_nothing_of_the_base(saved):
    folder, model = saved
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "shadow_config.json",
        "shadow_model.safetensors",
    ]
    tensors = load_file(folder / "shadow_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == model.network().num_parameters()


def test_all_variants_survive_saving_and_loading(tmp_path):
    variants = [
        {},
        {"share_steps": True},
        {"use_update": False},
        {"first_block": 0, "update_bias": True, "update_norm": "none"},
        {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2},
        {"share_embeddings": False},
        {"share_embeddings": False, "shadow_hidden_size": 16, "shadow_head_dim": 4, "shadow_num_hidden_layers": 2},
    ]
    for index, variant in enumerate(variants):
        model = get_shadow_model(tiny_base(), tiny_config(**variant))
        randomise(model.network())
        model.save_pretrained(tmp_path / str(index))
        assert torch.equal(load(tmp_path / str(index))(tokens()).logits, model(tokens()).logits)


def test_an_adapter_loads_onto_the_same_base_in_another_dtype(saved):
    folder, _ = saved
    assert load(folder, tiny_base(dtype=torch.bfloat16))(tokens()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_16_bit_shadow_detached_and_reloaded_agrees_far_into_a_text(tmp_path, dtype):
    """transformers makes rotary frequencies anew in fp32; 16-bit ones would be off by more the further the position."""
    base = tiny_base(dtype=torch.float32, max_position_embeddings=256)
    model = get_shadow_model(base, tiny_config(adapter_dtype=dtype))
    randomise(model.network())
    detached = model.detach()
    detached.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    ids = tokens(1, 240)
    assert reloaded.dtype == detached.dtype == getattr(torch, dtype)
    assert torch.equal(reloaded(ids).logits, detached(ids).logits)


def test_a_loaded_adapter_is_frozen_unless_asked_otherwise(saved):
    folder, model = saved
    assert load(folder).get_nb_trainable_parameters()[0] == 0
    assert load(folder, is_trainable=True).get_nb_trainable_parameters()[0] == model.network().num_parameters()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (lambda: tiny_base(num_hidden_layers=5), "num_blocks=4 .*num_blocks=5"),
        (lambda: tiny_base(num_hidden_layers=3), "num_blocks=4 .*num_blocks=3"),
        (lambda: tiny_base(hidden_size=64, head_dim=16), "hidden_size=32 .*hidden_size=64"),
        (lambda: tiny_base("qwen3"), "model_type='llama' .*model_type='qwen3'"),
        (lambda: tiny_base(vocab_size=98), "vocab_size=97 .*vocab_size=98"),
    ],
)
def test_a_base_of_another_shape_is_refused(saved, base, message):
    with pytest.raises(CheckpointError, match=message):
        load(saved[0], base())


def test_other_weights_of_the_same_shape_are_refused_unless_allowed(saved):
    base = tiny_base()
    with torch.no_grad():
        for parameter in base.model.layers[2].parameters():
            parameter.mul_(-1.5)
    with pytest.raises(CheckpointError, match=r"other weights than the one .*allow_other_weights=True"):
        load(saved[0], base)
    assert load(saved[0], base, allow_other_weights=True)(tokens()).logits.shape == (2, 9, 97)


def test_a_table_of_a_real_size_has_a_fingerprint():
    """GPT-2's: its last index is no fp32 number, and the nearest one is past the end."""
    base = tiny_base("gpt2")
    table = torch.zeros(50257, 768, dtype=torch.bfloat16)
    table.view(-1)[0], table.view(-1)[-1] = 1.0, 2.0
    base.transformer.wte.weight = torch.nn.Parameter(table)
    assert fingerprint(base)["wte.weight"] == [1.0, *[0.0] * 6, 2.0]


def test_a_failed_load_leaves_the_model_as_it_was(saved):
    folder, model = saved
    expected = model(tokens()).logits
    edit_tensors(folder, lambda tensors: tensors.pop("update_norm.bias"))
    with pytest.raises(CheckpointError, match=r"1 tensors are missing \(first 'update_norm.bias'\)"):
        model.load_adapter(folder, "second")
    assert list(model.networks) == ["default"]
    assert torch.equal(model(tokens()).logits, expected)


def test_a_second_adapter_without_a_name_is_told_to_take_one(saved):
    folder, model = saved
    with pytest.raises(AdapterError, match="'default'; give this one another name, as in adapter_name='other'"):
        model.load_adapter(folder)
    model.load_adapter(folder, "other")
    assert list(model.networks) == ["default", "other"]


def test_the_order_of_pefts_from_pretrained_is_named(saved):
    base = tiny_base()
    with pytest.raises(ConfigError, match=r"adapter comes first and the base second.*argument is a LlamaForCausalLM"):
        ShadowModel.from_pretrained(base, saved[0])
    assert all(p.requires_grad for p in base.parameters())


def test_a_path_in_the_home_folder_is_one(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    _, model = saved
    expected = model(tokens()).logits
    model.save_pretrained("~/ours")
    assert (tmp_path / "ours" / "shadow_config.json").is_file()
    model.load_adapter("~/ours", "other")
    assert torch.equal(model(tokens(), adapter="other").logits, expected)
    assert torch.equal(load("~/ours")(tokens()).logits, expected)


def test_an_unknown_tensor_is_refused(saved):
    edit_tensors(saved[0], lambda tensors: tensors.update(surplus=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"1 are unknown \(first 'surplus'\)"):
        load(saved[0])


def test_a_tensor_of_another_shape_is_refused(saved):
    edit_tensors(saved[0], lambda tensors: tensors.update({"update_norm.bias": torch.zeros(7)}))
    with pytest.raises(CheckpointError, match=r"'update_norm.bias' has shape \[7\], expected \[32\]"):
        load(saved[0])


@pytest.mark.parametrize("kept", [0, 3, 100, -10])
def test_a_truncated_weight_file_is_named(saved, kept):
    path = saved[0] / "shadow_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"shadow_model.safetensors is damaged or cut short"):
        load(saved[0])


@pytest.mark.parametrize("name", ["shadow_config.json", "shadow_model.safetensors"])
def test_a_missing_file_is_named(saved, name):
    (saved[0] / name).unlink()
    with pytest.raises(CheckpointError, match=f"holds no {name}"):
        load(saved[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["shadow"].update(shadow_alfa=1), "unknown key 'shadow_alfa'.*did you mean 'shadow_alpha'"),
        (lambda d: d["shadow"].update(r=-1), "r=-1 is not valid"),
        (lambda d: d.update(base={}), "base lacks architecture, fingerprint, hidden_size"),
        (lambda d: d["base"].pop("id2label"), "base lacks id2label"),
        (lambda d: d["base"].update(num_labels=2), r"base\.id2label is not of the kind"),
        (lambda d: d["base"].update(num_labels=2, id2label={"0": "no", "2": "yes"}), r"base\.id2label is not of the kind"),
        (lambda d: d["base"].update(num_labels="2"), r"base\.num_labels, base\.id2label is not of the kind"),
        (lambda d: d["base"].update(num_blocks=True, architecture=None), r"base\.architecture, base\.num_blocks is not"),
        (lambda d: d.update(extra=1), "unknown key 'extra'"),
        (lambda d: d.pop("base"), "lacks base"),
        (lambda d: d.update(format="other"), "not in the shadowpeft format"),
        (lambda d: d.update(format_version=99), "format version 99"),
        (lambda d: d.update(backbone=[]), "'backbone' must be an object"),
    ],
)
def test_a_wrong_config_file_is_refused_and_the_key_named(saved, change, message):
    edit(saved[0], change)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load(saved[0])


def test_a_config_that_is_not_json_is_named(saved):
    (saved[0] / "shadow_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load(saved[0])


def test_a_folder_that_is_not_there_is_refused_without_asking_the_hub():
    with pytest.raises(CheckpointError, match="neither a local folder nor an adapter"):
        load("no/such-adapter")


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_one_set_of_steps_beside_a_deep_base_loads(tmp_path, model_type):
    """Few tensors, fewer than the number of blocks that the backbone's config takes over from the base's."""
    base = tiny_base(model_type, max_window_layers=64)
    get_shadow_model(base, tiny_config(share_steps=True)).save_pretrained(tmp_path)
    assert load(tmp_path, tiny_base(model_type, max_window_layers=64)).shadow_config.share_steps


def test_sizes_that_are_not_used_do_not_count(tmp_path):
    """The MLP width that an implicit shadow would have, beside an explicit one and a base where nothing is as wide."""
    get_shadow_model(tiny_base(), tiny_config(shadow_model="base:first:1")).save_pretrained(tmp_path)
    edit(tmp_path, lambda described: described["shadow"].update(shadow_intermediate_size=10**6))  # once it could be asked for
    load(tmp_path)


def test_a_full_disk_leaves_the_old_checkpoint_whole(saved, monkeypatch):
    folder, model = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    randomise(model.network(), seed=9)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(SaveError, match="No space left on device; the files that were there are unchanged"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_where_a_file_is_in_the_way_is_refused(saved, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(SaveError, match="choose another folder"):
        saved[1].save_pretrained(tmp_path / "taken")


def test_saving_again_replaces_the_weights_and_keeps_an_edited_card(saved):
    folder, model = saved
    (folder / "README.md").write_text("mine")
    randomise(model.network(), seed=9)
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    assert torch.equal(load(folder)(tokens()).logits, model(tokens()).logits)


def test_the_base_is_found_by_the_name_the_adapter_carries(tmp_path):
    tiny_base().save_pretrained(tmp_path / "base")
    base = type(tiny_base()).from_pretrained(tmp_path / "base", dtype=torch.float64)
    model = get_shadow_model(base, tiny_config())
    randomise(model.network())
    model.save_pretrained(tmp_path / "adapter")
    alone = ShadowModel.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
    assert torch.equal(alone(tokens()).logits, model(tokens()).logits)
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(ArchitectureError, match="cannot load the base"):
        ShadowModel.from_pretrained(tmp_path / "adapter")


COMMIT = "0123456789" * 4


def test_a_base_of_the_hub_is_loaded_at_the_commit_the_adapter_was_trained_on(saved, monkeypatch):
    asked = []

    def load_model(name, *, labels, **options):
        asked.append((name, options))
        raise ArchitectureError("there is no such commit")

    monkeypatch.setattr(checkpoint, "load_model", load_model)
    edit(saved[0], lambda described: described["base"].update(name_or_path="someone/tiny", revision=COMMIT))
    with pytest.raises(ArchitectureError, match=rf"no such commit\. .* trained on commit {COMMIT}; pass revision='main'"):
        ShadowModel.from_pretrained(saved[0])
    with pytest.raises(ArchitectureError, match=r"^there is no such commit$"):
        ShadowModel.from_pretrained(saved[0], revision="main")
    edit(saved[0], lambda described: described["base"].update(name_or_path=str(saved[0])))  # a folder has none
    with pytest.raises(ArchitectureError):
        ShadowModel.from_pretrained(saved[0])
    assert asked == [
        ("someone/tiny", {"revision": COMMIT}),
        ("someone/tiny", {"revision": "main"}),
        (str(saved[0]), {}),
    ]
    edit(saved[0], lambda described: described["base"].update(revision=3))
    with pytest.raises(CheckpointError, match=r"base\.revision is not of the kind"):
        load(saved[0])


def test_the_error_of_other_weights_names_the_commit_they_were_of(saved):
    edit(saved[0], lambda described: described["base"].update(name_or_path="someone/tiny", revision=COMMIT))
    base = tiny_base()
    with torch.no_grad():
        base.model.embed_tokens.weight.mul_(-1.5)
    with pytest.raises(CheckpointError, match=f"'someone/tiny' at commit {COMMIT}"):
        load(saved[0], base)


@pytest.mark.parametrize("others", [0, 1])
def test_a_model_loaded_by_transformers_is_of_the_only_commit_in_the_cache(tmp_path, monkeypatch, others):
    for commit in (COMMIT, COMMIT[::-1])[: 1 + others]:
        folder = tmp_path / "models--someone--tiny/snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    monkeypatch.setattr(bases, "HF_HUB_CACHE", str(tmp_path))
    base = tiny_base()
    base.name_or_path = "someone/tiny"
    assert bases.commit_of(base) == (None if others else COMMIT)


def test_a_base_is_compared_without_taking_a_fingerprint_of_it_anew(saved, monkeypatch):
    monkeypatch.setattr(adapter_config, "fingerprint", lambda base: pytest.fail("a fingerprint that nobody reads"))
    load(saved[0])


def test_the_users_home_is_found(saved, monkeypatch):
    folder, model = saved
    monkeypatch.setenv("HOME", str(folder.parent))
    assert torch.equal(load("~/adapter")(tokens()).logits, model(tokens()).logits)
    model.save_pretrained("~/again")
    assert content(folder.parent / "again") == content(folder)


def test_a_classifier_keeps_its_heads_and_label_names(tmp_path):
    base = tiny_base(labels=3)
    base.config.id2label = {0: "red", 1: "green", 2: "blue"}
    model = get_shadow_model(base, tiny_config(task_type="SEQ_CLS"))
    randomise(model.network())
    model.save_pretrained(tmp_path)
    described = adapter_config.read_config(tmp_path)["base"]
    assert described["id2label"] == {"0": "red", "1": "green", "2": "blue"}
    fresh = tiny_base(labels=3)
    torch.nn.init.normal_(fresh.score.weight)  # as whenever a classifier is made from a language model's folder
    loaded = load(tmp_path, fresh)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    with pytest.raises(CheckpointError, match=r"num_labels=3 .*num_labels=4"):
        load(tmp_path, tiny_base(labels=4))
    with pytest.raises(CheckpointError, match="architecture='LlamaForSequenceClassification'"):
        load(tmp_path, tiny_base())


@pytest.fixture
def uploads(monkeypatch):
    """Every call of the hub's API, which does nothing."""
    calls = []

    class FakeApi:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))
            return type("Repo", (), {"repo_id": "me/" + repo_id})

        def create_branch(self, repo_id, **options):
            calls.append(("branch", repo_id, options))

        def upload_folder(self, *, repo_id, folder_path, allow_patterns, **options):
            calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir()), options))
            return type("Commit", (), {"commit_url": "address of the commit"})

    monkeypatch.setattr(hub, "HfApi", FakeApi)
    return calls


def uploaded(**options):
    options = {"commit_message": "Upload ShadowPEFT adapter", "revision": None, "create_pr": False, **options}
    return ("upload", "me/adapter", ["README.md", "shadow_config.json", "shadow_model.safetensors"], options)


def test_push_to_hub_uploads_the_three_files_and_no_more(saved, uploads):
    assert saved[1].push_to_hub("adapter", token="secret", private=True) == "address of the commit"
    assert uploads == [("token", "secret"), ("create", "adapter", {"private": True, "exist_ok": True}), uploaded()]


def test_an_upload_while_saving_is_as_private_and_goes_where_it_was_told(saved, uploads):
    folder, model = saved
    options = {"commit_message": "better", "revision": "v2", "create_pr": True}
    model.save_pretrained(folder, push_to_hub=True, token="secret", private=True, max_shard_size="1GB", **options)
    create = ("create", "adapter", {"private": True, "exist_ok": True})
    branch = ("branch", "me/adapter", {"branch": "v2", "exist_ok": True})
    assert uploads == [("token", "secret"), create, branch, uploaded(**options)]
    with pytest.raises(TypeError, match="privat"):
        model.save_pretrained(folder, push_to_hub=True, privat=True)
    assert len(uploads) == 4


def test_a_branch_is_made_before_it_is_pushed_to_but_not_that_of_a_pull_request(saved, uploads):
    for revision in ("v2", "refs/pr/3"):
        saved[1].push_to_hub("adapter", revision=revision)
    kinds = [call[0] for call in uploads]
    assert kinds == ["token", "create", "branch", "upload", "token", "create", "upload"]


def test_an_argument_that_saving_does_not_have_is_refused_before_anything_is_written(saved, tmp_path):
    with pytest.raises(TypeError, match="unexpected keyword argument 'adapter'"):
        saved[1].save_pretrained(tmp_path / "new", adapter="second")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
def test_the_state_dict_of_a_wrapped_model_saves_the_adapter(saved, tmp_path, prefix):
    folder, model = saved
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "again", state_dict=state)
    assert content(tmp_path / "again") == content(folder)


def test_a_state_dict_without_the_adapter_is_refused_and_nothing_written(saved, tmp_path):
    state = {"wrapper." + name: tensor for name, tensor in saved[1].state_dict().items()}
    with pytest.raises(CheckpointError, match=r"2. of its 2. tensors are missing and 0 are unknown.* or none"):
        saved[1].save_pretrained(tmp_path / "again", state_dict=state)
    assert not (tmp_path / "again").exists()


def test_options_for_a_base_beside_a_base_are_refused(saved):
    with pytest.raises(ConfigError, match=r"revision, token would load a base.*hub_options"):
        ShadowModel.from_pretrained(saved[0], tiny_base(), revision="v2", token="secret")


def test_the_card_names_the_base_but_no_path_of_this_machine(tmp_path):
    base = tiny_base()
    base.name_or_path = "someone/tiny-llama"
    model = get_shadow_model(base, tiny_config())
    model.save_pretrained(tmp_path / "hub")
    assert "base_model: someone/tiny-llama\nbase_model_relation: adapter" in (tmp_path / "hub/README.md").read_text()
    base.name_or_path = str(tmp_path)
    model.save_pretrained(tmp_path / "local")
    assert str(tmp_path) not in (tmp_path / "local/README.md").read_text()
    for name, title in (("", "(not named)"), ("embedded", "embedded"), ("a/folder/elsewhere", "elsewhere")):
        base.name_or_path = name
        model.save_pretrained(tmp_path / title)
        card = (tmp_path / title / "README.md").read_text()
        assert "base_model:" not in card, "the hub would look for it"
        assert f"# ShadowPEFT adapter for {title}\n" in card


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_disk_that_fills_up_while_files_are_synced_leaves_the_old_checkpoint_whole(saved, monkeypatch):
    folder, model = saved
    expected, before = model(tokens()).logits, content(folder)
    randomise(model.network(), seed=9)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SaveError, match="No space left on device; the files that were there are unchanged"):
            model.save_pretrained(folder)
    assert content(folder) == before
    assert torch.equal(load(folder)(tokens()).logits, expected)


@pytest.mark.parametrize("lost", ["shadow_config.json", "shadow_model.safetensors"])
def test_files_of_two_saves_are_told_apart(saved, lost):
    """As a crash between moving the two files leaves them, whichever came first."""
    folder, model = saved
    old = (folder / lost).read_bytes()
    randomise(model.network(), seed=9)
    model.save_pretrained(folder)
    (folder / lost).write_bytes(old)
    with pytest.raises(CheckpointError, match="come from two different saves"):
        load(folder)


def test_saving_twice_writes_the_same_bytes(saved):
    folder, model = saved
    before = content(folder)
    model.save_pretrained(folder)
    assert content(folder) == before

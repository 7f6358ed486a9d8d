"""Ten adapters on one pretrained shadow cost ten small files; and what changed under them is noticed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import ShadowModel, get_shadow_model
from shadowpeft.errors import CheckpointError, ConfigError

WEIGHTS = "shadow_model.safetensors"


@pytest.fixture
def pretrained(tmp_path):
    narrow = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    tiny_base("qwen3", dtype=torch.float32, **narrow).save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


def task_adapter(shadow_model: str, *, seed: int = 1, base=None, **fields) -> ShadowModel:
    model = get_shadow_model(base or tiny_base(), tiny_config(shadow_model=shadow_model, **fields))
    for name, module in model.network().named_children():
        if name != "backbone":
            randomise(module, seed=seed)
    return model


def test_a_frozen_backbone_is_left_out_and_comes_back_bit_for_bit(pretrained, tmp_path):
    logits = []
    for seed in (1, 2):
        model = task_adapter(str(pretrained), seed=seed, freeze_backbone=True)
        model.save_pretrained(tmp_path / f"small{seed}", share_backbone=True)
        model.save_pretrained(tmp_path / f"full{seed}")
        assert not any(name.startswith("backbone.") for name in load_file(tmp_path / f"small{seed}" / WEIGHTS))
        sizes = [(tmp_path / f"{kind}{seed}" / WEIGHTS).stat().st_size for kind in ("small", "full")]
        assert sizes[0] < sizes[1] / 2
        loaded = ShadowModel.from_pretrained(tmp_path / f"small{seed}", tiny_base())
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
        logits.append(loaded(tokens()).logits)
    assert not torch.allclose(*logits)


def test_a_trained_backbone_shares_its_frozen_token_table_alone(pretrained, tmp_path):
    model = task_adapter(str(pretrained))
    with torch.no_grad():
        for parameter in model.network().backbone.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    model.save_pretrained(tmp_path / "saved", share_backbone=True)
    described = json.loads((tmp_path / "saved/shadow_config.json").read_text())
    assert described["shared_backbone"]["tensors"] == ["backbone.embed_tokens.weight"]
    loaded = ShadowModel.from_pretrained(tmp_path / "saved", tiny_base())
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_blocks_of_the_base_itself_are_left_out_too(tmp_path):
    model = task_adapter("base:last:2", freeze_backbone=True)
    model.save_pretrained(tmp_path / "saved", share_backbone=True)
    assert not any(name.startswith("backbone.") for name in load_file(tmp_path / "saved" / WEIGHTS))
    loaded = ShadowModel.from_pretrained(tmp_path / "saved", tiny_base())
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_blocks_of_the_base_are_taken_in_the_dtype_it_is_loaded_in(tmp_path, dtype):
    base = tiny_base(dtype=torch.float32)
    model = task_adapter("base:last:2", base=base, freeze_backbone=True, adapter_dtype="float32")
    model.save_pretrained(tmp_path / "saved", share_backbone=True)
    cast = tiny_base(dtype=torch.float32).to(dtype)
    loaded = ShadowModel.from_pretrained(tmp_path / "saved", cast)
    found, blocks = loaded.network().backbone.layers[-1].state_dict(), cast.model.layers[-1].state_dict()
    assert all(torch.equal(tensor, blocks[name].float()) for name, tensor in found.items())
    other = tiny_base(dtype=torch.float32)
    randomise(other)
    with pytest.raises(CheckpointError, match="fingerprinted tensors differ"):
        ShadowModel.from_pretrained(tmp_path / "saved", other.to(dtype))


def test_a_shadow_that_moved_is_found_where_it_is_now(pretrained, tmp_path):
    model = task_adapter(str(pretrained), freeze_backbone=True)
    model.save_pretrained(tmp_path / "saved", share_backbone=True)
    shutil.move(pretrained, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"cannot be loaded.*pass its place as shadow_model="):
        ShadowModel.from_pretrained(tmp_path / "saved", tiny_base())
    loaded = ShadowModel.from_pretrained(tmp_path / "saved", tiny_base(), shadow_model=str(tmp_path / "elsewhere"))
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_a_shadow_with_other_weights_is_refused(pretrained, tmp_path):
    task_adapter(str(pretrained), freeze_backbone=True).save_pretrained(tmp_path / "saved", share_backbone=True)
    other = tiny_base("qwen3", dtype=torch.float32, hidden_size=16, num_attention_heads=2, num_hidden_layers=2)
    randomise(other.model.norm)
    other.save_pretrained(pretrained)
    with pytest.raises(CheckpointError, match="other weights"):
        ShadowModel.from_pretrained(tmp_path / "saved", tiny_base())


def test_there_must_be_something_to_share(pretrained, tmp_path):
    with pytest.raises(ConfigError, match="implicit"):
        get_shadow_model(tiny_base(), tiny_config()).save_pretrained(tmp_path / "a", share_backbone=True)
    model = task_adapter(str(pretrained), freeze_embeddings=False)
    randomise(model.network())
    with pytest.raises(ConfigError, match="freeze_backbone=True"):
        model.save_pretrained(tmp_path / "a", share_backbone=True)
    assert not (tmp_path / "a").exists()


def test_a_frozen_backbone_gets_no_gradient_and_an_implicit_one_cannot_be_frozen(pretrained):
    model = task_adapter(str(pretrained), freeze_backbone=True).train()
    model(tokens(), labels=tokens()).loss.backward()
    gradients = {name: p.grad for name, p in model.network().named_parameters()}
    assert all(gradient is None for name, gradient in gradients.items() if name.startswith("backbone."))
    assert gradients["projection.weight"].any()
    with pytest.raises(ConfigError, match="freeze_backbone"):
        tiny_config(freeze_backbone=True)


def test_one_pretrained_shadow_serves_several_bases(pretrained):
    for base in (tiny_base(), tiny_base("gpt2"), tiny_base(hidden_size=48)):
        model = task_adapter(str(pretrained), base=base)
        assert model(tokens()).logits.shape == (2, 9, 97)

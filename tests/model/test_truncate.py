"""Blocks of the base as the shadow's first weights."""

import json

import pytest
import torch
from torch.testing import assert_close

from models import tiny_base, tiny_config, tokens
from shadowpeft import ShadowConfig, ShadowModel, get_shadow_model
from shadowpeft.errors import ArchitectureError, ConfigError
from shadowpeft.model.architectures import ARCHITECTURES, blocks_of, decoder_of
from shadowpeft.model.truncate import chosen_blocks


def test_first_last_and_evenly_spaced_blocks():
    assert chosen_blocks("first", 2, 12) == [0, 1]
    assert chosen_blocks("last", 2, 12) == [10, 11]
    assert chosen_blocks("spaced", 3, 12) == [0, 6, 11]
    assert chosen_blocks("spaced", 1, 12) == [0]
    assert chosen_blocks("spaced", 12, 12) == list(range(12))


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_all_blocks_of_the_base_as_its_shadow_give_the_bases_own_logits(model_type):
    base = tiny_base(model_type)
    model = get_shadow_model(base, tiny_config(shadow_model="base:first:4"))
    with torch.no_grad():
        assert_close(model(tokens(), output_shadow_logits=True).shadow_logits, base(tokens()).logits)


@pytest.mark.parametrize("where", ["first", "last", "spaced"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "smollm3"])
def test_the_shadow_holds_copies_of_the_chosen_blocks_and_of_the_final_norm(model_type, where):
    base = tiny_base(model_type)
    model = get_shadow_model(base, tiny_config(shadow_model=f"base:{where}:2"))
    theirs = [blocks_of(decoder_of(base))[index] for index in chosen_blocks(where, 2, 4)]
    for ours, block in zip(blocks_of(model.network().backbone), theirs, strict=True):
        weights = block.state_dict()
        assert all(torch.equal(p, weights[name].float()) for name, p in ours.state_dict().items())
        assert not {p.data_ptr() for p in ours.parameters()} & {p.data_ptr() for p in block.parameters()}


def test_a_truncated_shadow_is_trained_saved_and_loaded(tmp_path):
    model = get_shadow_model(tiny_base(), tiny_config(shadow_model="base:spaced:2")).train()
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.network().backbone.parameters())
    model.eval().save_pretrained(tmp_path)
    loaded = ShadowModel.from_pretrained(tmp_path, tiny_base())
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


@pytest.mark.parametrize("value", ["base:first", "base:middle:2", "base:first:0", "base:first:x"])
def test_a_misspelt_choice_of_blocks_is_refused(value):
    with pytest.raises(ConfigError, match="base:first:N"):
        tiny_config(shadow_model=value)


def test_sizes_beside_blocks_that_bring_their_own_are_refused_but_for_those_of_a_preset(tmp_path):
    sizes = {"shadow_hidden_size": 16, "shadow_num_hidden_layers": 2}
    base = tiny_base()
    base.save_pretrained(tmp_path)
    for where in ("base:first:1", str(tmp_path)):
        with pytest.raises(ConfigError, match=r"^shadow_num_hidden_layers=2, shadow_hidden_size=16 would be ignored.*implicit"):
            get_shadow_model(base, tiny_config(shadow_model=where, **sizes))
    attached = ShadowConfig.preset("attached", shadow_model="base:first:1")
    assert attached.r == 64 and not attached.idle_sizes
    assert get_shadow_model(base, attached).shadow_config == attached
    with pytest.raises(ConfigError, match="shadow_intermediate_size=32 would be ignored"):
        get_shadow_model(tiny_base(), attached.replace(shadow_intermediate_size=32))


def test_an_adapter_that_was_saved_with_sizes_that_did_nothing_loads(tmp_path):
    get_shadow_model(tiny_base(), tiny_config(shadow_model="base:first:1")).save_pretrained(tmp_path)
    file = tmp_path / "shadow_config.json"
    described = json.loads(file.read_text())
    described["shadow"].update(shadow_hidden_size=16, shadow_num_attention_heads=2)
    file.write_text(json.dumps(described))
    assert ShadowModel.from_pretrained(tmp_path, tiny_base()).shadow_config.shadow_hidden_size == 16


def test_more_blocks_than_there_are_and_blocks_that_depend_on_their_place_are_refused():
    with pytest.raises(ConfigError, match="5 blocks of a base that has 4"):
        get_shadow_model(tiny_base(), tiny_config(shadow_model="base:last:5"))
    with pytest.raises(ArchitectureError, match="base:first:1"):
        get_shadow_model(tiny_base("qwen3_moe", mlp_only_layers=[0]), tiny_config(shadow_model="base:last:1"))

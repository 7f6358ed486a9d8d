"""What the converters refuse. That they are right is tested against the peers themselves, in tests/parity."""

import pytest
import torch

from models import tiny_base
from shadowpeft import ShadowConfig, ShadowNetwork
from shadowpeft.errors import CheckpointError, ConfigError
from shadowpeft.model.build import assemble_network, build_network
from shadowpeft.model.convert import blocks_path, from_authors, from_peft, to_authors, to_peft

BLOCKS = "model.layers"


def network_of(preset: str, model_type: str = "llama", **fields: object) -> ShadowNetwork:
    sizes = {"r": 4, "update_hidden_size": 3, "shadow_intermediate_size": 24}
    return build_network(tiny_base(model_type), ShadowConfig.preset(preset, **sizes, **fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("first_block", 0),
        ("inject_from", "state"),
        ("use_update", False),
        ("share_steps", True),
        ("update_norm", "none"),
        ("update_activation", "gelu"),
        ("update_bias", True),
        ("dropout_at", "input"),
        ("transform_dropout", False),
        ("scale_state", True),
        ("inject_diagonal", True),
        ("inject_between", "sublayers"),
    ],
)
def test_a_variant_that_shadow_peft_lacks_is_refused_by_name(field, value):
    network = network_of("authors", **{field: value})
    with pytest.raises(ConfigError, match=rf"{field}={value!r} has no counterpart in shadow-peft"):
        to_authors(network)
    with pytest.raises(ConfigError, match=rf"{field}="):
        from_authors({}, network)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inject_from", "state"),
        ("use_update", False),
        ("share_steps", True),
        ("update_norm", "layernorm"),
        ("update_activation", "silu"),
        ("update_bias", False),
        ("dropout_at", "bottleneck"),
        ("transform_dropout", True),
        ("scale_state", True),
        ("inject_diagonal", True),
        ("inject_between", "sublayers"),
    ],
)
def test_a_variant_that_peft_lacks_is_refused_by_name(field, value):
    network = network_of("peft", **{field: value})
    with pytest.raises(ConfigError, match=rf"{field}={value!r} has no counterpart in peft"):
        to_peft(network, blocks=BLOCKS)
    with pytest.raises(ConfigError, match=rf"{field}="):
        from_peft({}, network, blocks=BLOCKS)


def test_where_dropout_sits_does_not_matter_without_dropout():
    network = network_of("peft", dropout_at="bottleneck", transform_dropout=True, shadow_dropout=0.0)
    assert "base_model.model.model.layers.0.shadow_down.default.weight" in to_peft(network, blocks=BLOCKS)


def test_shared_embeddings_of_another_width_are_refused_by_both():
    with pytest.raises(ConfigError, match="share_embeddings"):
        to_authors(network_of("authors", shadow_hidden_size=16))
    with pytest.raises(ConfigError, match="share_embeddings"):
        to_peft(network_of("peft", shadow_hidden_size=16), blocks=BLOCKS)


def test_an_explicit_shadow_that_shares_embeddings_is_refused_by_peft_alone():
    fields = {"shadow_model": "some/model", "share_embeddings": True}
    base, backbone = tiny_base(), tiny_base(num_hidden_layers=1).model
    backbone.embed_tokens = None
    to_authors(assemble_network(base, ShadowConfig.preset("authors", **fields), backbone))
    with pytest.raises(ConfigError, match="share_embeddings=True"):
        to_peft(assemble_network(base, ShadowConfig.preset("peft", **fields), backbone), blocks=BLOCKS)


def test_full_attention_in_the_shadow_of_a_base_with_windows_is_refused():
    network = network_of("authors", "gemma3_text", shadow_layer_types="full")
    with pytest.raises(ConfigError, match="shadow_layer_types='full'"):
        to_authors(network)
    to_authors(network_of("authors", "qwen3", shadow_layer_types="full"))


def test_the_papers_preset_fits_shadow_peft():
    network = network_of("paper")
    assert from_authors(to_authors(network), network).keys() == network.state_dict().keys()


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_tensors_of_another_network_are_refused_by_name(change):
    network = network_of("peft")
    tensors, name = to_peft(network, blocks=BLOCKS), f"base_model.model.{BLOCKS}.1.shadow_up.default.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unknown":
        name = name.replace(".1.", ".9.")
        tensors[name] = torch.zeros(1)
    else:
        tensors[name] = torch.zeros(32, 5)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        from_peft(tensors, network, blocks=BLOCKS)


def test_a_base_of_two_blocks_is_written_with_the_unused_norm_that_shadow_peft_has():
    network = build_network(tiny_base(num_hidden_layers=2), ShadowConfig.preset("authors"))
    tensors = to_authors(network)
    assert tensors["shadow_update_model.hidden_norm.weight"].shape == (32,)
    assert from_authors(tensors, network).keys() == network.state_dict().keys()


def test_steps_that_start_later_keep_the_blocks_own_numbers_in_pefts_names():
    network = network_of("peft", first_block=2)
    names = to_peft(network, blocks=BLOCKS)
    assert {name.split(".")[4] for name in names if "shadow_down" in name} == {"2", "3"}


@pytest.mark.parametrize(
    ("model_type", "path"), [("llama", "model.layers"), ("gpt2", "transformer.h"), ("opt", "model.decoder.layers")]
)
def test_the_path_of_the_blocks_is_their_name_in_the_base(model_type, path):
    assert blocks_path(tiny_base(model_type)) == path

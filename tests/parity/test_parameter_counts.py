"""The paper's trainable totals (Table 1), on the real shapes, without allocating a weight."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from shadowpeft import ShadowConfig, ShadowNetwork, get_shadow_model
from shadowpeft.model.build import assemble_network, set_trainable
from shadowpeft.model.convert import to_authors

COMMON = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
SHAPES = {
    "0.6B": {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "intermediate_size": 3072},
    "4B": {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 9728},
    "8B": {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 12288},
}
# base -> (heads of the shadow, h_g, published total)
PUBLISHED = {"0.6B": (16, 10, 9_073_920), "4B": (16, 8, 23_442_176), "8B": (8, 8, 29_118_720)}
PUBLISHED_EXPLICIT = 454_991_872


def qwen3(size: str) -> Qwen3Config:
    return Qwen3Config(**COMMON, **SHAPES[size])


def implicit_network(size: str) -> ShadowNetwork:
    heads, hidden, _ = PUBLISHED[size]
    config = ShadowConfig(update_hidden_size=hidden, shadow_num_attention_heads=heads)
    with torch.device("meta"):
        return get_shadow_model(Qwen3ForCausalLM(qwen3(size)), config).network()


def explicit_network() -> ShadowNetwork:
    """Qwen3-8B with a Qwen3-0.6B body, which reads its own, frozen token table."""
    config = ShadowConfig(shadow_model="Qwen/Qwen3-0.6B")
    with torch.device("meta"):
        network = assemble_network(Qwen3ForCausalLM(qwen3("8B")), config, Qwen3Model(qwen3("0.6B")))
    set_trainable(network, True)
    return network


def last_update(size: str, hidden: int) -> int:
    """W_T1, W_T2, W_G1, W_G2 behind the last block: in the published count, but they feed nothing, so not in ours."""
    return 4 * SHAPES[size]["hidden_size"] * hidden


@pytest.mark.parametrize("size", PUBLISHED)
def test_an_implicit_shadow_has_the_published_total_less_the_update_that_feeds_nothing(size):
    _, hidden, total = PUBLISHED[size]
    network = implicit_network(size)
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert network.num_parameters(only_trainable=True) == total - last_update(size, hidden)


@pytest.mark.parametrize("size", PUBLISHED)
def test_an_implicit_shadow_in_the_authors_layout_has_the_published_total(size):
    assert sum(tensor.numel() for tensor in to_authors(implicit_network(size)).values()) == PUBLISHED[size][-1]


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("preset", ["attached", "sublayers"])
def test_attached_and_sublayers_have_most_of_their_weights_in_the_corrections(size, preset):
    with torch.device("meta"):
        network = get_shadow_model(Qwen3ForCausalLM(qwen3(size)), ShadowConfig.preset(preset)).network()
    in_corrections = sum(parameter.numel() for part in network.step_parts for parameter in part.parameters())
    assert in_corrections > 0.8 * network.num_parameters(only_trainable=True)


def test_an_explicit_shadow_has_the_published_total_less_the_update_that_feeds_nothing():
    assert explicit_network().num_parameters(only_trainable=True) == PUBLISHED_EXPLICIT - last_update("8B", 10)


def test_an_explicit_shadow_in_the_authors_layout_has_the_published_total_and_its_frozen_token_table():
    tensors = to_authors(explicit_network())
    table = tensors.pop("shadow_model.embed_tokens.weight")
    assert table.shape == (151_936, 1024)
    assert sum(tensor.numel() for tensor in tensors.values()) == PUBLISHED_EXPLICIT

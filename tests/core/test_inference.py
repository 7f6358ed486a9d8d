"""The step without gradients computes what the step with gradients does."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from models import randomise, tiny_config
from shadowpeft.core import PRESETS, ShadowConfig, inference
from shadowpeft.core.network import ShadowNetwork

WIDTH, NUM_BLOCKS = 12, 4
VARIANTS = [
    *({"preset": name} for name in PRESETS),
    {"share_steps": True},
    {"use_update": False},
    {"inject_from": "state"},
    {"update_norm": "none"},
    {"first_block": 0},
    {"scale_state": True, "inject_diagonal": True},
    {"scale_state": True, "inject_diagonal": True, "inject_activation": "silu"},
    {"scale_state": True, "inject_activation": "gelu", "inject_from": "state"},
    {"inject_diagonal": True, "inject_from": "state", "use_update": False},
    {"scale_state": True, "inject_diagonal": True, "alpha_rank": 3},
    {"scale_state": True, "inject_diagonal": True, "inject_activation": "silu", "alpha_rank": 3},
    {"scale_state": True, "inject_branch": True},
    {"scale_state": True, "inject_branch": True, "inject_diagonal": True, "inject_activation": "silu", "first_block": 0},
    {"inject_between": "sublayers"},
    {"inject_between": "sublayers", "share_steps": True, "scale_state": True, "inject_branch": True},
]


def network(preset="paper", **overrides):
    config = ShadowConfig.preset(preset, **{"r": 4, "update_hidden_size": 3} | overrides)
    made = ShadowNetwork(
        config, nn.Identity(), width=WIDTH, num_blocks=NUM_BLOCKS, backbone_width=WIDTH, embedding_width=None
    )
    randomise(made)
    return made.eval()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_every_variant_gives_the_numbers_of_the_step_with_gradients(variant, tokens):
    made = network(**variant).double()
    h, s, added = torch.randn(3, 2, tokens, WIDTH, dtype=torch.float64).unbind()
    for block in range(NUM_BLOCKS):
        last = added if block else None
        expected = made.step(block, h, s, last)
        between = made.step_between(block, h, s, added)
        with torch.no_grad():
            found = inference.step(made, block, h, s, last)
            assert_close(made.step(block, h, s, last), found, rtol=0, atol=0)
            assert_close(made.step_between(block, h, s, added), between)
        assert_close(found, expected)


def test_it_leaves_its_inputs_alone():
    made = network()
    h, s = torch.randn(2, 1, 2, WIDTH).unbind()
    before = h.clone(), s.clone()
    with torch.no_grad():
        made.step(2, h, s)
    assert torch.equal(h, before[0])
    assert torch.equal(s, before[1])


def test_a_half_precision_base_keeps_its_type_over_full_precision_weights():
    made = network()
    h, s = torch.randn(2, 1, 2, WIDTH).to(torch.bfloat16).unbind()
    expected = made.step(2, h, s)
    with torch.no_grad():
        found = made.step(2, h, s)
    assert [part.dtype for part in found] == [torch.bfloat16, torch.bfloat16]
    assert_close(found, expected)


def test_a_changed_weight_counts_at_once():
    made = network()
    h, s = torch.randn(2, 1, 2, WIDTH).unbind()
    with torch.no_grad():
        before = made.step(2, h, s)[0]
        made.updates[0].W_G1.add_(0.5)
        assert not torch.equal(made.step(2, h, s)[0], before)


def test_dropout_in_training_mode_is_kept_without_gradients():
    made = ShadowNetwork(
        tiny_config(shadow_dropout=0.5),
        nn.Identity(),
        width=WIDTH,
        num_blocks=NUM_BLOCKS,
        backbone_width=WIDTH,
        embedding_width=None,
    )
    randomise(made)
    h, s = torch.randn(2, 1, 2, WIDTH, dtype=torch.float64).unbind()
    made.train()
    with torch.no_grad():
        assert not torch.equal(made.double().step(2, h, s)[0], made.step(2, h, s)[0])

import dataclasses

import pytest
import torch
from transformers import GPT2Config

from models import tiny_base
from shadowpeft.errors import ConfigError
from shadowpeft.evaluate.compare.budget import adapted_modules, base_config, meta_base, solve, target_of
from shadowpeft.evaluate.compare.methods import num_trained, put_on, trials_of
from shadowpeft.evaluate.compare.recipe import MethodSpec

# transformers 5.23 has renamed what PEFT 0.21 and transformers 5.17 know under this name.
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning")

SHADOW = MethodSpec(kind="shadow", shadow={"shadow_intermediate_size": 24, "r": 4, "update_hidden_size": 3})
SOLVED = {"lora": MethodSpec(kind="lora"), "dora": MethodSpec(kind="dora"), "shadow": SHADOW}
QWEN = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
}


@pytest.mark.parametrize("labels", [None, 7])
@pytest.mark.parametrize("target", [9_000, 14_321, 40_000])
@pytest.mark.parametrize("kind", SOLVED)
def test_a_solved_method_trains_the_asked_number_of_parameters_within_two_percent(kind, target, labels):
    base = tiny_base(labels=labels, dtype=torch.float32)
    sized = solve(SOLVED[kind], meta_base(base.config, labels), target, 0.02)
    model = put_on(base, SOLVED[kind], sized, overrides={})
    assert num_trained(model) == sized.trainable
    assert sized.trainable == pytest.approx(target, rel=0.02)


@pytest.mark.parametrize("kind", ["none", "probe", "full"])
def test_methods_without_sizes_train_nothing_the_head_or_everything(kind):
    base = tiny_base(labels=7, dtype=torch.float32)
    everything = sum(p.numel() for p in base.parameters())
    sized = solve(MethodSpec(kind=kind), base, 10_000, 0.02)
    model = put_on(base, MethodSpec(kind=kind), sized, overrides={})
    assert num_trained(model) == sized.trainable == {"none": 0, "probe": 7 * 32, "full": everything}[kind]


def test_a_budget_that_no_rank_meets_is_refused_with_the_nearest_that_does():
    with pytest.raises(ConfigError, match="the nearest is"):
        solve(MethodSpec(kind="lora"), tiny_base(dtype=torch.float32), 100, 0.02)


def test_modules_that_the_base_does_not_have_are_refused_with_those_it_has():
    with pytest.raises(ConfigError, match="q_proj"):
        adapted_modules(tiny_base(), ("query",))


@pytest.mark.parametrize("kind", SOLVED)
def test_the_shapes_of_an_8b_base_are_solved_on_the_meta_device(kind):
    base = meta_base(base_config("nowhere", QWEN), None)
    shadow = MethodSpec(kind="shadow", shadow={"shadow_num_attention_heads": 8, "update_hidden_size": 8})
    target = target_of(None, shadow, base, 0.02)
    assert target == 29_118_720 - 4 * 4096 * 8  # the paper's total, less the update that feeds nothing
    method = shadow if kind == "shadow" else SOLVED[kind]
    assert solve(method, base, target, 0.02).trainable == pytest.approx(target, rel=0.002)
    assert {p.device.type for p in base.parameters()} == {"meta"}


def test_the_reference_keeps_its_own_sizes_where_the_budget_is_its_own():
    base = meta_base(base_config("nowhere", QWEN), None)
    shadow = MethodSpec(kind="shadow")
    sized = solve(shadow, base, target_of(None, shadow, base, 0.02), 0.02)
    assert sized.shadow == {"r": 16, "update_hidden_size": 10, "shadow_intermediate_size": 256}


def test_a_budget_in_parameters_leaves_room_for_the_heads_of_the_reference():
    base = tiny_base(labels=7)
    assert target_of(10_000, SHADOW, base, 0.02) == 10_000 + 2 * 7 * 32
    assert target_of(10_000, SHADOW, tiny_base(), 0.02) == 10_000


@pytest.mark.parametrize("preset", ["paper", "recommended"])
def test_a_shadow_of_the_bases_own_blocks_meets_a_budget_by_its_rank(preset):
    """It has no MLP width to choose, and frozen nothing but the steps is trained."""
    base = tiny_base(dtype=torch.float32)
    fields = {"preset": preset, "shadow_model": "base:first:1", "freeze_backbone": True}
    method = MethodSpec(kind="shadow", shadow=fields)
    sized = solve(method, meta_base(base.config, None), 9_000, 0.02)
    assert set(sized.shadow) == ({"r", "update_hidden_size"} if preset == "paper" else {"r"})
    model = put_on(base, method, sized, overrides={})
    found = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found == sized.trainable == pytest.approx(9_000, rel=0.02)


def test_the_error_for_modules_that_are_not_there_names_those_of_gpt2_which_are_no_linear_layers():
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    with pytest.raises(ConfigError, match="no module named q_proj; its blocks have c_attn, c_fc, c_proj"):
        adapted_modules(meta_base(config, None), ("q_proj",))
    assert adapted_modules(meta_base(config, None), ("c_attn",)) == {"transformer.h.0.attn.c_attn": (16, 48)}


def test_alpha_over_r_is_the_same_in_every_module():
    base = tiny_base(dtype=torch.float32)
    method = MethodSpec(kind="lora", scale=2.0)
    model = put_on(base, method, solve(method, base, 9_000, 0.02), overrides={})
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert len({module.r["default"] for module in layers}) == 2
    assert {module.scaling["default"] for module in layers} == {2.0}


def test_every_method_tries_the_same_number_of_settings_and_only_the_shadow_an_alpha():
    for kind in ("probe", "lora", "dora", "full"):
        trials = trials_of(MethodSpec(kind=kind), 4)
        assert [set(trial) for trial in trials] == [{"learning_rate"}] * 4
    trials = trials_of(MethodSpec(kind="shadow"), 4)
    assert len({trial["learning_rate"] for trial in trials}) == len({trial["shadow_alpha"] for trial in trials}) == 4
    for preset in ("recommended", "attached", "sublayers"):  # they have an alpha
        trials = trials_of(MethodSpec(kind="shadow", shadow={"preset": preset}), 4)
        assert [set(trial) for trial in trials] == [{"learning_rate"}] * 4
    assert trials_of(MethodSpec(kind="none"), 4) == [{}]
    given = dataclasses.replace(MethodSpec(kind="lora"), trials=({"learning_rate": 1.0},))
    assert trials_of(given, 1) == [{"learning_rate": 1.0}]
    assert trials_of(given, 1, [{"learning_rate": 2.0}]) == [{"learning_rate": 2.0}]  # a task's own

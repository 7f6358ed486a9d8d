import pytest

from shadowpeft import ShadowConfig
from shadowpeft.errors import ConfigError


def test_an_unknown_key_is_named_with_the_nearest_field():
    with pytest.raises(ConfigError, match=r"unknown key 'shadow_alfa' in shadow config; did you mean 'shadow_alpha'"):
        ShadowConfig.from_dict({"shadow_alfa": 0.1})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("r", 0, "at least 1"),
        ("r", 2.5, "of type int"),
        ("r", True, "of type int"),
        ("shadow_dropout", 1.0, r"\[0, 1\)"),
        ("auxiliary_loss_weight", -0.1, "at least 0"),
        ("first_block", -1, "at least 0"),
        ("dropout_at", "output", "'bottleneck', 'input'"),
        ("task_type", "QA", "'CAUSAL_LM', 'SEQ_CLS'"),
        ("shadow_num_attention_heads", 0, "None or an integer"),
        ("alpha_rank", 0, "None or an integer"),
        ("update_bias", 1, "of type bool"),
    ],
)
def test_a_value_out_of_range_says_what_was_expected(field, value, expected):
    with pytest.raises(ConfigError, match=rf"{field}={value!r}.*{expected}"):
        ShadowConfig(**{field: value})


def test_presets_cover_the_deviation_table():
    peft, authors, paper = (ShadowConfig.preset(name) for name in ("peft", "authors", "paper"))
    assert (paper.first_block, paper.dropout_at, paper.update_norm) == (1, "bottleneck", "layernorm")
    assert paper == ShadowConfig()
    assert authors == paper.replace(shadow_layer_types="base")
    assert (peft.first_block, peft.dropout_at, peft.update_norm, peft.update_activation) == (0, "input", "none", "gelu")
    assert (peft.update_bias, peft.transform_dropout, peft.down_init) == (True, False, "linear")


def test_what_is_recommended_is_another_formula_but_not_another_shadow():
    changed = {name for name, value in ShadowConfig.preset("recommended").to_dict().items()
               if value != getattr(ShadowConfig(), name)}  # fmt: skip
    assert changed == {
        *("shadow_alpha", "shadow_dropout", "auxiliary_loss_weight"), *("scale_state", "inject_diagonal", "use_update"),
        *("inject_activation", "shadow_lr_multiplier"),
    }  # fmt: skip


def test_attached_is_what_is_recommended_with_the_weights_in_the_corrections():
    recommended, attached = ShadowConfig.preset("recommended"), ShadowConfig.preset("attached")
    sizes = {"r": 64, "alpha_rank": 8, "shadow_num_attention_heads": 1, "shadow_intermediate_size": 64}
    assert attached == recommended.replace(auxiliary_loss_weight=2.0, **sizes)


def test_sublayers_is_what_is_recommended_without_an_activation_in_twice_as_many_places():
    recommended, sublayers = ShadowConfig.preset("recommended"), ShadowConfig.preset("sublayers")
    sizes = {"r": 32, "alpha_rank": 8, "shadow_num_attention_heads": 1, "shadow_intermediate_size": 32}
    places = {"inject_between": "sublayers", "inject_branch": True, "inject_activation": "none"}
    assert sublayers == recommended.replace(shadow_alpha=2.0, auxiliary_loss_weight=0.2, **sizes, **places)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="paper, recommended, attached, sublayers, authors, peft"):
        ShadowConfig.preset("lora")


def test_a_config_survives_its_dictionary():
    config = ShadowConfig.preset("peft", r=5, share_steps=True)
    assert ShadowConfig.from_dict(config.to_dict()) == config


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(AttributeError):
        ShadowConfig().r = 3

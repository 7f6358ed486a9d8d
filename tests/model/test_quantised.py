"""Frozen bases in few bits: torchao's int8 and int4 weights on a CPU."""

import copy
import json
from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, TrainingArguments

from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import ShadowModel, get_shadow_model
from shadowpeft.errors import ArchitectureError, CheckpointError
from shadowpeft.model.fingerprint import fingerprint, is_comparable
from shadowpeft.train import ShadowTrainer

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed (pip install torchao)")
KINDS = ["int8", "int4"]


def config_of(kind):
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from transformers import TorchAoConfig

    groups = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16))
    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else groups)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base on disk; its norms are not all one, as in no trained model."""
    base = tiny_base(dtype=torch.float32)
    with torch.no_grad():
        for weight in base.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    path = tmp_path_factory.mktemp("bases") / "full"
    base.save_pretrained(path)
    return path


def full(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def quantised(folder, kind):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config_of(kind))


def dequantised(base, folder):
    """The full base with the values that ``base``'s weights stand for."""
    model, weights = full(folder), dict(base.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name] if is_comparable(weights[name]) else weights[name].dequantize())
    return model


def adapted(base, **config):
    torch.manual_seed(0)
    model = get_shadow_model(base, tiny_config(adapter_dtype="float32", **config))
    randomise(model.network())
    return model


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_values_the_weights_stand_for(folder, kind):
    base = quantised(folder, kind)
    assert not is_comparable(base.model.layers[0].mlp.up_proj.weight)
    models = [adapted(each, shadow_dropout=0.0).train() for each in (base, dequantised(base, folder))]
    losses = [model(tokens(), labels=tokens()).loss for model in models]
    for loss in losses:
        loss.backward()
    assert_close(losses[0], losses[1], rtol=1e-5, atol=0.0)
    for (name, ours), theirs in zip(models[0].network().named_parameters(), models[1].network().parameters(), strict=True):
        # torchao scales behind the product where the other scales in front of it: float32 rounding.
        assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trained_on_it_loads_there_and_on_the_full_base(folder, kind, tmp_path):
    model = adapted(quantised(folder, kind))
    before = copy.deepcopy(model.network().state_dict())
    rows = [{"input_ids": row, "labels": row} for row in tokens(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        max_steps=3,
        learning_rate=1e-2,
        save_strategy="no",
        disable_tqdm=True,
    )
    ShadowTrainer(model, arguments, train_dataset=rows).train()
    assert all(not torch.equal(weight, before[name]) for name, weight in model.network().state_dict().items())
    model.eval().save_pretrained(tmp_path / "adapter")

    same = ShadowModel.from_pretrained(tmp_path / "adapter", quantised(folder, kind))
    assert torch.equal(same(tokens()).logits, model(tokens()).logits)
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(same.generate(tokens(), **options), model.generate(tokens(), **options))
    assert torch.equal(same.generate(tokens(), speculative=2, **options), model.generate(tokens(), **options))

    other = ShadowModel.from_pretrained(tmp_path / "adapter", full(folder))
    assert all(torch.equal(w, model.network().state_dict()[name]) for name, w in other.network().state_dict().items())
    distance = (other(tokens()).logits - model(tokens()).logits).abs().max()
    rounding = (other(tokens(), adapter="__base__").logits - model(tokens(), adapter="__base__").logits).abs().max()
    assert 0.0 < distance < rounding, "the adapter adds nothing to the distance of the bases"  # 0.32 and 0.26 of it here


@needs_torchao
@pytest.mark.parametrize("first", ["full", "int8", "int4"])
def test_a_base_with_other_weights_is_still_refused(folder, first, tmp_path):
    """Where one of the two is quantised: by the token table and the norms."""
    trained_on = full(folder) if first == "full" else quantised(folder, first)
    adapted(trained_on).save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        other = full(folder)
        for weight in other.parameters():
            if weight.dim() == 1:  # as after a fine-tuning that left the token table alone
                weight.mul_(1.05)
    other.save_pretrained(tmp_path / "other")
    for base in (full(tmp_path / "other"), quantised(tmp_path / "other", "int8")):
        with pytest.raises(CheckpointError, match=r"other weights than the one .*allow_other_weights=True"):
            ShadowModel.from_pretrained(tmp_path / "adapter", base)
    for base in (full(folder), quantised(folder, "int8"), quantised(folder, "int4")):
        ShadowModel.from_pretrained(tmp_path / "adapter", base)


@needs_torchao
def test_a_base_that_cannot_be_compared_is_taken_with_a_warning(folder, tmp_path):
    adapted(full(folder)).save_pretrained(tmp_path)
    described = json.loads((tmp_path / "shadow_config.json").read_text())
    known = described["base"]["fingerprint"]
    described["base"]["fingerprint"] = {name: values for name, values in known.items() if "_proj" in name}
    (tmp_path / "shadow_config.json").write_text(json.dumps(described))
    with pytest.warns(UserWarning, match="are quantised here, so it is not checked"):
        ShadowModel.from_pretrained(tmp_path, quantised(folder, "int8"))


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_the_detached_shadow_is_an_ordinary_unquantised_model(folder, kind, tmp_path):
    model = adapted(quantised(folder, kind)).eval()
    model.detach().save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    alone = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(alone(tokens()).logits, model(tokens(), output_shadow_logits=True).shadow_logits)


@needs_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_it_become_a_shadow_of_full_weights(folder, kind):
    base = quantised(folder, kind)
    backbone = get_shadow_model(base, tiny_config(adapter_dtype="float32", shadow_model="base:first:2")).network().backbone
    expected = dequantised(base, folder).model.layers[1].mlp.up_proj.weight
    assert torch.equal(backbone.layers[1].mlp.up_proj.weight, expected)


def test_only_a_weight_itself_is_compared():
    class Packed(torch.Tensor):
        pass

    weight = torch.ones(4, 4)
    assert is_comparable(weight) and is_comparable(torch.nn.Parameter(weight.bfloat16()))
    assert not is_comparable(weight.as_subclass(Packed))
    assert not is_comparable(weight.to(torch.float8_e4m3fn)) and not is_comparable(weight.to(torch.int8))
    assert not is_comparable(weight.to("meta"))


def test_the_fingerprint_holds_matrices_vectors_and_the_token_table():
    for model_type in ("llama", "gpt2"):
        base = tiny_base(model_type)
        names = fingerprint(base)
        assert {"embed_tokens.weight", "wte.weight"} & names.keys()
        assert any("norm" in name or "ln_" in name for name in names)


def test_blocks_of_packed_integers_cannot_become_a_shadow():
    base = tiny_base(dtype=torch.float32)
    layer = base.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ArchitectureError, match=r"up_proj.weight of the base is quantised as torch.int8"):
        get_shadow_model(base, tiny_config(shadow_model="base:first:2"))


@needs_torchao
def test_shared_blocks_are_not_taken_from_between_a_quantised_and_a_full_base(folder, tmp_path):
    fields = {"shadow_model": "base:last:1", "freeze_backbone": True, "adapter_dtype": "float32"}
    bases = {"full": lambda: full(folder), "few bits": lambda: quantised(folder, "int8")}
    for name, make in bases.items():
        get_shadow_model(make(), tiny_config(**fields)).save_pretrained(tmp_path / name, share_backbone=True)
    for saved in bases:
        for name, make in bases.items():
            if name == saved:
                ShadowModel.from_pretrained(tmp_path / saved, make())
                continue
            with pytest.raises(CheckpointError, match=r"load the base unquantised.*or save the adapter without share_backbone"):
                ShadowModel.from_pretrained(tmp_path / saved, make())

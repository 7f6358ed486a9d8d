"""Bases whose blocks lie on several devices, or on none until they run."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, TrainingArguments

from deploy.tiny import byte_tokenizer
from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import ShadowModel, get_shadow_model
from shadowpeft.deploy.serve.loading import load_edge, load_served
from shadowpeft.errors import ArchitectureError, ConfigError
from shadowpeft.model.architectures import blocks_of, decoder_of
from shadowpeft.model.load import load_attached
from shadowpeft.model.placement import META, device_named, moved
from shadowpeft.train.trainer import ShadowTrainer

# Four blocks: two in memory, two on disk, which accelerate fetches for the time they run.
OFFLOADED = {
    **{"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"},
    **{"model.layers.3": "disk", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "cpu"},
}


@pytest.fixture
def folder(tmp_path):
    tiny_base("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base, **config):
    torch.manual_seed(1)
    model = get_shadow_model(base, tiny_config(**{"shadow_dropout": 0.0} | config))
    randomise(model.network())
    return model


def offloaded(folder, **changes):
    return AutoModelForCausalLM.from_pretrained(
        folder, device_map=OFFLOADED | changes, offload_folder=folder.parent / "offload", dtype=torch.float64
    )


@pytest.mark.parametrize("first", ["cpu", "disk"])
def test_blocks_on_disk_give_the_logits_gradients_and_tokens_of_blocks_in_memory(folder, first):
    ids = tokens()
    found = []
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for base in (whole, offloaded(folder, **{"model.embed_tokens": first})):
        model = adapted(base, update_norm="layernorm")
        assert all(p.device.type == "cpu" for p in model.network().parameters())
        output = model(ids, labels=ids)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.network().named_parameters()}
        written = model.generate(ids, max_new_tokens=5, do_sample=False)
        found.append((output.logits.detach(), output.loss.detach(), gradients, written))
    assert_close(found[1], found[0])


def test_an_adapter_moves_between_a_whole_and_an_offloaded_base(folder, tmp_path):
    model = adapted(offloaded(folder))
    model.save_pretrained(tmp_path / "adapter")
    again = ShadowModel.from_pretrained(
        tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    )
    assert_close(again(tokens()).logits, model.eval()(tokens()).logits)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"lm_head": "disk"}, {"model.embed_tokens": "disk"}])
def test_a_model_detached_from_an_offloaded_base_runs(folder, changes):
    model = adapted(offloaded(folder, **changes)).eval()
    expected = model(tokens(), output_shadow_logits=True).shadow_logits
    assert_close(model.detach()(tokens()).logits, expected)


@pytest.mark.parametrize(
    ("blocks", "first"), [("first:1", "norm.weight"), ("spaced:2", r"layers.3\S+"), ("last:1", r"layers.3\S+")]
)
def test_a_shadow_of_blocks_that_are_offloaded_is_refused(folder, tmp_path, blocks, first):
    with pytest.raises(ArchitectureError, match=rf"^{first} of the base is offloaded.*shadow_model='implicit'"):
        adapted(offloaded(folder), shadow_model=f"base:{blocks}")
    whole = adapted(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64), shadow_model=f"base:{blocks}")
    whole.save_pretrained(tmp_path / "adapter")
    again = ShadowModel.from_pretrained(tmp_path / "adapter", offloaded(folder))
    assert_close(again(tokens()).logits, whole.eval()(tokens()).logits)


def test_the_trainer_leaves_an_offloaded_base_where_it_is(folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(
        folder, device_map=OFFLOADED, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    model = adapted(base, adapter_dtype="float32").train()
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    rows = [{"input_ids": row, "labels": row} for row in tokens(4)]
    before = [p.clone() for p in model.network().parameters()]
    ShadowTrainer(model, arguments, train_dataset=rows).train()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.network().parameters(), strict=True))
    assert base.model.layers[1].self_attn.q_proj.weight.device.type == "meta"


# ---------------------------------------------------------------- a second device

# Meta tensors have a device and no numbers, and the operations of Eq. 2, 4 and 7 refuse one together with a tensor in memory.
# The way back, which the backward pass takes, is closed to them, so this is about the forward pass.
FAR = "meta"


def spread(base):
    """Blocks 2 and 3, norm and head on a second device, with accelerate's hooks as ``device_map`` sets them."""
    blocks = blocks_of(decoder_of(base))
    for module in (base.model.embed_tokens, *blocks[:2]):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu"))
    for module in (*blocks[2:], base.model.norm, base.lm_head):
        add_hook_to_module(module.to(FAR), AlignDevicesHook(execution_device=FAR))
    return base


ACTIVATED = {"scale_state": True, "inject_diagonal": True, "inject_activation": "silu"}
BETWEEN = {"scale_state": True, "inject_branch": True, "inject_between": "sublayers"}
CONFIGS = [{}, ACTIVATED, {"first_block": 2}, {"shadow_dropout": 0.1}, BETWEEN, {"scale_state": True, "inject_branch": True}]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("training", [True, False])
def test_steps_lie_with_their_blocks_and_states_follow(monkeypatch, config, training):
    # The one node asks autocast about the device, which knows none of this name.
    monkeypatch.setattr("shadowpeft.core.network.step_backend", lambda *_, **__: ("autograd", "asked for"))
    model = adapted(spread(tiny_base("llama")), **{"update_norm": "layernorm"} | config).train(training)
    network = model.network()
    devices = {index: network.parts(index)[0].W_down.device.type for index in range(network.config.first_block, 4)}
    assert devices == {index: FAR if index >= 2 else "cpu" for index in devices}
    midpoints = [part.W_down.device.type for part in network.midpoints]  # type: ignore[union-attr]
    assert midpoints == (["cpu", "cpu", FAR, FAR] if network.config.has_midpoints else [])
    assert {p.device.type for p in network.backbone.parameters()} == {"cpu"}
    with torch.set_grad_enabled(training):
        output = model(tokens(), labels=tokens(), output_logits=True)
    assert (output.logits.device.type, output.logits.shape) == (FAR, (2, 9, 97))
    assert output.loss.device.type == FAR


def test_weights_that_all_steps_share_lie_in_one_place():
    network = adapted(spread(tiny_base("llama")), share_steps=True).network()
    assert {p.device.type for p in network.parameters()} == {"cpu"}


def test_the_second_device_is_one_that_does_not_mix():
    here, there = torch.zeros(2, 2), torch.zeros(2, 2, device=FAR)
    mixtures = (
        lambda: here - there,
        lambda: torch.lerp(here, there, there),
        lambda: torch.nn.functional.layer_norm(there, (2,), here[0]),
    )
    for mix in mixtures:
        with pytest.raises(RuntimeError, match="is not on the expected device"):
            mix()


@pytest.fixture
def accelerator(monkeypatch):
    """A machine with two accelerators, as whose device torch's "meta" stands in."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: META)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def test_the_accelerator_there_is_goes_before_the_cpu(accelerator, monkeypatch):
    assert device_named(None) == META and device_named("cpu").type == "cpu" and device_named("meta:1").index == 1
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert device_named(None).type == "cpu"


@pytest.mark.parametrize("name", ["cuda:7", "meta:2", "gpu"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(accelerator, name):
    with pytest.raises(ConfigError, match=f"no device '{name}' here; choose one of cpu, meta, meta:0, meta:1"):
        device_named(name)


def test_models_for_commands_are_on_the_device_that_was_chosen(folder, tmp_path, accelerator):
    byte_tokenizer().save_pretrained(folder)
    model = adapted(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64))
    model.save_pretrained(tmp_path / "adapter")
    loads = {
        "load_attached": lambda **options: load_attached(str(tmp_path / "adapter"), **options)[0],
        "load_served": lambda **options: load_served([f"one={tmp_path / 'adapter'}"], **options).model,
        "a base served": lambda **options: load_served([], base=str(folder), **options).model,
        "load_edge": lambda **options: load_edge(str(folder), **options).model,
        "load_edge, detached here": lambda **options: load_edge(str(tmp_path / "adapter"), **options).model,
    }
    for load in loads.values():
        for options, expected in (({}, "meta"), ({"device": "cpu"}, "cpu")):
            assert {p.device.type for p in load(**options).parameters()} == {expected}


def test_a_base_that_was_dispatched_while_it_was_loaded_stays_where_it_is(folder):
    base = offloaded(folder)
    assert moved(base, torch.device("cpu")) is base and moved(adapted(base), torch.device("cpu")).base is base

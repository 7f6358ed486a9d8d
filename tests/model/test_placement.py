"""Bases whose blocks lie on several devices, or on none until they run."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, TrainingArguments

from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import ShadowModel, get_shadow_model
from shadowpeft.model.architectures import blocks_of, decoder_of
from shadowpeft.model.placement import places
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


# ---------------------------------------------------------------- two accelerators that do not exist


def spread(model, mode):
    """The model's weights become fake ones on two devices, with accelerate's hooks as ``device_map`` sets them."""
    base, blocks = model.base, blocks_of(decoder_of(model.base))
    hooked = [(block, f"cuda:{index // 2}") for index, block in enumerate(blocks)]
    hooked += [(base.model.embed_tokens, "cuda:0"), (base.model.norm, "cuda:1"), (base.lm_head, "cuda:1")]
    for module, device in hooked:
        add_hook_to_module(module, AlignDevicesHook(execution_device=device))
    with mode:
        for module, device in [(base, "cuda:0"), *hooked, *places(model.network(), base)]:
            for part in module.modules():
                for table in (part._parameters, part._buffers):
                    table.update({name: _on(tensor, device) for name, tensor in table.items() if tensor is not None})


def _on(tensor, device):
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


@pytest.fixture
def mode(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    torch._C._ensureCUDADeviceGuardSet()  # lets a build without CUDA tell fake devices apart
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("config", [{}, {"share_steps": True}, {"scale_state": True, "inject_diagonal": True}])
def test_steps_lie_with_their_blocks_and_a_training_step_crosses_the_devices(mode, config):
    usual = {"adapter_dtype": "float32", "shadow_dropout": 0.0, "update_norm": "layernorm"}
    model = adapted(tiny_base("llama", dtype=torch.float32), **usual, **config).train()
    spread(model, mode)
    network = model.network()
    devices = [str(network.parts(index)[0].W_down.device) for index in (1, 2, 3)]
    assert devices == (["cuda:0"] * 3 if "share_steps" in config else ["cuda:0", "cuda:1", "cuda:1"])
    with mode:
        ids = torch.zeros(2, 9, dtype=torch.int64, device="cuda:0")
        hidden, initial = model.training_states(ids)
        assert (str(hidden.device), str(initial.device)) == ("cuda:1", "cuda:0")
        (hidden.sum() + initial.to(hidden.device).sum()).backward()
        assert all(p.grad is not None and p.grad.device == p.device for p in network.parameters())
        with torch.no_grad():
            logits = model.eval()(ids).logits
        assert (str(logits.device), logits.shape) == ("cuda:1", (2, 9, 97))


def test_a_step_whose_weights_are_elsewhere_is_what_torch_refuses_here(mode):
    """The check above is worth something: fake devices do not mix by themselves."""
    with mode, pytest.raises(RuntimeError, match="two different devices"):
        torch.empty(2, 2, device="cuda:0") @ torch.empty(2, 2, device="cuda:1")

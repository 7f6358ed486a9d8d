"""The traced step against the real one: parameters, kept bytes, gradients, states, cache."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification

from models import tiny_base
from shadowpeft import ShadowConfig, get_shadow_model
from shadowpeft.model.bases import load_model
from shadowpeft.train.plan import StepShape, build_skeleton, trace_step
from shadowpeft.train.plan.skeleton import bytes_of
from shadowpeft.train.plan.trace import cache_bytes

SIZES = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 1000}
SHADOW = {"r": 4, "update_hidden_size": 4, "shadow_intermediate_size": 24}
SHAPE = StepShape(batch=3, length=40)


def pair(folder, model_type="qwen3", **shadow):
    """(skeleton, real model in training mode) of one config."""
    config = ShadowConfig(**SHADOW | shadow)
    base = tiny_base(model_type, dtype=torch.float32, **SIZES)
    base.config.save_pretrained(folder)
    return build_skeleton(str(folder), config), get_shadow_model(base, config).train()


def batch_of(shape):
    """Rows of unequal lengths, with a label everywhere, as the plan has it."""
    ids = torch.randint(3, 900, (shape.batch, shape.length))
    mask = torch.ones_like(ids)
    mask[-1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def kept_bytes(model, batch):
    """Sizes of the storages that autograd keeps, each once, without those of the model and the batch."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    for tensor in (*model.parameters(), *model.buffers(), *batch.values()):
        kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values()), loss


SHADOWS = {
    "paper": {},
    "no dropout": {"shadow_dropout": 0.0},
    "two shadow blocks, narrower": {"shadow_num_hidden_layers": 2, "shadow_hidden_size": 32},
    "a block of the base": {"shadow_model": "base:first:1", "shadow_intermediate_size": None},
    "scaled, diagonal": {"scale_state": True, "inject_diagonal": True, "use_update": False},
    "activation": {"scale_state": True, "inject_diagonal": True, "inject_activation": "silu", "use_update": False},
    "branches": {"scale_state": True, "inject_branch": True},
    "between sublayers": {"scale_state": True, "inject_branch": True, "inject_between": "sublayers", "use_update": False},
    "distilled": {"distillation_weight": 0.5},
}


@pytest.mark.parametrize("shadow", SHADOWS)
def test_parameters_and_weight_bytes_are_those_of_the_model_that_is_built(tmp_path, shadow):
    skeleton, model = pair(tmp_path, **SHADOWS[shadow])
    trainable, total = model.get_nb_trainable_parameters()
    base = sum(p.numel() for p in model.base.parameters())
    assert skeleton.parameters() == {"base": base, "shadow": total - base, "trainable": trainable}
    step = trace_step(skeleton, SHAPE)
    assert step.base + step.adapter == bytes_of((*model.parameters(), *model.buffers()))
    assert step.gradients == 4 * trainable


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("shadow", SHADOWS)
def test_what_is_kept_is_what_autograd_keeps_of_a_real_step(tmp_path, model_type, shadow):
    if (model_type, shadow) == ("gpt2", "a block of the base"):
        pytest.skip("one family is enough")
    skeleton, model = pair(tmp_path, model_type, **SHADOWS[shadow])
    step = trace_step(skeleton, SHAPE)
    real, _ = kept_bytes(model, batch_of(SHAPE))
    if shadow == "between sublayers":
        # Two hidden states of the first block have no gradient: expressions for what follows hold them, unseen by hooks.
        real += 2 * 4 * SHAPE.batch * SHAPE.length * SIZES["hidden_size"]
    # The loss itself, of 4 bytes, is alive but not kept.
    assert step.kept == pytest.approx(real, abs=64)


def test_gradients_and_optimizer_states_are_those_of_a_real_step(tmp_path):
    skeleton, model = pair(tmp_path)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    model(**batch_of(SHAPE)).loss.backward()
    optimizer.step()
    step = trace_step(skeleton, SHAPE)
    assert step.gradients == bytes_of(p.grad for p in trained)
    assert step.optimizer == bytes_of(value for state in optimizer.state.values() for value in state.values())


def test_a_recomputed_step_keeps_less_and_computes_more(tmp_path):
    skeleton, _ = pair(tmp_path)
    recomputing = build_skeleton(str(tmp_path), ShadowConfig(**SHADOW), checkpointing=True)
    plain, again = (trace_step(kind, StepShape(batch=8, length=60)) for kind in (skeleton, recomputing))
    assert again.kept < 0.5 * plain.kept
    assert again.flops > 1.2 * plain.flops


def test_a_second_trace_finds_what_the_first_one_found(tmp_path):
    skeleton, _ = pair(tmp_path)
    first, _, again = (trace_step(skeleton, StepShape(batch=batch, length=40)) for batch in (3, 5, 3))
    assert again == first


def test_gradients_that_wait_for_the_next_pass_add_to_the_peak(tmp_path):
    skeleton, _ = pair(tmp_path)
    one = trace_step(skeleton, SHAPE)
    more = trace_step(skeleton, StepShape(batch=3, length=40, accumulates=True))
    assert more.peaks["forward"] - one.peaks["forward"] == one.gradients


def test_fewer_labels_need_a_smaller_loss_chunk(tmp_path):
    skeleton, _ = pair(tmp_path)
    every, some = (trace_step(skeleton, StepShape(batch=3, length=40, labelled=share)) for share in (1.0, 0.1))
    assert some.loss_chunk < 0.2 * every.loss_chunk
    (rows,) = (trace_step(skeleton, StepShape(batch=3, length=40, chunk_rows=n)) for n in (16,))
    assert rows.loss_chunk < 0.3 * every.loss_chunk


def test_the_operations_are_those_that_torch_counts_in_a_real_step(tmp_path):
    skeleton, model = pair(tmp_path, "gpt2", shadow_dropout=0.0)
    model.base.set_attn_implementation("eager")
    counter = FlopCounterMode(display=False)
    batch = batch_of(SHAPE)
    with counter:
        model(**batch).loss.backward()
    # torch's table leaves out the attention of a CPU, so it runs here as plain products; the kernel of the trace computes
    # its scores again in the backward pass, one product more.
    assert trace_step(skeleton, SHAPE).flops == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text"])
def test_the_cache_is_that_of_a_generation(tmp_path, model_type):
    skeleton, model = pair(tmp_path, model_type)
    cache = model.eval()(torch.randint(3, 90, (2, 20)), use_cache=True).past_key_values
    real = bytes_of(tensor for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert cache_bytes(skeleton, batch=2, length=20) == real


def test_a_classifier_is_planned_with_both_heads(tmp_path):
    config = ShadowConfig(**SHADOW, task_type="SEQ_CLS")
    base = tiny_base("llama", labels=5, dtype=torch.float32)
    base.config.save_pretrained(tmp_path)
    skeleton = build_skeleton(str(tmp_path), ShadowConfig(**SHADOW), labels=5)
    model = get_shadow_model(base, config).train()
    assert skeleton.parameters()["trainable"] == model.get_nb_trainable_parameters()[0]
    batch = batch_of(SHAPE)
    batch["labels"] = torch.randint(0, 5, (3,))
    batch["input_ids"] %= 97
    step = trace_step(skeleton, SHAPE)
    assert step.kept == pytest.approx(kept_bytes(model, batch)[0], rel=0.02)
    assert AutoModelForSequenceClassification._model_mapping[type(base.config)] is type(base)


def test_the_embedded_base_has_the_parameters_of_the_loaded_one():
    skeleton = build_skeleton("embedded", ShadowConfig())
    assert skeleton.dtype == torch.float32
    assert skeleton.parameters()["base"] == sum(p.numel() for p in load_model("embedded").parameters())


def test_no_memory_is_taken_for_weights(tmp_path):
    base = tiny_base("llama")
    base.config.intermediate_size, base.config.num_hidden_layers = 200_000, 60
    base.config.save_pretrained(tmp_path)
    skeleton = build_skeleton(str(tmp_path), ShadowConfig())
    assert skeleton.parameters()["base"] > 10**9
    assert all(p.device.type == "cpu" and p.untyped_storage().device.type == "meta" for p in skeleton.model.parameters())

"""What a training step must survive: checkpointing, packing, compiling, DDP; and what its optimizer does."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithFlattening,
    TrainingArguments,
)

from models import enable_checkpointing, randomise, tiny_base, tiny_config, tokens
from shadowpeft import ShadowConfig, get_shadow_model
from shadowpeft.errors import ConfigError
from shadowpeft.model.checkpoint import restore_weights
from shadowpeft.train.arguments import refuse_float16_unasked, shared_arguments
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.groups import parameter_groups
from shadowpeft.train.pretrain_config import PretrainConfig
from shadowpeft.train.trainer import ShadowTrainer

pytestmark = pytest.mark.contract


def adapted(model_type="llama", **config):
    model = get_shadow_model(tiny_base(model_type), tiny_config(**{"shadow_dropout": 0.0} | config)).train()
    randomise(model.network())
    return model


def gradients(model, *, seed=3, **inputs):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.network().named_parameters()}


def answers(ids):
    labels = ids.clone()
    labels[:, :4] = -100
    return labels


def test_checkpointing_reaches_the_shadow_and_changes_nothing_even_with_dropout():
    model, ids = adapted(shadow_dropout=0.3), tokens()
    expected = gradients(model, input_ids=ids, labels=answers(ids))
    enable_checkpointing(model)
    assert model.network().backbone.gradient_checkpointing
    assert_close(gradients(model, input_ids=ids, labels=answers(ids)), expected)


def test_a_float16_base_under_a_loss_scaler_has_the_gradients_of_a_float32_one():
    found = []
    for dtype in (torch.float32, torch.float16):
        is_narrow = dtype == torch.float16
        model = get_shadow_model(tiny_base(dtype=dtype), tiny_config(shadow_dropout=0.0, adapter_dtype="float32")).train()
        randomise(model.network(), std=0.05)
        scaler = torch.amp.GradScaler("cpu", enabled=is_narrow)
        with torch.autocast("cpu", dtype=torch.float16, enabled=is_narrow):
            loss = model(tokens(), labels=tokens(), num_items_in_batch=2**16).loss
        scaler.scale(loss).backward()
        scaler.unscale_(torch.optim.SGD(model.network().parameters()))
        found.append({name: p.grad for name, p in model.network().named_parameters()})
    for name, gradient in found[0].items():
        # Every activation is rounded to 2^-11 on the way there and back, a few dozen times one after the other.
        assert (found[1][name] - gradient).norm() < 0.01 * gradient.norm(), name


@pytest.mark.parametrize("kind", [TrainConfig, PretrainConfig])
def test_float16_is_trained_with_a_loss_scaler_or_not_at_all(monkeypatch, tmp_path, kind):
    monkeypatch.setattr("shadowpeft.train.arguments.TrainingArguments", lambda **given: given)
    with pytest.raises(ConfigError, match="trains on a GPU alone"):
        shared_arguments(kind(dtype="float16"), tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for dtype, expected in {"float16": (True, False), "bfloat16": (False, True), "float32": (False, False)}.items():
        given = shared_arguments(kind(dtype=dtype), tmp_path)
        assert (given["fp16"], given["bf16"]) == expected


@pytest.mark.parametrize("kind", [TrainConfig, PretrainConfig])
def test_a_base_stored_in_float16_is_not_trained_so_unasked(kind):
    base = tiny_base(dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"stored in float16.*say which dtype"):
        refuse_float16_unasked(kind(dtype="auto"), base)
    refuse_float16_unasked(kind(dtype="float32"), base.float())


def test_float16_adapters_whose_gradients_no_scaler_takes_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for adapter_dtype in ("base", "float16"):
        config = TrainConfig(dtype="float16", shadow=ShadowConfig(adapter_dtype=adapter_dtype))
        with pytest.raises(ConfigError, match="use adapter_dtype='float32'"):
            shared_arguments(config, tmp_path)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text"])
def test_packed_examples_train_as_separate_ones(model_type):
    model = adapted(model_type)
    first, second = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
    ids = torch.cat([first, second], 1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    labels = ids.clone()
    labels[0, 5] = -100  # the first token of an example follows from nothing
    packed = gradients(model, input_ids=ids, position_ids=positions, labels=labels)
    parts = [gradients(model, input_ids=part, labels=part, num_items_in_batch=10) for part in (first, second)]
    assert_close(packed[0], parts[0][0] + parts[1][0])
    assert_close(packed[1], {name: parts[0][1][name] + parts[1][1][name] for name in packed[1]})


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_the_shadow_of_a_packed_example_does_not_see_the_one_before(model_type):
    model = adapted(model_type).eval()
    first, second = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False, output_shadow_logits=True)
    for part, place in ((first, slice(0, 5)), (second, slice(5, 12))):
        alone = model(part, use_cache=False, output_shadow_logits=True)
        assert_close(packed.logits[:, place], alone.logits)
        assert_close(packed.shadow_logits[:, place], alone.shadow_logits)
    one_row = model(torch.cat([first, second], 1), output_shadow_logits=True)
    assert (one_row.shadow_logits[:, 5:] - packed.shadow_logits[:, 5:]).abs().max() > 1e-3, "positions that go on do see it"


def varlen_attention(module, query, key, value, attention_mask, *, cu_seq_lens_q, scaling, **kwargs):
    """Flash attention's interface for packed rows, on a CPU: no mask, the examples' borders in ``cu_seq_lens_q``."""
    assert attention_mask is None
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    borders = cu_seq_lens_q.tolist()
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *(x[:, :, start:stop] for x in (query, key, value)), is_causal=True, scale=scaling
        )
        for start, stop in itertools.pairwise(borders)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_varlen_kernels_get_the_borders_in_both_paths(model_type):
    """What flash attention is given for packed rows, by transformers' own collator; the kernel itself needs a GPU."""
    AttentionInterface.register("varlen_cpu", varlen_attention)
    AttentionMaskInterface.register("varlen_cpu", lambda *args, **kwargs: None)
    base = tiny_base(model_type)
    base.set_attn_implementation("varlen_cpu")
    model = get_shadow_model(base, tiny_config(shadow_dropout=0.0)).train()
    randomise(model.network())
    parts = [tokens(1, 5, seed=1), tokens(1, 7, seed=2)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": part[0].tolist()} for part in parts])
    packed = gradients(model, **batch)
    alone = []
    for part in parts:
        borders = torch.tensor([0, part.shape[1]])
        alone.append(gradients(model, input_ids=part, labels=part, num_items_in_batch=10, cu_seq_lens_q=borders))
    assert_close(packed[0], alone[0][0] + alone[1][0])
    assert_close(packed[1], {name: alone[0][1][name] + alone[1][1][name] for name in packed[1]})


# Raised inside torch, when Dynamo traces the backward of any torch.autograd.Function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("config", [{}, {"inject_between": "sublayers", "inject_branch": True, "scale_state": True}])
def test_a_training_step_compiles_as_one_graph(without_shape_checks, config):
    model, ids = adapted(distillation_weight=0.5, **config), tokens()
    expected = gradients(model, input_ids=ids, labels=answers(ids))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    model.zero_grad()
    loss = compiled(input_ids=ids, labels=answers(ids)).loss
    loss.backward()
    assert_close(loss.detach(), expected[0])
    assert_close({name: p.grad for name, p in model.network().named_parameters()}, expected[1])


def test_nothing_of_the_untouched_first_block_is_kept():
    model, ids = adapted(), tokens()
    kept, at_second_block = [], []
    block = model.base.model.layers[1]
    handle = block.register_forward_pre_hook(lambda *_: at_second_block.append(len(kept)))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        hidden = model._run_attached  # the shadow runs first, and keeps what it needs
        num_shadow = []
        model.base.model.layers[0].register_forward_pre_hook(lambda *_: num_shadow.append(len(kept)))
        hidden(model.network(), input_ids=ids, attention_mask=None, inputs_embeds=None, past_key_values=None,
               use_cache=False)  # fmt: skip
    handle.remove()
    step_keeps = 4  # h', s(0), the bottleneck, and its weights W_down and W_up, in front of block 1
    assert at_second_block[0] - num_shadow[0] <= step_keeps + 1


@pytest.mark.parametrize("share", [False, True])
def test_ddp_needs_no_search_for_unused_parameters(share, tmp_path):
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, ids = adapted(share_steps=share), tokens()
        expected = gradients(model, input_ids=ids, labels=answers(ids))
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            parallel(input_ids=ids, labels=answers(ids)).loss.backward()
        assert_close({name: p.grad for name, p in model.network().named_parameters()}, expected[1])
    finally:
        distributed.destroy_process_group()


def test_under_autocast_a_training_step_stays_near_its_fp32_result():
    """bf16 products inside the blocks round to 8 bits; the sum of losses stays within 2 %."""
    model = get_shadow_model(tiny_base(dtype=torch.float32), tiny_config(adapter_dtype="float32")).train()
    ids = tokens()
    expected, _ = gradients(model, input_ids=ids, labels=answers(ids))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, found = gradients(model, input_ids=ids, labels=answers(ids))
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def test_logits_are_left_out_only_in_training_with_labels():
    model, ids = adapted(), tokens()
    assert model(ids, labels=ids).logits is None
    assert model(ids, labels=ids, output_logits=True).logits is not None
    assert model(ids).logits is not None
    assert model.eval()(ids, labels=ids).logits is not None


def test_the_distillation_term_is_reported_and_an_old_config_still_loads():
    model, ids = adapted(distillation_weight=0.5), tokens()
    out = model(ids, labels=ids)
    total = out.main_loss + 0.05 * out.shadow_loss + 0.5 * out.distillation_loss
    assert_close(out.loss.detach(), total)
    assert adapted()(ids, labels=ids).distillation_loss is None
    saved = ShadowConfig().to_dict()
    del saved["distillation_weight"], saved["distillation_temperature"]
    assert ShadowConfig.from_dict(saved) == ShadowConfig()


@pytest.mark.parametrize(("field", "value"), [("distillation_weight", -0.1), ("distillation_temperature", 0.0)])
def test_a_distillation_setting_out_of_range_is_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        ShadowConfig(**{field: value})


def trainer(tmp_path, model, *, multiplier=1.0, heads=1.0, **options):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1, weight_decay=0.1, learning_rate=1e-2,
        disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False, **options,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in tokens(4, 6)]
    return ShadowTrainer(model, arguments, train_dataset=rows, shadow_lr_multiplier=multiplier, head_lr_multiplier=heads)


def test_the_shadow_backbone_has_its_own_learning_rate_and_vectors_no_decay(tmp_path):
    model = adapted(update_bias=True)
    optimizer = trainer(tmp_path, model, multiplier=0.05).create_optimizer()
    backbone = set(model.network().backbone.parameters())
    seen = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen.append(parameter)
            assert group["lr"] == pytest.approx(1e-2 * (0.05 if parameter in backbone else 1.0))
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    assert {id(p) for p in seen} == {id(p) for p in model.network().parameters()}
    assert len(seen) == len(set(seen))


def test_the_trainer_takes_the_multiplier_of_the_adapters_config_unless_it_is_given_one(tmp_path):
    model = adapted(shadow_lr_multiplier=0.5)
    assert {group["lr"] for group in trainer(tmp_path, model, multiplier=None).create_optimizer().param_groups} == {1e-2, 5e-3}
    assert {group["lr"] for group in trainer(tmp_path, model, multiplier=1.0).create_optimizer().param_groups} == {1e-2}


@pytest.mark.parametrize("multiplier", [0.3, 1.0])
def test_groups_for_a_loop_of_ones_own_are_those_of_the_trainer(tmp_path, multiplier):
    model = adapted(update_bias=True, shadow_lr_multiplier=multiplier)
    own = torch.optim.AdamW(parameter_groups(model, learning_rate=1e-2, weight_decay=0.1))
    theirs = trainer(tmp_path, model, multiplier=None).create_optimizer()

    def settings(optimizer):
        groups = optimizer.param_groups
        return {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}

    assert settings(own) == settings(theirs)


def rates(optimizer):
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_a_classifiers_heads_have_their_own_learning_rate(tmp_path):
    base = tiny_base(labels=3)
    model = get_shadow_model(base, tiny_config(task_type="SEQ_CLS", shadow_lr_multiplier=0.5))
    network = model.network()
    expected = {id(parameter): 1e-2 for parameter in network.parameters()}
    expected |= {id(parameter): 5e-3 for parameter in network.backbone.parameters()}
    expected |= {id(head.weight): 3e-2 for head in (network.head, network.shadow_head)}
    found = rates(trainer(tmp_path, model, multiplier=None, heads=3.0).create_optimizer())
    own = rates(torch.optim.AdamW(parameter_groups(model, learning_rate=1e-2, head_lr_multiplier=3.0)))
    assert found == pytest.approx(expected) and own == pytest.approx(expected)
    plain = tiny_base(labels=3)
    found = rates(trainer(tmp_path, plain, heads=3.0).create_optimizer())
    assert found.pop(id(plain.score.weight)) == pytest.approx(3e-2) and set(found.values()) == {1e-2}


@pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning")  # peft's doing
def test_the_head_of_another_adapter_has_its_own_learning_rate_too(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft==0.21.2)")
    model = peft.get_peft_model(tiny_base(labels=3), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    optimizer = trainer(tmp_path, model, heads=3.0).create_optimizer()
    at = {name: rates(optimizer)[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in at if "score" in name}
    assert len(heads) == 1 and len(at) > 1
    assert all(rate == pytest.approx(3e-2 if name in heads else 1e-2) for name, rate in at.items())


def test_a_rate_for_heads_that_are_not_found_is_refused_not_ignored(tmp_path):
    config = BertConfig(vocab_size=97, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertForSequenceClassification(config)
    trainer(tmp_path, model).create_optimizer()
    with pytest.raises(ConfigError, match=r"head_lr_multiplier=3.0 .*BertForSequenceClassification has none"):
        trainer(tmp_path, model, heads=3.0).create_optimizer()


def test_a_rate_of_nothing_for_the_heads_is_refused():
    with pytest.raises(ConfigError, match=r"head_lr_multiplier=0.* more than 0"):
        TrainConfig(head_lr_multiplier=0)


def test_one_learning_rate_leaves_the_groups_as_they_are(tmp_path):
    assert len(trainer(tmp_path, adapted()).create_optimizer().param_groups) == 2


def test_the_optimizer_is_fused_where_torch_has_it(tmp_path):
    assert trainer(tmp_path, adapted()).create_optimizer().defaults["fused"]


def test_label_smoothing_reaches_both_losses_without_logits(tmp_path):
    model = adapted()
    smoothing = trainer(tmp_path, model, label_smoothing_factor=0.1)
    ids = tokens()
    found = smoothing.compute_loss(model, {"input_ids": ids, "labels": ids})
    assert_close(found, model(ids, labels=ids, label_smoothing=0.1).loss)
    assert not torch.allclose(found, model(ids, labels=ids).loss)


def test_training_runs_with_a_multiplier_and_its_schedule(tmp_path):
    model = adapted()
    before = [p.detach().clone() for p in model.network().backbone.parameters()]
    trainer(tmp_path, model, multiplier=0.0).train()
    assert all(torch.equal(a, b) for a, b in zip(before, model.network().backbone.parameters(), strict=True))


def test_a_multiplier_among_the_settings_of_an_older_run_is_the_adapters():
    old = TrainConfig.from_dict({"shadow_lr_multiplier": 0.5, "shadow": {"preset": "recommended", "r": 3}})
    assert (old.shadow.shadow_lr_multiplier, old.shadow.r) == (0.5, 3)
    flag = TrainConfig.from_dict({"shadow_lr_multiplier": 0.5, "shadow": {"shadow_lr_multiplier": 0.7}})
    assert flag.shadow.shadow_lr_multiplier == 0.7
    given = TrainConfig.from_dict({"shadow_lr_multiplier": 0.5, "shadow": ShadowConfig(r=3)})
    assert (given.shadow.shadow_lr_multiplier, given.shadow.r) == (0.5, 3)


def test_a_checkpoint_that_does_not_say_the_multiplier_can_be_gone_on_from(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    other = adapted(shadow_lr_multiplier=0.5)
    restore_weights(other.network(), tmp_path)
    assert_close(other.network().state_dict(), model.network().state_dict())


def test_a_negative_multiplier_is_refused():
    with pytest.raises(ConfigError, match="shadow_lr_multiplier=-1"):
        ShadowConfig(shadow_lr_multiplier=-1)

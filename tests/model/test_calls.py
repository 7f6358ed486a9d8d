"""The state of a call stays in the call: threads, interleaving, copies, leftovers, call forms."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from models import attributes, changed_attributes, enable_checkpointing, randomise, tiny_base, tiny_config, tokens
from shadowpeft import ShadowModel, ShadowModelForCausalLM, ShadowModelForSequenceClassification, get_shadow_model
from shadowpeft.core import ShadowRun
from shadowpeft.errors import AdapterError, ArchitectureError, ConfigError
from shadowpeft.model.architectures import blocks_of, decoder_of


def adapted(model_type="llama", **config):
    model = get_shadow_model(tiny_base(model_type), tiny_config(**config))
    randomise(model.network())
    return model


def with_two_adapters():
    model = adapted()
    model.add_adapter("second", tiny_config(r=2))
    randomise(model.network("second"), seed=5)
    return model


@torch.no_grad()
def test_concurrent_forwards_with_different_adapters_do_not_mix():
    model = with_two_adapters()
    jobs = [(("default", "second", "__base__")[i % 3], tokens(1, 4 + i % 5, seed=i)) for i in range(240)]
    expected = [model(ids, adapter=name).logits for name, ids in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: model(job[1], adapter=job[0]).logits, jobs))
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * 240


@torch.no_grad()
def test_disabling_in_one_thread_does_not_reach_another():
    model, ids = adapted(), tokens()
    expected = model(ids).logits
    with model.disable_adapter(), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: model(ids).logits).result(), expected)
        assert not torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_interleaved_decodes_are_independent():
    model = adapted()
    prompts = [tokens(1, 6, seed=1), tokens(1, 6, seed=2)]
    expected = [model(ids).logits for ids in prompts]
    caches = [model(ids[:, :3], use_cache=True).past_key_values for ids in prompts]
    for position in range(3, 6):
        for ids, cache, whole in zip(prompts, caches, expected, strict=True):
            out = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            assert_close(out.logits[:, 0], whole[:, position])


BETWEEN = {"inject_between": "sublayers", "inject_branch": True, "scale_state": True}


@pytest.mark.parametrize("config", [{}, BETWEEN])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_no_tensor_is_kept_after_a_forward(monkeypatch, config, checkpointing, backward):
    """With the cycle collector off: nothing but the output itself may hold the run or its state."""
    kept = []
    original = ShadowRun.__init__

    def remember(self, network, initial, **options):
        original(self, network, initial, **options)
        kept.append(weakref.ref(initial))

    monkeypatch.setattr(ShadowRun, "__init__", remember)
    model, ids = adapted(**config).train(), tokens()
    if checkpointing:
        enable_checkpointing(model)
    gc.disable()
    try:
        loss = model(ids, labels=ids).loss
        if backward:
            loss.backward()
        del loss
        assert kept[0]() is None
    finally:
        gc.enable()


def test_a_deep_copy_and_a_pickle_of_the_model_work_alone():
    model, ids = adapted(), tokens()
    expected = model(ids).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(ids).logits, expected)
        with torch.no_grad():
            other.network().injections[0].W_up.add_(1)
        assert torch.equal(model(ids).logits, expected)
        assert not torch.equal(other(ids).logits, expected)
        base = other.unload()
        assert torch.equal(base(ids).logits, tiny_base()(ids).logits)
        assert torch.equal(model(ids).logits, expected)


def test_positional_keyword_and_tuple_forms_agree():
    model, ids = adapted(), tokens()
    out = model(ids, labels=ids)
    as_tuple = model(input_ids=ids, labels=ids, return_dict=False)
    assert torch.equal(as_tuple[0], out.loss)
    assert torch.equal(as_tuple[1], out.logits)
    assert out.loss.item() == pytest.approx(out.main_loss.item() + 0.05 * out.shadow_loss.item(), rel=1e-12)


def test_an_exception_in_a_block_leaves_nothing_behind(monkeypatch):
    model, ids = adapted(), tokens()
    expected = model(ids).logits
    with monkeypatch.context() as patch:
        patch.setattr(model.base.model.layers[2].mlp, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("config", [{}, BETWEEN])
def test_reentrant_checkpointing_is_exact_or_refused(config):
    ids, gradients = tokens(), []
    for reentrant in (None, True):
        model = adapted(shadow_dropout=0.0, **config).train()
        if reentrant:
            enable_checkpointing(model, use_reentrant=True)
        try:
            model(ids, labels=ids).loss.backward()
        except RuntimeError as error:
            assert "use_reentrant" in str(error)
            return
        gradients.append({name: p.grad for name, p in model.network().named_parameters()})
    assert_close(gradients[1], gradients[0])


FROZEN = {"shadow_model": "base:first:1", "freeze_backbone": True}


@pytest.mark.parametrize("config", [{}, FROZEN, BETWEEN, BETWEEN | {"first_block": 2}, BETWEEN | FROZEN | {"first_block": 3}])
def test_blocks_that_torch_wraps_to_checkpoint_them_change_nothing(config):
    """The hooks lie within its wrapper, so every step is computed again, of a shadow without gradients too."""
    model, ids = adapted(shadow_dropout=0.0, **config).train(), tokens()
    blocks, gradients = blocks_of(decoder_of(model.base)), []
    for wrap in (lambda block: block, checkpoint_wrapper):
        for index, block in enumerate(blocks):
            blocks[index] = wrap(block)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.network().named_parameters() if p.requires_grad})
    assert all(gradient is not None for gradient in gradients[0].values())
    assert_close(gradients[1], gradients[0])


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    ids = tokens(4, 8)
    gradients = []
    for parts in (1, 2, 4):
        model = adapted(shadow_dropout=0.0, auxiliary_loss_weight=0.5)
        for part in ids.chunk(parts):
            model(part, labels=part, num_items_in_batch=torch.tensor(4 * 7)).loss.backward()
        gradients.append({name: p.grad for name, p in model.network().named_parameters()})
    assert_close(gradients[1], gradients[0])
    assert_close(gradients[2], gradients[0])


def test_a_bf16_base_with_an_fp32_adapter_trains_and_generates():
    model = get_shadow_model(tiny_base(dtype=torch.bfloat16), tiny_config(adapter_dtype="float32"))
    assert {p.dtype for p in model.network().parameters()} == {torch.float32}
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    assert model.network().injections[2].W_up.grad.any()
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)
    assert model.detach()(ids).logits.dtype == torch.float32


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_what_is_done_to_a_detached_model_does_not_reach_the_base(model_type):
    """It shares the memory of the base's table and head, which are one tensor where the base ties them, and no more."""
    model, ids = adapted(model_type), tokens()
    expected, detached = model(ids).logits, model.detach()
    theirs, ours = (
        [part.weight for part in (one.get_input_embeddings(), one.get_output_embeddings())] for one in (model, detached)
    )
    assert (ours[0] is ours[1]) == (theirs[0] is theirs[1])
    assert [weight.data_ptr() for weight in ours] == [weight.data_ptr() for weight in theirs]
    detached.requires_grad_(True)
    assert not any(p.requires_grad for p in model.base.parameters())
    detached.half()
    assert {p.dtype for p in model.base.parameters()} == {torch.float64}
    assert torch.equal(model(ids).logits, expected)


def test_no_attribute_of_any_module_changes_during_a_call():
    model, ids = adapted(), tokens()
    before = attributes(model)
    model(ids, labels=ids).loss.backward()
    model.generate(ids, max_new_tokens=2, do_sample=False)
    assert changed_attributes(before, attributes(model)) == []


def test_an_attribute_that_is_overwritten_is_a_changed_one():
    model = adapted()
    before = attributes(model)
    model.active_adapter = "".join(["def", "ault"])  # an equal one
    model.base.config_too = 1
    model.network()._buffers["kept"] = torch.ones(1)
    with torch.no_grad():
        model.base.lm_head.weight.mul_(1)
    found = {(place, name) for place, name, _ in changed_attributes(before, attributes(model))}
    network = ("networks.default", "_buffers")
    assert found == {("", "active_adapter"), ("base", "config_too"), network, ("base.lm_head", "_parameters")}


def test_adapters_are_added_chosen_deleted_and_refused_by_name():
    model, ids = with_two_adapters(), tokens()
    first, second = model(ids).logits, model(ids, adapter="second").logits
    assert not torch.equal(first, second)
    with model.using_adapter("second"):
        assert torch.equal(model(ids).logits, second)
    model.set_adapter("second")
    assert torch.equal(model(ids).logits, second)
    assert {n.split(".")[1] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    with pytest.raises(AdapterError, match="'second' is active"):
        model.delete_adapter("second")
    model.delete_adapter("default")
    with pytest.raises(AdapterError, match="no adapter 'default'; there are: second"):
        model(ids, adapter="default")
    with pytest.raises(AdapterError, match="already an adapter"):
        model.add_adapter("second", tiny_config())
    with pytest.raises(AdapterError, match="reserved"):
        model.add_adapter("__base__", tiny_config())


@pytest.mark.parametrize("name", ["", "v1.0", "a/b", "__base__", "train", "update", "half", "keys", "training"])
def test_a_name_that_cannot_be_an_adapters_is_refused_before_the_base_is_touched(tmp_path, name):
    saved = tmp_path / "adapter"
    adapted().save_pretrained(saved)
    base = tiny_base()
    for make in (
        lambda: get_shadow_model(base, tiny_config(), name),
        lambda: ShadowModel.from_pretrained(saved, base, adapter_name=name),
    ):
        with pytest.raises(AdapterError, match="cannot name an adapter"):
            make()
        assert all(p.requires_grad for p in base.parameters())
    model = get_shadow_model(base, tiny_config(), "default")
    for add in (lambda: model.add_adapter(name, tiny_config()), lambda: model.load_adapter(saved, name)):
        with pytest.raises(AdapterError, match="cannot name an adapter"):
            add()
    assert list(model.networks) == ["default"]


def test_a_second_wrapper_on_one_base_is_refused_until_the_first_is_unloaded():
    base = tiny_base()
    model = get_shadow_model(base, tiny_config())
    with pytest.raises(AdapterError, match="already carries a shadow"):
        get_shadow_model(base, tiny_config())
    assert get_shadow_model(model.unload(), tiny_config())(tokens()).logits.shape == (2, 9, 97)


@pytest.mark.parametrize("copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_base_whose_shadow_model_is_gone_can_be_adapted_again(copied):
    model, ids = adapted(), tokens()
    model = copied(model)
    expected, base, shallow = model(ids).logits, model.base, copy.copy(model)
    del model
    gc.collect()
    assert torch.equal(shallow(ids).logits, expected)  # whose hooks they are too
    del shallow
    gc.collect()
    assert torch.equal(base(ids).logits, tiny_base()(ids).logits)
    again = get_shadow_model(base, tiny_config())
    randomise(again.network())
    assert not torch.equal(again(ids).logits, base(ids).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda base: pickle.loads(pickle.dumps(base))])
def test_a_copy_of_the_base_alone_can_be_adapted_and_a_copy_of_the_model_cannot_be_adapted_twice(copied):
    model, ids = adapted(), tokens()
    base, expected = copied(model.base), model(ids).logits
    again = get_shadow_model(base, tiny_config())
    assert all(len(block._forward_pre_hooks) == 1 for block in blocks_of(decoder_of(base)))
    again.networks["default"].load_state_dict(model.network().state_dict())
    assert torch.equal(again(ids).logits, expected)
    assert torch.equal(model(ids).logits, expected)
    for whole in (again, copied(model)):
        with pytest.raises(AdapterError, match="already carries a shadow"):
            get_shadow_model(whole.base, tiny_config())
    assert torch.equal(again.unload()(ids).logits, tiny_base()(ids).logits)
    copied(again)  # which has no hooks to take


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "opt"])
@pytest.mark.parametrize("num_tokens", [101, 90])
@pytest.mark.parametrize("through", ["model", "base"])
def test_a_resized_vocabulary_reaches_logits_detached_models_and_files(tmp_path, model_type, num_tokens, through):
    model, ids = adapted(model_type), tokens() % 90
    owner = model if through == "model" else model.base
    table = owner.resize_token_embeddings(num_tokens, mean_resizing=False)
    assert table is model.base.get_input_embeddings() and not table.weight.requires_grad
    assert model.config.vocab_size == num_tokens
    output = model(ids, output_shadow_logits=True)
    assert output.logits.shape[-1] == num_tokens
    detached = model.detach()
    assert detached.config.vocab_size == num_tokens
    detached.save_pretrained(tmp_path / "detached")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "detached", attn_implementation="sdpa")
    assert_close(again(ids).logits, output.shadow_logits, rtol=1e-5, atol=1e-6)  # norms and rotary angles are fp32
    model.save_pretrained(tmp_path / "adapter")
    loaded = ShadowModel.from_pretrained(tmp_path / "adapter", model.unload())
    assert torch.equal(loaded(ids).logits, output.logits)


def test_a_shadow_with_a_table_of_its_own_keeps_the_vocabulary(tmp_path):
    tiny_base(num_hidden_layers=2).save_pretrained(tmp_path)
    model, ids = adapted(shadow_model=str(tmp_path)), tokens()
    expected, table = model(ids).logits, model.get_input_embeddings()
    with pytest.raises(AdapterError, match=r"'default' has a token table of its own.*before get_shadow_model"):
        model.resize_token_embeddings(101)
    assert model.resize_token_embeddings() is table is model.get_input_embeddings() and model.config.vocab_size == 97
    assert torch.equal(model(ids).logits, expected)
    model.base.resize_token_embeddings(101, mean_resizing=False)
    with pytest.raises(ArchitectureError, match="table has 97 tokens and the base's head 101"):
        model.detach()


def test_a_model_taken_off_its_base_is_not_called_as_if_it_were_on_it():
    model, ids = adapted(), tokens()
    base = model.unload()
    generate = partial(model.generate, max_new_tokens=2)
    calls = [model, model.last_hidden_states, model.training_states, generate, partial(generate, speculative=2)]
    for call in calls:
        with pytest.raises(AdapterError, match=r"unload\(\) took this shadow model off its base.*get_shadow_model"):
            call(ids)
    assert torch.equal(model(ids, adapter="__base__").logits, base(ids).logits)
    other = get_shadow_model(base, tiny_config())
    with pytest.raises(AdapterError, match="took this shadow model off"):
        model(ids)
    assert other(ids).logits.shape == (2, 9, 97)
    assert model.unload() is base


def test_a_base_that_is_refused_is_left_as_it_was():
    base = tiny_base()
    with pytest.raises(ConfigError, match="task_type"):
        get_shadow_model(base, tiny_config(task_type="SEQ_CLS"))
    assert all(p.requires_grad for p in base.parameters())
    get_shadow_model(base, tiny_config())
    assert not any(p.requires_grad for p in base.parameters())


def test_a_shadow_model_is_no_base(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    for make in (lambda: get_shadow_model(model, tiny_config()), lambda: ShadowModel.from_pretrained(tmp_path, model)):
        with pytest.raises(AdapterError, match=r"ShadowModelForCausalLM carries a shadow already.*add_adapter"):
            make()


@pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing. is deprecated:FutureWarning")  # peft's doing
def test_a_base_below_another_wrapper_is_no_base(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft==0.21.2)")
    adapted().save_pretrained(tmp_path)
    model = peft.get_peft_model(tiny_base(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for make in (lambda: get_shadow_model(model, tiny_config()), lambda: ShadowModel.from_pretrained(tmp_path, model)):
        with pytest.raises(AdapterError, match=r"not PeftModelForCausalLM; of a PEFT model pass .*merge_and_unload"):
            make()
    assert get_shadow_model(model.merge_and_unload(), tiny_config())(tokens()).logits.shape == (2, 9, 97)


@pytest.mark.parametrize("labels", [None, 3], ids=["language model", "classifier"])
def test_the_class_of_the_other_task_is_refused(tmp_path, labels):
    ours, other = ShadowModelForCausalLM, ShadowModelForSequenceClassification
    ours, other = (ours, other) if labels is None else (other, ours)
    config = tiny_config(task_type="CAUSAL_LM" if labels is None else "SEQ_CLS")
    get_shadow_model(tiny_base(labels=labels), config).save_pretrained(tmp_path)
    base = tiny_base(labels=labels)
    message = f"{other.__name__} does not fit the base {type(base).__name__}; use {ours.__name__}"
    for make in (lambda: other.from_pretrained(tmp_path, base), lambda: other(base, config)):
        with pytest.raises(AdapterError, match=message):
            make()
        assert all(p.requires_grad for p in base.parameters())
    assert type(ours.from_pretrained(tmp_path, base)) is ours


@torch.no_grad()
def test_what_a_call_of_the_base_alone_cannot_give_is_refused_and_the_rest_is_done():
    model, ids = adapted(), tokens()
    with pytest.raises(ConfigError, match=r"output_shadow_logits=True .*uses the base alone"):
        model(ids, adapter="__base__", output_shadow_logits=True)
    with model.disable_adapter(), pytest.raises(ConfigError, match="output_logits=False is not for a call of the base alone"):
        model(ids, labels=ids, output_logits=False)
    logits = model(ids, adapter="__base__", output_logits=True).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
    options = {"adapter": "__base__", "labels": ids, "label_smoothing": 0.1}
    found = model(ids, **options)
    assert_close((found.loss, found.logits), (expected, logits))
    assert_close(model(ids, **options, return_dict=False)[:2], (expected, logits))
    assert_close(model(ids, **options, num_items_in_batch=32).loss, expected / 2)  # of 2 x 8 labels


@torch.no_grad()
def test_a_classifiers_base_has_no_shadow_logits():
    model = get_shadow_model(tiny_base(labels=3), tiny_config(task_type="SEQ_CLS"))
    with model.disable_adapter(), pytest.raises(ConfigError, match="output_shadow_logits=True"):
        model(tokens(), output_shadow_logits=True)


def test_trainable_parameters_are_printed_in_the_usual_form(capsys):
    model = adapted()
    trainable = model.network().num_parameters()
    total = trainable + model.base.num_parameters()
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,} || all params: {total:,} ||")

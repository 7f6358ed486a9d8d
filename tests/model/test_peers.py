"""What the existing implementations get wrong and no other file here tries; tests/README.md has the whole list."""

import pytest
import torch
from torch.testing import assert_close
from transformers import BloomConfig, BloomForCausalLM, DynamicCache, GenerationConfig, TrainingArguments
from transformers import Trainer as PlainTrainer

from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import ShadowModel, get_shadow_model
from shadowpeft.errors import AdapterError, ArchitectureError


def adapted(**config):
    model = get_shadow_model(tiny_base(), tiny_config(**config))
    randomise(model.network())
    return model


@torch.no_grad()
def test_a_bare_dynamic_cache_of_the_caller_serves_two_calls():
    model, ids = adapted(), tokens(2, 9)
    cache = DynamicCache()
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([5, 4], 1)]
    assert_close(torch.cat(parts, 1), model(ids).logits)


def test_logits_to_keep_shortens_the_shadows_logits_too():
    model, ids = adapted(), tokens()
    whole = model(ids, output_shadow_logits=True)
    last = model(ids, output_shadow_logits=True, logits_to_keep=1)
    assert last.logits.shape == last.shadow_logits.shape == (2, 1, 97)
    assert_close(last.shadow_logits, whole.shadow_logits[:, -1:])
    assert model(ids).shadow_logits is None


def test_early_exit_is_refused_and_leaves_the_config_as_it_was():
    model, ids = adapted(), tokens(1)
    with pytest.raises(NotImplementedError, match=r"assistant_early_exit .* speculative=4"):
        model.generate(ids, max_new_tokens=2, assistant_early_exit=2)
    config = GenerationConfig(max_new_tokens=2, assistant_early_exit=2)
    for args, kwargs in (((ids,), {"generation_config": config}), ((ids, config), {})):
        with pytest.raises(NotImplementedError, match="assistant_early_exit"):
            model.generate(*args, **kwargs)
    model.generation_config.assistant_early_exit = 2
    with pytest.raises(NotImplementedError, match="assistant_early_exit"):
        model.generate(ids, GenerationConfig(max_new_tokens=2))
    model.generation_config.assistant_early_exit = None
    assert model.config.num_hidden_layers == 4
    assert model.generate(ids, max_new_tokens=2, min_new_tokens=2).shape == (1, 11)


def test_continuous_batching_is_refused_to_the_caller():
    with pytest.raises(NotImplementedError, match="continuous batching"):
        adapted().generate_batch([[3, 4, 5]])


def test_an_adapter_for_each_row_is_refused_not_ignored():
    with pytest.raises(AdapterError, match="adapter_names is not supported"):
        adapted()(tokens(), adapter_names=["default", "__base__"])


def test_a_type_outside_the_table_is_refused_with_the_table():
    base = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2))
    with pytest.raises(ArchitectureError, match=r"'bloom' is not supported; .*gpt2.*llama.*qwen3"):
        get_shadow_model(base, tiny_config())


def test_a_loaded_fp32_adapter_trains_on_a_bf16_base(tmp_path):
    model = get_shadow_model(tiny_base(dtype=torch.bfloat16), tiny_config(adapter_dtype="float32"))
    model.save_pretrained(tmp_path)
    loaded = ShadowModel.from_pretrained(tmp_path, tiny_base(dtype=torch.bfloat16), is_trainable=True).train()
    ids = tokens()
    loaded(ids, labels=ids).loss.backward()
    assert {p.dtype for p in loaded.network().parameters()} == {torch.float32}
    assert loaded.network().injections[0].W_up.grad.any()


def trained(folder, *, batch_size, accumulation):
    """The weights after one optimizer step of transformers' own Trainer over four rows, arguments at defaults."""
    model = adapted(shadow_dropout=0.0, auxiliary_loss_weight=0.5)
    rows = [{"input_ids": row, "labels": row, "note": "a column the model does not take"} for row in tokens(4, 8)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        optim="sgd",
        max_grad_norm=0.0,
        learning_rate=0.1,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    PlainTrainer(model, arguments, train_dataset=rows).train()
    return dict(model.network().named_parameters())


def test_transformers_own_trainer_gives_the_same_step_whatever_the_accumulation(tmp_path):
    whole = trained(tmp_path, batch_size=4, accumulation=1)
    parts = trained(tmp_path, batch_size=1, accumulation=4)
    assert_close(parts, whole)
    assert not torch.equal(whole["injections.0.W_up"], adapted().network().injections[0].W_up)

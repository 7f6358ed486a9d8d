"""One contract for every row of the architecture table."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, LlamaModel

from models import MIXTURES, enable_checkpointing, randomise, tiny_base, tiny_config, tokens
from shadowpeft import ShadowModel, get_shadow_model
from shadowpeft.errors import AdapterError, ArchitectureError, ConfigError
from shadowpeft.model.architectures import ARCHITECTURES, attentions_of, blocks_of, decoder_of

pytestmark = pytest.mark.contract

ALL = sorted(ARCHITECTURES)
MAX_NEW = 10  # past the sliding window of 6 that the windowed bases have


def adapted(model_type: str, *, dtype: torch.dtype = torch.float64, **config) -> ShadowModel:
    base = tiny_base(model_type, dtype=dtype)
    model = get_shadow_model(base, tiny_config(**{"adapter_dtype": "base"} | config))
    randomise(model.network())
    return model


def generate(model, ids, **options):
    return model.generate(ids, max_new_tokens=MAX_NEW, min_new_tokens=MAX_NEW, do_sample=False, **options)


def test_the_table_holds_every_promised_architecture():
    promised = """
        llama mistral mixtral qwen2 qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 olmo2 granite smollm3
        gpt_neox gpt2 opt stablelm starcoder2 cohere gpt_oss
    """
    promised = set(promised.split())
    assert promised <= set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", ALL)
def test_a_shadow_of_one_head_has_one_of_each_kind_and_runs(model_type):
    model = adapted(model_type, shadow_num_attention_heads=1)
    shadow, field = model.network().backbone.config, ARCHITECTURES[model_type].kv_heads
    assert shadow.num_attention_heads == 1 and (field is None or getattr(shadow, field) == 1)
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("model_type", ALL)
def test_a_fresh_adapter_leaves_the_logits_bit_identical(model_type):
    base, ids = tiny_base(model_type), tokens()
    before = base(ids).logits
    assert torch.equal(get_shadow_model(base, tiny_config())(ids).logits, before)


@pytest.mark.parametrize("model_type", ALL)
def test_the_step_acts_on_every_refined_block_and_only_there(model_type):
    model, ids = adapted(model_type), tokens()
    seen = {}
    for index, block in enumerate(blocks_of(decoder_of(model.base))):
        block.register_forward_pre_hook(lambda _, args, i=index: seen.setdefault(i, []).append(args[0]))
    model(ids, adapter="__base__")
    model(ids)
    assert torch.equal(*seen[0])
    for index in range(1, 4):
        assert not torch.allclose(*seen[index])


@pytest.mark.parametrize("model_type", ALL)
def test_the_base_without_a_run_is_bit_identical_while_attached_and_after_unloading(model_type):
    base, ids = tiny_base(model_type), tokens()
    before, keys = base(ids).logits, list(base.state_dict())
    model = get_shadow_model(base, tiny_config())
    randomise(model.network())
    assert not torch.allclose(model(ids).logits, before)
    assert torch.equal(base(ids).logits, before)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, before)
    assert list(base.state_dict()) == keys
    assert torch.equal(model.unload()(ids).logits, before)
    assert not any(block._forward_pre_hooks for block in blocks_of(decoder_of(base)))


@pytest.mark.parametrize("model_type", ALL)
def test_greedy_with_cache_equals_greedy_without(model_type):
    model, ids = adapted(model_type), tokens()
    cached = generate(model, ids, output_logits=True, return_dict_in_generate=True)
    uncached = generate(model, ids, use_cache=False, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close(torch.stack(cached.logits), torch.stack(uncached.logits))


@pytest.mark.parametrize("model_type", ALL)
def test_beam_search_with_cache_equals_beam_search_without(model_type):
    model, ids = adapted(model_type), tokens()
    assert torch.equal(generate(model, ids, num_beams=3), generate(model, ids, num_beams=3, use_cache=False))


@pytest.mark.parametrize("model_type", ALL)
def test_every_trainable_parameter_has_a_gradient_after_two_steps(model_type):
    model = get_shadow_model(tiny_base(model_type), tiny_config()).train()
    optimizer = torch.optim.SGD(model.network().parameters(), lr=0.5)
    for seed in range(2):
        optimizer.zero_grad()
        model(tokens(4, 12, seed=seed), labels=tokens(4, 12, seed=seed)).loss.backward()
        optimizer.step()
    without = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []
    assert all(p.grad is None for p in model.base.parameters())


@pytest.mark.parametrize("model_type", ALL)
def test_detached_logits_are_the_shadow_head_on_the_initial_state(model_type):
    model, ids = adapted(model_type), tokens()
    expected = model(ids, output_shadow_logits=True).shadow_logits
    detached = model.detach()
    assert_close(detached(ids).logits, expected)
    greedy = generate(detached, ids)
    assert torch.equal(greedy, generate(detached, ids, use_cache=False))


@pytest.mark.parametrize("model_type", ALL)
def test_a_detached_model_reloads_from_disk_alone(model_type, tmp_path):
    from transformers import AutoModelForCausalLM

    model, ids = adapted(model_type, shadow_hidden_size=16, shadow_num_attention_heads=2), tokens()
    expected = model(ids, output_shadow_logits=True).shadow_logits
    detached = model.detach()
    assert_close(detached(ids).logits, expected)
    detached.save_pretrained(tmp_path)
    experts = {"experts_implementation": "eager"} if model_type in MIXTURES else {}
    reloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager", **experts
    )
    assert_close(reloaded(ids).logits, expected)


@pytest.mark.parametrize("model_type", ALL)
def test_left_padding_does_not_change_the_logits(model_type):
    # In float64 the untouched gemma2 itself returns NaN behind a fully masked row.
    dtype = torch.float32 if model_type == "gemma2" else torch.float64
    model, ids = adapted(model_type, dtype=dtype), tokens(1, 7)
    padded = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), ids], 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    assert_close(out, model(ids).logits)


@pytest.mark.parametrize("model_type", ALL)
def test_a_saved_adapter_loads_to_the_same_logits(model_type, tmp_path):
    model, ids = adapted(model_type), tokens()
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = ShadowModel.from_pretrained(tmp_path, tiny_base(model_type))
    assert torch.equal(loaded(ids).logits, expected)


@pytest.mark.parametrize("model_type", ALL)
def test_gradient_checkpointing_gives_the_same_gradients(model_type):
    ids = tokens()
    gradients = []
    for checkpointing in (False, True):
        model = adapted(model_type, shadow_dropout=0.0).train()
        if checkpointing:
            enable_checkpointing(model)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.network().named_parameters()})
    assert_close(gradients[1], gradients[0])


BETWEEN = {"inject_between": "sublayers", "scale_state": True, "inject_branch": True}
WITH_ATTENTION = sorted(name for name, row in ARCHITECTURES.items() if row.attention is not None)


@pytest.mark.parametrize("model_type", WITH_ATTENTION)
def test_between_sublayers_the_mlp_reads_the_corrected_stream_and_so_does_all_behind_it(model_type):
    model, ids = adapted(model_type, **BETWEEN), tokens()
    network, blocks = model.network(), blocks_of(decoder_of(model.base))
    seen: dict[tuple, torch.Tensor] = {}
    for index, block in enumerate(blocks):
        attention = attentions_of(decoder_of(model.base))[index]
        norm = block.ln_2 if model_type == "gpt2" else block.post_attention_layernorm
        block.register_forward_pre_hook(lambda _, args, i=index: seen.__setitem__((i, "in"), args[0]))
        block.register_forward_hook(lambda _, args, out, i=index: seen.__setitem__((i, "out"), out))
        # In front of the hook that corrects what attention adds.
        attention.register_forward_hook(lambda _, args, out, i=index: seen.__setitem__((i, "attention"), out[0]), prepend=True)
        norm.register_forward_pre_hook(lambda _, args, i=index: seen.__setitem__((i, "mid"), args[0]))
    assert model(ids).logits.isfinite().all()
    s = model._initial_state(network, ids, None, None, {"attention_mask": None, "use_cache": False})
    for index in range(len(blocks)):
        if index:
            last = seen[index - 1, "out"]
            expected, s = network.step(index, last, s, last - seen[index - 1, "mid"])
            assert_close(seen[index, "in"], expected)
        added = seen[index, "attention"]
        assert_close(seen[index, "mid"], network.step_between(index, seen[index, "in"] + added, s, added))
        assert not torch.allclose(seen[index, "mid"], seen[index, "in"] + added)


@pytest.mark.parametrize(
    ("model_type", "implementation"),
    # gpt_oss has sinks, which torch's attention knows nothing of.
    [(name, kind) for name in WITH_ATTENTION for kind in ("eager", "sdpa") if (name, kind) != ("gpt_oss", "sdpa")],
)
def test_between_sublayers_greedy_with_cache_and_drafts_equals_greedy_without(model_type, implementation):
    model, ids = adapted(model_type, **BETWEEN), tokens()
    model.base.set_attn_implementation(implementation)
    uncached = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids), uncached)
    assert torch.equal(generate(model, ids, speculative=3), uncached)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    "between",
    [
        *(BETWEEN, BETWEEN | {"first_block": 2, "dropout_at": "input"}, BETWEEN | {"first_block": 0, "share_steps": True}),
        *({"inject_between": "sublayers"}, {"scale_state": True, "inject_branch": True}),
    ],
)
def test_between_sublayers_and_with_branches_checkpointing_gives_the_same_gradients(between, dropout):
    ids = tokens()
    gradients = []
    for checkpointing in (False, True):
        model = adapted("llama", shadow_dropout=dropout, **between).train()
        torch.manual_seed(0)
        if checkpointing:
            enable_checkpointing(model)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.network().named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("model_type", sorted(set(ALL) - set(WITH_ATTENTION)))
def test_between_sublayers_is_refused_where_attention_is_not_added_as_it_is_and_nothing_is_changed(model_type):
    base = tiny_base(model_type)
    with pytest.raises(ConfigError, match=f"does not go with a base of type '{model_type}'.*use 'blocks'.*llama"):
        get_shadow_model(base, tiny_config(inject_between="sublayers"))
    assert not any(block._forward_pre_hooks for block in blocks_of(decoder_of(base)))


@pytest.mark.parametrize("index", [1, 3])
@pytest.mark.parametrize("options", [{}, {"speculative": 2}])
def test_a_block_that_keeps_its_keywords_from_its_attention_is_found_out(index, options):
    model = adapted("llama", inject_between="sublayers")
    block = blocks_of(decoder_of(model.base))[index]
    block.self_attn = Deaf(block.self_attn.forward)
    with pytest.raises(AdapterError, match=rf"block {index} ran without .* use inject_between='blocks'"):
        generate(model, tokens(), **options)


class Deaf(torch.nn.Module):
    """Attention that is called without the keywords it does not know."""

    def __init__(self, plain) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, *args, shadow_run=None, **kwargs):
        return self.plain(*args, **kwargs)


def test_adapters_that_correct_between_sublayers_and_that_do_not_share_a_base():
    model, ids = adapted("llama"), tokens()
    before = model(ids).logits
    model.add_adapter("finer", tiny_config(adapter_dtype="base", **BETWEEN))
    randomise(model.network("finer"))
    finer = model(ids, adapter="finer").logits
    assert not torch.allclose(finer, before)
    assert torch.equal(model(ids).logits, before)
    base = model.unload()
    decoder = decoder_of(base)
    assert not any(block._forward_pre_hooks for block in blocks_of(decoder))
    assert not any(attention._forward_hooks for attention in attentions_of(decoder))


def test_a_copied_base_is_corrected_between_its_sublayers_once():
    model, ids = adapted("llama", **BETWEEN), tokens()
    copied = copy.deepcopy(model.base)
    again = get_shadow_model(copied, model.shadow_config)
    again.network().load_state_dict(model.network().state_dict())
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_an_encoder_is_refused_with_the_list_of_what_is_supported():
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(ArchitectureError, match=r"'bert' \(an encoder.*gpt2.*llama.*qwen3"):
        get_shadow_model(BertForSequenceClassification(config), tiny_config(task_type="SEQ_CLS"))


def test_a_bare_decoder_is_refused():
    with pytest.raises(ArchitectureError, match="AutoModelForCausalLM"):
        get_shadow_model(LlamaModel(tiny_base().config), tiny_config())


def test_a_base_with_one_block_is_refused():
    with pytest.raises(ArchitectureError, match=r"1 block; .* at least 2"):
        get_shadow_model(tiny_base(num_hidden_layers=1), tiny_config())


def test_opt_with_projected_embeddings_is_refused():
    with pytest.raises(ArchitectureError, match="word_embed_proj_dim=16"):
        get_shadow_model(tiny_base("opt", word_embed_proj_dim=16), tiny_config())

"""Generation in every way users call it, against decoding without a cache."""

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import get_shadow_model
from shadowpeft.errors import ConfigError
from shadowpeft.generate.rollback import CAN_DRAFT_IN_WINDOWS
from shadowpeft.model.cache import CACHE

NEW = 10
KINDS = ["llama", "qwen3", "gemma3_text", "gpt2", "mistral"]


def adapted(model_type="llama", **config):
    model = get_shadow_model(tiny_base(model_type), tiny_config(**config))
    randomise(model.network())
    return model


def run(model, ids=None, **options):
    return model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, **{"do_sample": False} | options)


def make_cache(kind, model):
    if kind == "bare dynamic":
        return DynamicCache()
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=32)


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("kind", ["bare dynamic", "dynamic", "static"])
def test_a_cache_made_by_the_caller_serves_both_paths(model_type, kind):
    model, ids = adapted(model_type), tokens()
    if kind == "bare dynamic" and model_type in {"gemma3_text", "mistral"}:
        pytest.skip("transformers itself gives a windowed base no window mask with a bare DynamicCache")
    expected = run(model, ids, use_cache=False)
    cache = make_cache(kind, model)
    assert torch.equal(run(model, ids, **{CACHE: cache}), expected)
    assert len(cache.layers) == 4 + 1


@pytest.mark.parametrize("model_type", KINDS)
def test_static_cache_implementation_equals_no_cache(model_type):
    model, ids = adapted(model_type), tokens()
    assert torch.equal(run(model, ids, cache_implementation="static"), run(model, ids, use_cache=False))


@pytest.mark.parametrize("model_type", KINDS)
def test_several_prompts_with_left_padding_equal_each_alone(model_type):
    model = adapted(model_type)
    prompts = [tokens(1, length, seed=length) for length in (3, 8, 5)]
    width = max(p.shape[1] for p in prompts)
    padded = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = (padded != 0).long()
    together = run(model, padded, attention_mask=mask)[:, width:]
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, run(model, prompt)[0, prompt.shape[1] :])


def test_sampling_with_cache_draws_the_same_tokens_as_without():
    model, ids = adapted(), tokens()
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(run(model, ids, do_sample=True, temperature=1.3, top_k=20, use_cache=use_cache))
    assert torch.equal(*drawn)


def test_several_sequences_for_one_prompt_equal_without_cache():
    model, ids = adapted(), tokens()
    options = {"num_beams": 4, "num_return_sequences": 3}
    assert torch.equal(run(model, ids, **options), run(model, ids, use_cache=False, **options))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_input_embeddings_give_the_tokens_that_their_ids_give(model_type):
    model, ids = adapted(model_type), tokens()
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(run(model, inputs_embeds=embeddings), run(model, ids)[:, ids.shape[1] :])


@pytest.mark.parametrize("model_type", KINDS)
def test_generation_continues_from_a_returned_cache(model_type):
    model, ids = adapted(model_type), tokens()
    first = run(model, ids, return_dict_in_generate=True)
    more = torch.cat([first.sequences, tokens(2, 3, seed=9)], 1)
    continued = run(model, more, **{CACHE: first.past_key_values})
    assert torch.equal(continued, run(model, more, use_cache=False))


class _NoStream(nullcontext):
    def wait_stream(self, other):
        pass


@pytest.mark.parametrize(("model_type", "only_non_sliding"), [("llama", False), ("gemma3_text", True), ("gemma3_text", False)])
@pytest.mark.parametrize("options", [{}, {"speculative": 2}])
def test_an_offloaded_cache_has_every_layer_back_before_it_is_used(monkeypatch, model_type, only_non_sliding, options):
    """The host is another dtype here, with which attention fails as with another device; streams need a GPU."""
    model, ids, moved = adapted(model_type), tokens(), []
    expected = run(model, ids)

    def offload(layer):
        moved.append(layer)
        layer.keys, layer.values = layer.keys.to(torch.complex128), layer.values.to(torch.complex128)

    def prefetch(layer):
        if layer.is_initialized and layer.keys.is_complex():
            layer.keys, layer.values = layer.keys.real, layer.values.real

    for kind in (DynamicLayer, DynamicSlidingWindowLayer):
        monkeypatch.setattr(kind, "offload", offload)
        monkeypatch.setattr(kind, "prefetch", prefetch)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: _NoStream())
    cache = DynamicCache(config=model.config)
    cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, only_non_sliding, _NoStream()
    assert torch.equal(run(model, ids, **{CACHE: cache}, **options), expected)
    assert moved and not set(moved) & set(cache.layers[4:])


@torch.no_grad()
def test_a_chunked_prefill_equals_one_pass():
    model, ids = adapted("qwen3"), tokens(2, 9)
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split([4, 1, 4], 1)]
    assert_close(torch.cat(parts, 1), model(ids).logits)


@torch.no_grad()
def test_cropping_the_cache_takes_both_paths_back():
    model, ids = adapted(), tokens(2, 9)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    cache.crop(-4)
    other = tokens(2, 2, seed=7)
    out = model(other, past_key_values=cache, use_cache=True).logits
    assert_close(out, model(torch.cat([ids[:, :5], other], 1)).logits[:, 5:])


def test_prompt_lookup_and_assisted_decoding_equal_greedy():
    for model_type in ("llama", "gemma3_text"):
        model, ids = adapted(model_type), tokens(1, 9)
        expected = run(model, ids)
        assert torch.equal(run(model, ids, prompt_lookup_num_tokens=2), expected)
        assert torch.equal(run(model, ids, assistant_model=model.detach()), expected)


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "gpt_oss"])
def test_prompt_lookup_and_assisted_decoding_take_a_shadow_past_its_window(model_type):
    model, ids = adapted(model_type, shadow_layer_types="base"), tokens(1, 9)
    assert ids.shape[1] > model.config.sliding_window
    expected = run(model, ids)
    assert torch.equal(run(model, ids, prompt_lookup_num_tokens=3), expected)
    if CAN_DRAFT_IN_WINDOWS:  # the assistant is a windowed model too, which transformers drafts with in the same way
        assert torch.equal(run(model, ids, assistant_model=model.detach()), expected)


def test_a_cache_that_only_the_base_filled_is_refused():
    model, ids = adapted(), tokens()
    cache = model(ids, adapter="__base__", use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="only the base has seen"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_that_another_adapter_filled_is_refused_until_it_is_empty(kind):
    model, ids = adapted(), tokens()
    model.add_adapter("other", tiny_config())
    cache = make_cache(kind, model)
    model(ids, use_cache=True, **{CACHE: cache})
    model(ids[:, :1], use_cache=True, **{CACHE: copy.deepcopy(cache)})
    calls = [partial(model, ids[:, :1]), partial(run, model, ids), partial(run, model, ids, speculative=2)]
    for call in calls:
        with pytest.raises(ConfigError, match=r"filled under another adapter.*empty cache"):
            call(use_cache=True, adapter="other", **{CACHE: copy.deepcopy(cache)})
    read = pickle.loads(pickle.dumps(cache))  # by another process, where its adapter would be loaded anew
    model(ids[:, :1], use_cache=True, adapter="other", **{CACHE: read})
    if kind == "static":
        cache.reset()
        expected = model(ids, adapter="other").logits
        assert_close(model(ids, use_cache=True, adapter="other", **{CACHE: cache}).logits, expected)
        with pytest.raises(ConfigError, match="filled under another adapter"):
            model(ids[:, :1], use_cache=True, **{CACHE: cache})


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mistral"])
def test_a_cache_with_which_the_base_went_on_alone_is_refused(model_type):
    model, ids = adapted(model_type), tokens()
    cache = model(ids, use_cache=True)[CACHE]
    model(ids[:, :1], past_key_values=cache, use_cache=True, adapter="__base__")
    with pytest.raises(ConfigError, match="only the base has seen"):
        model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_embeddings_for_a_shadow_with_a_table_of_its_own_are_refused():
    model, ids = adapted(share_embeddings=False), tokens()
    embeddings = model.get_input_embeddings()(ids)
    for call in (model, model.last_hidden_states, partial(run, model)):
        with pytest.raises(ConfigError, match=r"a table of its own.*share_embeddings=True"):
            call(inputs_embeds=embeddings)
    expected = model(ids, adapter="__base__").logits
    assert torch.equal(model(inputs_embeds=embeddings, adapter="__base__").logits, expected)


def test_a_cache_of_another_model_is_refused():
    cache = DynamicCache(config=tiny_base(num_hidden_layers=3).config)
    with pytest.raises(ConfigError, match="3 layers; expected 4"):
        adapted()(tokens(), past_key_values=cache, use_cache=True)


def test_packed_sequences_do_not_see_each_other():
    model = adapted("qwen3").eval()
    first, second = tokens(1, 5, seed=1), tokens(1, 4, seed=2)
    positions = torch.cat([torch.arange(5), torch.arange(4)])[None]
    packed = model(torch.cat([first, second], 1), position_ids=positions, use_cache=False).logits
    assert_close(packed, torch.cat([model(first).logits, model(second).logits], 1))


BETWEEN = {"inject_between": "sublayers", "inject_branch": True, "scale_state": True}


@pytest.mark.parametrize("config", [{}, BETWEEN])
def test_a_full_graph_compiles_and_agrees(without_shape_checks, config):
    model, ids = adapted(**config), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_a_call_takes_its_cache_under_either_name_and_under_one_alone():
    model, ids = adapted(), tokens()
    first, second = (make_cache("dynamic", model) for _ in range(2))
    expected = model(ids, past_key_values=first, use_cache=True).logits
    assert torch.equal(model(ids, cache=second, use_cache=True).logits, expected)
    assert second.get_seq_length() == ids.shape[1]
    with pytest.raises(ConfigError, match="give one of them"):
        model(ids[:, :1], past_key_values=first, cache=second)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
@pytest.mark.parametrize("options", [{}, {"speculative": 2}])
def test_generate_and_last_hidden_states_take_a_cache_under_either_name(name, options):
    model, ids = adapted(), tokens()
    cache = make_cache("dynamic", model)
    assert torch.equal(run(model, ids, **{name: cache}, **options), run(model, ids))
    assert cache.get_seq_length() == ids.shape[1] + NEW - 1
    first, second = (make_cache("dynamic", model) for _ in range(2))
    model(ids, past_key_values=first, use_cache=True)
    model.last_hidden_states(ids, use_cache=True, **{name: second})
    more = tokens(2, 1, seed=4)
    states = model.last_hidden_states(more, use_cache=True, **{name: second}).last_hidden_state
    assert torch.equal(model.lm_logits(states), model(more, past_key_values=first, use_cache=True).logits)
    with pytest.raises(ConfigError, match="give one of them"):
        run(model, ids, past_key_values=first, cache=second)

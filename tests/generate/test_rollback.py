"""After a rejection both caches are what they would be had the rejected drafts never been seen."""

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from models import tokens
from shadowpeft import SpeculativeConfig
from shadowpeft.generate import SpeculativeFallbackWarning
from shadowpeft.generate.rollback import CAN_DRAFT_IN_WINDOWS, recording, roll_back, why_not_croppable
from shadowpeft.model.architectures import decoder_of
from shadowpeft.model.cache import CACHE
from speculation import adapted, oracle

LENGTH, NEW = 9, 14
WINDOWED = ["gemma3_text", "mistral", "gemma2", "gpt_oss"]


def generate(model, ids, **options):
    return model.generate(ids, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, **options)


def rigged(sequences, wrong_every=3):
    return SpeculativeConfig(num_draft_tokens=4, draft_processor=oracle(sequences, wrong_every=wrong_every))


@torch.no_grad()
def fresh_cache(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    return cache


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2", *WINDOWED])
def test_keys_and_values_of_both_paths_are_those_of_a_fresh_run(model_type):
    if model_type == "mistral" and not CAN_DRAFT_IN_WINDOWS:
        pytest.skip("this transformers does not let a shadow with windows draft")
    model, ids = adapted(model_type), tokens(2, LENGTH)
    plain = generate(model, ids)
    out = generate(model, ids, speculative=rigged(plain), return_dict_in_generate=True)
    assert out.statistics.num_accepted < out.statistics.num_drafted
    fresh = fresh_cache(model, out.sequences[:, :-1])
    assert len(out.past_key_values.layers) == len(fresh.layers)
    for ours, expected in zip(out.past_key_values.layers, fresh.layers, strict=True):
        assert ours.get_seq_length() == expected.get_seq_length() == LENGTH + NEW - 1
        assert_close(ours.keys, expected.keys)
        assert_close(ours.values, expected.values)


@pytest.mark.parametrize("model_type", ["llama", *WINDOWED])
@torch.no_grad()
def test_decoding_on_after_rejections_equals_a_fresh_run(model_type):
    model, ids = adapted(model_type), tokens(2, LENGTH)
    out = generate(model, ids, speculative=rigged(generate(model, ids), 1), return_dict_in_generate=True)
    for length in (1, 3):
        more = tokens(2, length, seed=5)
        seen = out.sequences if length == 1 else torch.cat([out.sequences, tokens(2, 1, seed=5)], 1)
        tail = torch.cat([seen[:, out.past_key_values.get_seq_length() :], more], 1)
        logits = model(tail, past_key_values=out.past_key_values, use_cache=True).logits
        expected = model(torch.cat([seen, more], 1), use_cache=False).logits[:, -tail.shape[1] :]
        assert_close(logits, expected)


@pytest.mark.parametrize("model_type", WINDOWED)
@pytest.mark.parametrize("wrong_every", [None, 2, 1])
def test_windows_that_have_slid_are_rolled_back_exactly(model_type, wrong_every):
    model, ids = adapted(model_type), tokens(2, LENGTH)  # the window is 6, full before the first draft
    plain = generate(model, ids, use_cache=False)
    out = generate(model, ids, speculative=rigged(plain, wrong_every), return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)
    assert not any(getattr(layer, "record_past", False) for layer in out.past_key_values.layers)


def test_a_bare_cache_of_a_model_of_windows_alone_serves_both_paths():
    model, ids = adapted("mistral"), tokens(2, LENGTH)
    plain = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids, **{CACHE: DynamicCache()}), plain)
    assert torch.equal(generate(model, ids, speculative=rigged(plain, 3), **{CACHE: DynamicCache()}), plain)


@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral"])
def test_a_static_window_falls_back_to_plain_decoding_with_a_warning(model_type):
    model, ids = adapted(model_type), tokens(2, LENGTH)
    plain = generate(model, ids, use_cache=False)
    with pytest.warns(SpeculativeFallbackWarning, match="a static layer with a window of 6 overwrites old tokens"):
        out = generate(model, ids, speculative=3, cache_implementation="static", return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)
    assert out.statistics is None and out.past_key_values is not None
    with pytest.warns(SpeculativeFallbackWarning, match="a static layer"):
        assert torch.equal(generate(model, ids, speculative=3, cache_implementation="static"), plain)


def test_a_static_window_that_never_fills_is_rolled_back():
    model, ids = adapted("gemma3_text", sliding_window=40), tokens(2, LENGTH)
    plain = generate(model, ids, use_cache=False)
    cache = StaticCache(config=model.config, max_cache_len=30)
    assert torch.equal(generate(model, ids, speculative=rigged(plain), **{CACHE: cache}), plain)


@torch.no_grad()
def test_a_static_layer_hides_what_was_rolled_back():
    model, ids = adapted(), tokens(2, LENGTH)
    cache = StaticCache(config=model.config, max_cache_len=20)
    model(ids, past_key_values=cache, use_cache=True)
    roll_back(cache, 4)
    other = tokens(2, 2, seed=7)
    logits = model(other, past_key_values=cache, use_cache=True).logits
    assert_close(logits, model(torch.cat([ids[:, :5], other], 1)).logits[:, 5:])


def test_a_cache_of_unknown_layers_is_named():
    class Odd(type(DynamicCache(config=adapted().config).layers[0])):
        pass

    cache = DynamicCache(config=adapted().config)
    cache.layers[1] = Odd()
    assert "type Odd cannot give up its last tokens" in why_not_croppable(cache, 10)
    with pytest.warns(SpeculativeFallbackWarning, match="type Odd"):
        generate(adapted(), tokens(1, LENGTH), speculative=2, **{CACHE: cache})


def test_recording_is_switched_back_when_a_call_fails():
    cache = DynamicCache(config=adapted("mistral").config)
    with pytest.raises(RuntimeError), recording(cache):
        assert all(layer.record_past for layer in cache.layers)
        raise RuntimeError
    assert not any(layer.record_past for layer in cache.layers)


def test_the_shadow_runs_once_for_every_token_it_is_given():
    """No token of a row passes the shadow twice, and the base looks at just the tokens that the shadow has seen."""
    model, ids = adapted(), tokens(1, LENGTH)
    plain = generate(model, ids)
    seen = {"shadow": 0, "base": 0}

    def counts(name):
        def hook(module, args, kwargs):
            given = kwargs.get("inputs_embeds")
            seen[name] += (given if given is not None else kwargs["input_ids"]).shape[1]

        return hook

    handles = [
        model.network().backbone.register_forward_pre_hook(counts("shadow"), with_kwargs=True),
        decoder_of(model.base).register_forward_pre_hook(counts("base"), with_kwargs=True),
    ]
    settings = SpeculativeConfig(num_draft_tokens=3, draft_processor=oracle(plain))
    generate(model, ids, speculative=settings)
    for handle in handles:
        handle.remove()
    # All drafts stand, so each token but the last, which nobody needs to see, passes each of the two once.
    assert seen == {"shadow": LENGTH + NEW - 1, "base": LENGTH + NEW - 1}


def test_windows_that_hand_out_all_they_recorded_are_not_drafted_in(monkeypatch):
    monkeypatch.setattr("shadowpeft.generate.rollback.CAN_DRAFT_IN_WINDOWS", False)
    model, ids = adapted("mistral"), tokens(2, LENGTH)
    plain = generate(model, ids)
    with pytest.warns(SpeculativeFallbackWarning, match=r"update transformers to 5\.18"):
        assert torch.equal(generate(model, ids, speculative=2), plain)
    assert torch.equal(generate(adapted("llama"), ids, speculative=2), generate(adapted("llama"), ids))

"""Everything around the loop: how it is called, what it returns, and what it refuses."""

import copy
import functools

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    WatermarkingConfig,
)
from transformers.generation import BaseStreamer

from models import attributes, changed_attributes, tiny_base, tiny_config, tokens
from shadowpeft import SpeculativeConfig, collect_statistics, get_shadow_model
from shadowpeft.errors import ConfigError
from shadowpeft.generate import SpeculativeFallbackWarning, SpeculativeOutput, api
from shadowpeft.model.cache import CACHE
from speculation import adapted, oracle

NEW, LENGTH = 10, 7


def greedy(model, ids=None, **options):
    return model.generate(ids, **{"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | options)


def rigged(sequences, wrong_every=3):
    return SpeculativeConfig(num_draft_tokens=4, draft_processor=oracle(sequences, wrong_every=wrong_every))


@pytest.fixture(scope="module")
def model():
    return adapted("qwen3", num_hidden_layers=2)


class Collects(BaseStreamer):
    def __init__(self):
        self.tokens, self.has_ended = [], False

    def put(self, value):
        self.tokens.append(value.clone())

    def end(self):
        self.has_ended = True


def test_a_streamer_gets_the_prompt_then_every_token_once(model):
    ids = tokens(1, LENGTH)
    streamer = Collects()
    plain = greedy(model, ids)
    greedy(model, ids, speculative=rigged(plain), streamer=streamer)
    assert torch.equal(torch.cat([part.reshape(1, -1) for part in streamer.tokens], 1), plain)
    assert streamer.has_ended
    assert [part.numel() for part in streamer.tokens[1:]] == [1] * NEW


class StopsAt(StoppingCriteria):
    """Stops each row at its own length."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.tensor([input_ids.shape[1] >= LENGTH + 3 + row for row in range(len(input_ids))])


def test_stopping_criteria_of_the_caller_end_rows_as_in_plain_decoding(model):
    ids = tokens(3, LENGTH)
    options = {"stopping_criteria": StoppingCriteriaList([StopsAt(), MaxTimeCriteria(1000.0)])}
    plain = greedy(model, ids, **options)
    assert plain.shape[1] < LENGTH + NEW
    assert torch.equal(greedy(model, ids, speculative=rigged(greedy(model, ids)), **options), plain)


def word_tokenizer():
    # transformers looks for stop strings by the way its own sample text comes out of the tokenizer.
    vocabulary = {"abcdef": 0, **{f"t{index}": index for index in range(1, 97)}}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="abcdef")))


@pytest.mark.parametrize("given", ["argument", "config", "second argument", "model's config", "both configs"])
def test_stop_strings_end_the_text(model, monkeypatch, given):
    ids = tokens(1, LENGTH)
    free = greedy(model, ids)
    stop = f"t{free[0, LENGTH + 4]}"
    options = {"max_new_tokens": NEW, "do_sample": False, "stop_strings": stop}
    if given == "both configs":
        monkeypatch.setattr(model.generation_config, "stop_strings", "t1")
    if given == "model's config":
        monkeypatch.setattr(model.generation_config, "stop_strings", options.pop("stop_strings"))
    positional, keywords = [ids], options
    if given == "second argument":
        positional, keywords = [ids, GenerationConfig(**options)], {}
    elif given in ("config", "both configs"):
        keywords = {"generation_config": GenerationConfig(**options)}
    plain = model.generate(*positional, tokenizer=word_tokenizer(), **keywords)
    assert torch.equal(plain, free[:, : plain.shape[1]]) and plain.shape[1] < free.shape[1]
    drafted = model.generate(*positional, tokenizer=word_tokenizer(), speculative=rigged(free), **keywords)
    assert torch.equal(drafted, plain)
    if given == "second argument":
        assert positional[1].stop_strings == stop


def test_arguments_by_position_are_those_of_generate(model):
    ids, streamer = tokens(3, LENGTH), Collects()
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False)
    positional = [ids, config, LogitsProcessorList(), StoppingCriteriaList([StopsAt()])]
    positional += [None, False, None, streamer, None, None, None]
    plain = greedy(model, ids, stopping_criteria=StoppingCriteriaList([StopsAt()]), min_new_tokens=None)
    assert torch.equal(model.generate(*positional, speculative=3), plain)
    assert streamer.has_ended and len(streamer.tokens) == 1 + plain.shape[1] - LENGTH


def test_input_embeddings_give_the_tokens_that_their_ids_give(model):
    ids = tokens(2, LENGTH)
    plain = greedy(model, ids)
    drafted = greedy(model, inputs_embeds=model.get_input_embeddings()(ids), speculative=rigged(plain[:, LENGTH:]))
    assert torch.equal(drafted, plain[:, LENGTH:])


def test_generation_continues_from_a_returned_cache(model):
    ids = tokens(2, LENGTH)
    free = greedy(model, ids)
    first = greedy(model, ids, speculative=rigged(free), return_dict_in_generate=True)
    more = torch.cat([first.sequences, tokens(2, 3, seed=9)], 1)
    expected = greedy(model, more)
    for ids_given in (more, more[:, LENGTH + NEW - 1 :]):
        cache = copy.deepcopy(first.past_key_values)
        options = {CACHE: cache, "attention_mask": torch.ones_like(more)}
        rig = rigged(expected[:, more.shape[1] - ids_given.shape[1] :])
        continued = greedy(model, ids_given, speculative=rig, **options)
        assert torch.equal(continued[:, -NEW:], expected[:, -NEW:])


def test_several_sequences_for_one_prompt_are_rows(model):
    ids = tokens(2, LENGTH)
    plain = greedy(model, ids)
    assert torch.equal(greedy(model, ids, num_return_sequences=1, speculative=2), plain)
    torch.manual_seed(0)
    assert model.generate(ids, do_sample=True, num_return_sequences=3, max_new_tokens=5, speculative=2).shape == (6, 12)


def test_scores_and_logits_are_those_of_plain_decoding(model):
    ids = tokens(2, LENGTH)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.2}
    plain = greedy(model, ids, **options)
    drafted = greedy(model, ids, speculative=rigged(plain.sequences), **options)
    assert isinstance(drafted, SpeculativeOutput)
    for name in ("scores", "logits"):
        torch.testing.assert_close(torch.stack(drafted[name]), torch.stack(plain[name]))


@pytest.mark.parametrize("processors", [{}, {"repetition_penalty": 1.2}])
def test_scores_and_logits_keep_nothing_of_their_round_in_memory(processors):
    model, ids = adapted(num_hidden_layers=2).float(), tokens(2, LENGTH)
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True} | processors
    out = greedy(model, ids, speculative=3, **options)
    assert out.statistics.num_drafted > 0
    kept = [*out.scores, *out.logits]
    assert all(tensor.untyped_storage().nbytes() == tensor.nelement() * 4 for tensor in kept)


def test_statistics_are_returned_and_can_be_collected_from_outside(model):
    ids = tokens(2, LENGTH)
    plain = greedy(model, ids)
    with collect_statistics() as collected:
        out = greedy(model, ids, speculative=rigged(plain), return_dict_in_generate=True)
        greedy(model, ids, speculative=rigged(plain))
    greedy(model, ids, speculative=2)
    assert len(collected) == 2
    assert collected[0] is out.statistics
    statistics = out.statistics
    assert statistics.num_generated == 2 * NEW
    assert 0 < statistics.num_accepted < statistics.num_drafted
    assert 0 < statistics.drafting_share < 1
    assert statistics.mean_accepted_length == statistics.num_generated / statistics.num_row_rounds


def test_the_adapter_can_be_chosen_for_one_call():
    model, ids = adapted(num_hidden_layers=2), tokens(1, LENGTH)
    model.add_adapter("other", model.shadow_config)
    plain = greedy(model, ids, adapter="other")
    assert torch.equal(greedy(model, ids, adapter="other", speculative=rigged(plain)), plain)
    with model.using_adapter("other"):
        assert torch.equal(greedy(model, ids, speculative=3), plain)


def test_a_call_leaves_nothing_on_the_model(model):
    before = attributes(model)
    greedy(model, tokens(1, LENGTH), speculative=3)
    assert changed_attributes(before, attributes(model)) == []


def test_the_detached_shadow_serves_as_an_assistant_model(model):
    ids = tokens(1, LENGTH)
    assert torch.equal(greedy(model, ids, assistant_model=model.detach()), greedy(model, ids))


@pytest.mark.parametrize("value", [-1, True, 2.5, "often"])
def test_a_bad_number_of_drafts_is_refused(model, value):
    with pytest.raises(ConfigError, match="is not valid: expected the number of draft tokens"):
        greedy(model, tokens(1, LENGTH), speculative=value)


@pytest.mark.parametrize(
    "settings",
    [{"num_draft_tokens": -2}, {"confidence_threshold": 1.0}, {"draft_vocabulary": []}],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SpeculativeConfig(**settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 3}, "num_beams=3; use num_beams=1"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams=2; use num_beams=1"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 2}, "two ways of decoding"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=2)}, "prompt_lookup_num_tokens= are two ways"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha= are two ways of decoding"),
        ({"generation_config": GenerationConfig(penalty_alpha=0.6)}, "penalty_alpha= are two ways of decoding"),
        ({"dola_layers": "high"}, "dola_layers= are two ways of decoding"),
        ({"use_mtp": True}, "use_mtp= are two ways of decoding"),
        ({"synced_gpus": True}, "synced_gpus=True keeps processes in step"),
        ({"token_healing": True}, "token_healing=True"),
        ({"generation_config": GenerationConfig(token_healing=True)}, "token_healing=True"),
        ({"adapter": "__base__"}, "uses the base alone"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "not recorded"),
        ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidanceLogitsProcessor counts on being called once a token"),
        (
            {"watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5], ngram_len=3), "do_sample": True},
            "SynthIDTextWatermarkLogitsProcessor counts on being called once a token",
        ),
    ],
)
def test_what_does_not_go_with_drafting_is_refused(model, options, message):
    with pytest.raises(ConfigError, match=message):
        greedy(model, tokens(1, LENGTH), speculative=2, **options)


def test_guidance_among_the_callers_own_processors_is_refused(model):
    processors = LogitsProcessorList([UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, model)])
    with pytest.raises(ConfigError, match="counts on being called once a token"):
        greedy(model, tokens(1, LENGTH), speculative=2, logits_processor=processors)


def test_a_watermark_that_depends_on_the_prefix_alone_is_that_of_plain_decoding(model):
    ids = tokens(2, LENGTH)
    options = {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")}
    plain = greedy(model, ids, **options)
    assert not torch.equal(plain, greedy(model, ids))
    assert torch.equal(greedy(model, ids, speculative=rigged(plain), **options), plain)


def test_draft_tokens_outside_the_vocabulary_are_refused(model):
    with pytest.raises(ConfigError, match="from 3 to 97; the base's are 0 to 96"):
        greedy(model, tokens(1, LENGTH), speculative=SpeculativeConfig(draft_vocabulary=[3, 97]))


def test_a_shadow_of_another_vocabulary_is_refused(tmp_path):
    tiny_base(num_hidden_layers=2).save_pretrained(tmp_path)
    base = tiny_base(num_hidden_layers=2)
    model = get_shadow_model(base, tiny_config(shadow_model=str(tmp_path)))
    base.resize_token_embeddings(101, mean_resizing=False)
    with pytest.raises(ConfigError, match="the shadow knows 97 tokens and the base's head 101"):
        greedy(model, tokens(1, LENGTH), speculative=2)


@pytest.mark.parametrize("length", [1, 2])
def test_compiled_passes_find_a_cache_whose_memory_is_static(without_shape_checks, model, length):
    """Memory that a graph itself allocates would be given away again by the next graph."""
    ids, cache = tokens(2, length), StaticCache(config=model.config, max_cache_len=20)
    plain = greedy(model, ids)
    settings = SpeculativeConfig(num_draft_tokens=1, compile_options={"backend": "eager"})
    assert torch.equal(greedy(model, ids, speculative=settings, **{CACHE: cache}), plain)
    assert all(hasattr(layer.keys, "_dynamo_static_input_type") for layer in cache.layers)


def test_flash_attention_over_a_static_cache_falls_back_with_a_warning(model, monkeypatch):
    """Nothing runs on flash attention here: its name alone decides."""
    ids, cache = tokens(1, LENGTH), StaticCache(config=model.config, max_cache_len=20)
    plain = greedy(model, ids)
    monkeypatch.setattr(api, "_uses_flash_attention", lambda model: True)
    with pytest.warns(SpeculativeFallbackWarning, match="flash attention"):
        assert torch.equal(greedy(model, ids, speculative=2, **{CACHE: cache}), plain)


def test_both_passes_compile_as_whole_graphs_over_a_static_cache(without_shape_checks, model):
    ids = torch.nn.functional.pad(tokens(2, LENGTH), (2, 0))
    length = {"max_new_tokens": 5, "min_new_tokens": 5}
    options = {"attention_mask": (ids != 0).long(), "cache_implementation": "static", **length}
    plain = greedy(model, ids, **options)
    settings = SpeculativeConfig(num_draft_tokens=1, compile_options={"backend": "eager"})
    for _ in range(2):
        assert torch.equal(greedy(model, ids, speculative=settings, **options), plain)


# ---------------------------------------------------------------- a second device

# This machine has none with numbers on it, so what lies there is played by tensors that say so and take no other beside them.


class Far(torch.Tensor):
    """A tensor on another device, as far as one can tell."""

    @staticmethod
    def __new__(cls, near):
        return torch.Tensor._make_wrapper_subclass(cls, near.shape, dtype=near.dtype, device="meta")

    def __init__(self, near):
        self.near = near

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs, leaves = kwargs or {}, tree_leaves((args, kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and not isinstance(leaf, Far) and leaf.dim() for leaf in leaves):
            raise RuntimeError(f"{function} found tensors on two devices")
        target = kwargs.pop("device", "far")
        found = function(*tree_map_only(Far, lambda far: far.near, args), **kwargs)
        return found if torch.device("cpu") == target else tree_map_only(torch.Tensor, Far, found)


def test_the_second_device_is_one_that_does_not_mix():
    with pytest.raises(RuntimeError, match="two devices"):
        Far(torch.ones(2)) + torch.ones(2)
    assert torch.equal((Far(torch.ones(2)) * 2).to("cpu"), torch.full((2,), 2.0))


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"repetition_penalty": 1.2}, {"prefill_chunk_size": 3}])
@pytest.mark.parametrize("draft_vocabulary", [None, range(0, 97, 2)])
def test_a_head_on_another_device_than_the_embeddings_writes_the_same(monkeypatch, options, draft_vocabulary):
    model, ids = adapted("qwen3", num_hidden_layers=2), tokens(2, LENGTH)
    settings = SpeculativeConfig(num_draft_tokens=3, draft_vocabulary=draft_vocabulary)
    drawn = []
    for is_far in (False, True):
        if is_far:  # as an AlignDevicesHook has it: the head takes its input there and leaves its output there
            monkeypatch.setattr(model.base.lm_head, "forward", lambda hidden, run=model.base.lm_head.forward: Far(run(hidden)))
        for speculative in (None, settings):
            torch.manual_seed(0)
            drawn.append(greedy(model, ids, speculative=speculative, **options))
    assert torch.equal(drawn[2], drawn[0]) and torch.equal(drawn[3], drawn[1])


def test_inputs_go_to_where_the_embeddings_are_and_results_to_where_the_inputs_were(model, monkeypatch):
    monkeypatch.setattr(api, "device_of", lambda module, otherwise: torch.device("meta"))
    seen, ids = {}, tokens(1, LENGTH)

    @functools.wraps(api.GenerationMixin.generate)
    def generate(model, **options):
        seen.update(options)
        return Far(options["inputs"].new_zeros(1, 2, device="cpu"))

    monkeypatch.setattr(api.GenerationMixin, "generate", generate)
    out = greedy(model, ids, speculative=2, attention_mask=torch.ones_like(ids), position_ids=torch.arange(LENGTH)[None])
    assert {seen[name].device.type for name in ("inputs", "attention_mask", "position_ids")} == {"meta"}
    assert out.device.type == "cpu"

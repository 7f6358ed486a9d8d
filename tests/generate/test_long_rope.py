"""Past some length all positions are turned otherwise: by Phi-3's long rope once, by dynamic rope with every pass."""

import asyncio

import pytest
import torch
from transformers import LlamaConfig

from deploy.tiny import byte_tokenizer
from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import get_shadow_model
from shadowpeft.deploy.route import calibrate
from shadowpeft.deploy.serve.batch import most_tokens
from shadowpeft.deploy.serve.catalogue import catalogue
from shadowpeft.deploy.serve.mixed import Path
from shadowpeft.deploy.serve.service import LocalService, Settings
from shadowpeft.generate import SpeculativeFallbackWarning
from shadowpeft.model.positions import dynamic_rope_border
from shadowpeft.train.data import load_rows
from shadowpeft.train.tasks import TASKS

BORDER = 12
ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 27.0],
    "original_max_position_embeddings": BORDER,
}  # fmt: skip
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def long_base():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}  # so heads are 8 wide, as ROPE is for
    return tiny_base("phi3", max_position_embeddings=64, original_max_position_embeddings=BORDER, rope_parameters=ROPE, **sizes)


@pytest.fixture(scope="module")
def model():
    """A fresh adapter, which changes nothing: what it writes is what the base writes."""
    return get_shadow_model(long_base(), tiny_config(adapter_dtype="float64")).eval()


def logits_of(model, ids, **options) -> torch.Tensor:
    found = model.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY, **options)
    return torch.stack(found.logits, 1)


def test_logits_across_the_border_are_the_base_s(model):
    ids = tokens(1, BORDER - 4)
    ours, theirs = (logits_of(each, ids, max_new_tokens=10) for each in (model, long_base()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)  # the same operations in float64, some in another order


def test_drafts_that_could_cross_the_border_are_not_made(model):
    ids = tokens(1, BORDER - 4)
    plain = model.generate(ids, max_new_tokens=10, **GREEDY)
    with pytest.warns(SpeculativeFallbackWarning, match=f"may pass {BORDER} tokens, where this base's positions change"):
        assert torch.equal(model.generate(ids, max_new_tokens=10, speculative=3, **GREEDY), plain)


@pytest.mark.parametrize(("length", "new"), [(4, BORDER - 4), (BORDER + 1, 10)])
def test_drafts_on_one_side_of_the_border_are(model, length, new):
    ids = tokens(1, length)
    plain = model.generate(ids, max_new_tokens=new, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=new, speculative=3, **GREEDY), plain)  # warnings are errors


def test_a_server_takes_no_text_past_the_border_and_says_so(model):
    def context(**settings):
        service = LocalService(model, byte_tokenizer(), catalogue(model.networks), Settings(**settings))
        asyncio.run(service.close())
        return service.context

    with pytest.warns(UserWarning, match=f"may have {BORDER} tokens together instead of 64: longer texts turn the positions"):
        assert context() == BORDER
    assert context(max_context=BORDER) == BORDER and context(max_context=5) == 5  # without a warning, which would be an error
    assert most_tokens(get_shadow_model(tiny_base("llama", max_position_embeddings=64), tiny_config())) == 64


def test_a_router_is_calibrated_on_texts_before_the_border(model, monkeypatch):
    asked = []
    monkeypatch.setattr(calibrate, "answer_all", lambda *args, max_tokens, **options: asked.append((args[2], max_tokens)))
    rows = load_rows(TASKS["robot"], "validation", limit=3)
    calibrate.answers(model, byte_tokenizer(), TASKS["robot"], rows, Path(adapter=None, uses_base=True))
    [(prompts, max_tokens)] = asked
    assert max(map(len, prompts)) + max_tokens == BORDER


def dynamic_model():
    """A new one: transformers keeps the frequencies of a long text in the model until a short one comes."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model = get_shadow_model(tiny_base(max_position_embeddings=BORDER, rope_parameters=rope), tiny_config())
    randomise(model.network())
    return model.eval()


@pytest.mark.parametrize(("length", "new"), [(4, BORDER - 3), (4, BORDER + 10), (BORDER + 1, 20)])
def test_drafts_that_could_reach_the_border_of_a_dynamic_rope_are_not_made(length, new):
    ids = tokens(1, length)
    plain = dynamic_model().generate(ids, max_new_tokens=new, **GREEDY)
    with pytest.warns(SpeculativeFallbackWarning, match=f"may reach {BORDER} tokens, from where dynamic rope turns"):
        assert torch.equal(dynamic_model().generate(ids, max_new_tokens=new, speculative=3, **GREEDY), plain)


def test_drafts_below_the_border_of_a_dynamic_rope_are():
    model, ids, new = dynamic_model(), tokens(1, 4), BORDER - 4
    plain = model.generate(ids, max_new_tokens=new, **GREEDY)
    model(tokens(1, 3 * BORDER))  # whose frequencies the model keeps
    assert torch.equal(model.generate(ids, max_new_tokens=new, speculative=3, **GREEDY), plain)  # warnings are errors


@pytest.mark.parametrize("kinds", [{"full_attention": {"rope_type": "dynamic"}}, {"rope_type": "dynamic"}])
def test_a_dynamic_rope_is_found_for_all_layers_or_one_type_of_them(kinds):
    config = LlamaConfig(max_position_embeddings=BORDER)
    assert dynamic_rope_border(config) is None
    config.rope_parameters = kinds
    assert dynamic_rope_border(config) == BORDER

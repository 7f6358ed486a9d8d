"""transformers' pipelines around a shadow model."""

import pytest
import torch
from transformers import pipeline

from models import randomise, tiny_base, tiny_config
from shadowpeft import get_shadow_model
from workbench import byte_tokenizer

PROMPTS = ["the lamp is", "the hat", "a"]


def adapted(**base):
    model = get_shadow_model(
        tiny_base(dtype=torch.float32, vocab_size=320, **base),
        tiny_config(adapter_dtype="float32", task_type="SEQ_CLS" if "labels" in base else "CAUSAL_LM"),
    )
    randomise(model.network())
    return model


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_text_generation_pipeline_writes_what_generate_writes(batch_size):
    model, tokenizer = adapted(), byte_tokenizer()
    tokenizer.padding_side = "left"
    written = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")(
        PROMPTS, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_full_text=False, batch_size=batch_size
    )
    for prompt, found in zip(PROMPTS, written, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        expected = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert found[0]["generated_text"] == tokenizer.decode(expected, skip_special_tokens=True)
        untouched = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, adapter="__base__")
        assert not torch.equal(untouched[0, ids.shape[1] :], expected), "the shadow changes what is written"


def test_a_text_generation_pipeline_lets_the_shadow_draft():
    ask = pipeline("text-generation", model=adapted(), tokenizer=byte_tokenizer(), device="cpu")
    options = {"max_new_tokens": 8, "do_sample": False}
    assert ask("the lamp", speculative=2, **options) == ask("the lamp", **options)


def test_a_text_classification_pipeline_scores_as_the_model_does():
    model, tokenizer = adapted(labels=3), byte_tokenizer()
    model.config.id2label = {0: "red", 1: "green", 2: "blue"}
    found = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")(PROMPTS, top_k=None, batch_size=3)
    for prompt, scores in zip(PROMPTS, found, strict=True):
        expected = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits.softmax(-1)[0].tolist()
        by_name = {entry["label"]: entry["score"] for entry in scores}
        assert [by_name[name] for name in ("red", "green", "blue")] == pytest.approx(expected, rel=1e-4)

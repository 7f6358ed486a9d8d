"""The verbs of the command line, from an adapter on disk to files of other programs."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import get_shadow_model
from shadowpeft.cli import app
from shadowpeft.errors import ConfigError, ShadowPeftError


@pytest.fixture
def adapter(tmp_path):
    """An adapter that names its base, a folder with a tokenizer."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tiny_base(dtype=torch.float32).save_pretrained(tmp_path / "base")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w0")
    fast.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_shadow_model(base, tiny_config(adapter_dtype="float32"))
    randomise(model.network())
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path, model.eval()(tokens(), output_shadow_logits=True).shadow_logits


def run(*arguments) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output.replace("\n", " ")


def test_detach_writes_model_tokenizer_and_says_how_large(adapter):
    place, expected = adapter
    said = run("detach", place / "adapter", place / "out", "--dtype", "float32")
    assert "LlamaForCausalLM" in said and "parameters" in said
    assert torch.allclose(AutoModelForCausalLM.from_pretrained(place / "out")(tokens()).logits, expected, atol=1e-5)
    assert AutoTokenizer.from_pretrained(place / "out")("w5 w7")["input_ids"] == [5, 7]


def test_export_takes_an_adapter_or_what_was_detached(adapter):
    pytest.importorskip("gguf", reason="gguf is not installed")
    place, _ = adapter
    run("detach", place / "adapter", place / "detached")
    for index, source in enumerate(("adapter", "detached")):
        said = run("export", place / source, place / f"out{index}", "--format", "gguf")
        assert "no byte-level BPE" in said
    sizes = [(place / f"out{index}/model.gguf").stat().st_size for index in range(2)]
    assert abs(sizes[0] - sizes[1]) < 64  # but for general.name


def test_convert_goes_to_another_format_or_names_what_that_cannot_express(adapter):
    place, _ = adapter
    run("convert", place / "adapter", place / "theirs", "--to", "authors")
    assert json.loads((place / "theirs/shadow_config.json").read_text())["injection_hidden_size"] == 4
    with pytest.raises(ConfigError, match="has no counterpart in peft's format"):
        run("convert", place / "adapter", place / "other", "--to", "peft")


def test_pretrain_without_steps_writes_a_shadow_that_attaches(adapter):
    place, _ = adapter
    place_of = ("--base", place / "base", "--output", place / "run")
    run("pretrain", *place_of, "--data", "", "--shadow", "base:first:1", "--steps", 0)
    run("pretrain", *place_of[2:], "--resume")  # what is not said anew is as it was
    shadow = str(place / "run/shadow")
    assert get_shadow_model(tiny_base(), tiny_config(shadow_model=shadow)).network().num_parameters() > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ("detach", "adapter", "out", "--dtype", "int3"),
        ("export", "adapter", "out", "--format", "mlx"),
        ("convert", "adapter", "out", "--to", "lora"),
        ("detach", "nowhere/at/all", "out"),
    ],
)
def test_bad_input_is_one_error_of_ours(adapter, arguments):
    place, _ = adapter
    verb, source, out, *options = arguments
    with pytest.raises(ShadowPeftError):
        run(verb, place / source, place / out, *options)
    assert not (place / out).exists()

"""Bad input at the command line: one line on stderr, exit code 2, no traceback, and nothing written."""

import shutil

import pytest
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from models import tiny_config
from shadowpeft import cli, get_shadow_model
from workbench import byte_tokenizer, write_base, write_classification, write_intents, write_rows


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    write_base(folder / "base")
    write_base(folder / "three", num_hidden_layers=3)
    write_base(folder / "one", num_hidden_layers=1)
    write_base(folder / "wide", hidden_size=64, head_dim=16)
    write_base(folder / "qwen", "qwen3")
    write_base(folder / "other")
    other = AutoModelForCausalLM.from_pretrained(folder / "other")
    for parameter in other.model.layers.parameters():
        parameter.data.mul_(-1.5)
    other.save_pretrained(folder / "other")
    bert = BertConfig(vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    BertForMaskedLM(bert).save_pretrained(folder / "bert")
    byte_tokenizer().save_pretrained(folder / "bert")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    get_shadow_model(base, tiny_config(adapter_dtype="float32")).save_pretrained(folder / "adapter")
    write_intents(folder / "intents")
    write_classification(folder / "colours")
    write_rows(folder / "no_rows" / "train.jsonl", [])
    write_rows(folder / "no_intent" / "train.jsonl", [{"text": "a", "intent": "b"}, {"text": "c"}])
    write_classification(folder / "new_label")
    write_rows(folder / "new_label" / "test.jsonl", [{"text": "the pen is pink", "label": "pink"}])
    (folder / "unknown_key.yaml").write_text("batchsize: 3\n")
    (folder / "unknown_shadow_key.yaml").write_text("shadow:\n  shadow_alfa: 3\n")
    (folder / "wrong_type.yaml").write_text("batch_size: many\n")
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "not_yaml.yaml").write_text("a: [1\nb: 2")
    (folder / "shadow_list.yaml").write_text("shadow: [1]\n")
    return folder


def refused(arguments, monkeypatch, capsys):
    """The one line on stderr."""
    monkeypatch.setattr("sys.argv", ["shadowpeft", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main()
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.strip()]
    assert stop.value.code == 2
    assert "Traceback" not in err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "unknown_key.yaml"], "unknown key 'batchsize' in training config; did you mean 'batch_size'?"),
        (["--config", "unknown_shadow_key.yaml"], "unknown key 'shadow_alfa' in shadow config; did you mean"),
        (["--config", "wrong_type.yaml"], "batch_size='many' is not valid: expected of type int"),
        (["--config", "list.yaml"], "must hold `key: value` lines, not a list"),
        (["--config", "not_yaml.yaml"], "is not valid YAML"),
        (["--config", "shadow_list.yaml"], "shadow must hold `key: value` lines, not a list"),
        (["--config", "absent.yaml"], "no config file at"),
        (["--preset", "lora"], "unknown preset 'lora'; choose one of paper, recommended, attached, sublayers, authors, peft"),
        (["--r", "0"], "r=0 is not valid: expected an integer of at least 1"),
        (["--schedule", "round"], "schedule='round' is not valid: expected one of cosine"),
        (["--dtype", "int3"], "dtype='int3' is not valid: expected one of auto"),
        (["--limit-eval", "0"], "limit_eval=0 is not valid"),
        (["--task", "nonsense"], "unknown task 'nonsense'; choose one of 20news"),
        (["--base", "bert"], "'bert'"),
        (["--base", "one"], "the base has 1 block; a shadow steps between two blocks, so at least 2 are needed"),
        (["--data", "absent"], "there is no data at"),
        (["--data", "no_rows"], "holds no rows"),
        (["--data", "no_intent"], "row 2: the field 'intent' is missing"),
        (["--data", "new_label", "--task", "classification"], "row 1: the label 'pink' is not among those"),
        (["--report-to", "trackio,nonsense"], "is unknown or not installed; choose none, all or some of those installed"),
        (["--max-length", "1"], "max_length=1 is not valid: expected at least 2"),
        (["--shadow-num-attention-heads", "3"], "the shadow has 3 query heads but 2 key/value heads"),
        (["--shadow-head-dim", "7"], "the shadow's heads are 7 wide and 7 entries of them are rotated"),
        (["--first-block", "2"], "first_block=2 is past the last of the base's 2 blocks"),
        (["--resume"], "nothing to resume in"),
    ],
)
def test_training_refuses_before_anything_is_written(bench, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(bench)
    usual = {"--base": "base", "--task": "intent", "--data": "intents", "--output": "run", "--max-steps": "1"}
    flags = [part for name, value in usual.items() if name not in arguments for part in (name, value)]
    before = sorted(bench.rglob("*"))
    assert message in refused(["train", *arguments, *flags], monkeypatch, capsys)
    assert sorted(bench.rglob("*")) == before


def test_an_output_folder_with_something_in_it_is_left_alone(bench, monkeypatch, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    arguments = ["train", "--base", bench / "base", "--task", "intent", "--data", bench / "intents"]
    assert "is not empty; choose another" in refused([*arguments, "--output", tmp_path], monkeypatch, capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    file = tmp_path / "notes.txt"
    assert "is a file; choose another" in refused([*arguments, "--output", file], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("three", "num_blocks=2"),
        ("wide", "hidden_size=32"),
        ("qwen", "model_type='llama'"),
        ("other", "other weights than the one"),
    ],
)
def test_an_adapter_of_another_base_is_refused(bench, monkeypatch, capsys, base, message):
    arguments = ["generate", bench / "adapter", "hello", "--base", bench / base, "--max-new-tokens", 1]
    assert message in refused(arguments, monkeypatch, capsys)


def test_other_weights_can_be_allowed_at_the_command_line(bench, monkeypatch, capsys):
    arguments = ["generate", bench / "adapter", "hello", "--base", bench / "other", "--max-new-tokens", 1]
    monkeypatch.setattr("sys.argv", ["shadowpeft", *map(str, arguments), "--allow-other-weights"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code


@pytest.mark.parametrize(
    ("verb", "options", "message"),
    [
        ("generate", ["hello", "--mode", "sideways"], "mode='sideways' is not valid: expected one of base"),
        ("generate", ["hello", "--temperature", "-1"], "temperature=-1.0 is not valid"),
        ("generate", ["hello", "--top-p", "0"], "top_p=0.0 is not valid"),
        ("generate", ["hello", "--max-new-tokens", "0"], "max_new_tokens=0 is not valid"),
        ("generate", ["hello", "--task", "mmlu"], "asks with more than one text"),
        ("generate", ["hello", "--task", "squad_v2"], "asks with more than one text"),
        ("generate", ["", "--max-new-tokens", "1"], "prompt 1 is empty"),
        ("eval", ["--task", "intent", "--data", "intents", "--modes", "sideways"], "unknown mode 'sideways'"),
        ("eval", ["--task", "intent", "--data", "intents", "--batch-size", "0"], "batch_size=0 is not valid"),
        ("calibrate", ["--task", "intent", "--data", "intents", "--output", "new", "--batch-size", "-1"], "batch_size=-1"),
        ("eval", ["--task", "classification", "--data", "colours"], "belongs to a language model, which cannot answer"),
        ("eval", ["--task", "intent", "--data", "absent"], "there is no data at"),
    ],
)
def test_wrong_options_of_the_other_verbs_are_refused(bench, monkeypatch, capsys, verb, options, message):
    monkeypatch.chdir(bench)
    assert message in refused([verb, "adapter", *options], monkeypatch, capsys)


@pytest.mark.parametrize("verb", ["info", "eval", "generate"])
def test_a_folder_that_is_no_adapter_is_named(bench, monkeypatch, capsys, verb):
    monkeypatch.chdir(bench)
    more = {"info": [], "eval": ["--task", "intent", "--data", "intents"], "generate": ["hello"]}[verb]
    assert "holds no shadow_config.json" in refused([verb, "base", *more], monkeypatch, capsys)


def test_a_cut_weights_file_is_named(bench, monkeypatch, capsys, tmp_path):
    shutil.copytree(bench / "adapter", tmp_path / "cut")
    weights = tmp_path / "cut" / "shadow_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "is damaged or cut short" in refused(["generate", tmp_path / "cut", "hello"], monkeypatch, capsys)

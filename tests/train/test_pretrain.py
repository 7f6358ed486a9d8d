"""Pretraining: each objective trains what it says and nothing else, and the result attaches and runs alone."""

import gzip
import json
import random
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from models import tiny_base, tiny_config, tokens
from shadowpeft import get_shadow_model
from shadowpeft.errors import ArchitectureError, ConfigError, DataError
from shadowpeft.model.build import build_network
from shadowpeft.model.pretrained import read_projection
from shadowpeft.train.pretrain import prepare, run
from shadowpeft.train.pretrain_config import PretrainConfig
from shadowpeft.train.projected_shadow import ProjectedShadow, teacher_loss
from shadowpeft.train.text import PackedText, mixed, stream_texts

WORDS = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(94))]
NARROW = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


def word_tokenizer(words=WORDS) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def place(tmp_path):
    """A folder with a base, a narrower model of another family with the same tokenizer, and some text."""
    for name, model in (("base", tiny_base(dtype=torch.float32)),
                        ("small", tiny_base("qwen3", dtype=torch.float32, **NARROW))):  # fmt: skip
        model.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    chooser = random.Random(0)
    texts = [" ".join(f"w{(start + i) % 94}" for i in range(20)) for start in chooser.choices(range(94), k=40)]
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("\n\n".join(texts[:20]))
    with gzip.open(tmp_path / "text/b.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in texts[20:])
    return tmp_path


def config(place, **fields) -> PretrainConfig:
    defaults = dict(
        base=str(place / "base"), shadow=str(place / "small"), data=str(place / "text"), output=str(place / "run"),
        steps=3, batch_size=2, length=16, learning_rate=1e-2, log_every=1, save_every=2, warmup=0.0,
    )  # fmt: skip
    return PretrainConfig(**{**defaults, **fields})


def trained_parts(place, settings: PretrainConfig) -> set[str]:
    before = AutoModelForCausalLM.from_pretrained(place / "small").base_model.state_dict()
    done = run(settings)
    after = AutoModelForCausalLM.from_pretrained(done.shadow).base_model.state_dict()
    return {"embeddings" if "embed" in n else "backbone" for n in before if not torch.equal(before[n], after[n])}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"objective": "projection"}, set()),
        ({"objective": "causal_lm"}, {"backbone"}),
        ({"objective": "distill"}, {"backbone"}),
        ({"objective": "causal_lm", "train_embeddings": True}, {"backbone", "embeddings"}),
    ],
)
def test_each_objective_trains_what_it_says_and_the_result_attaches(place, fields, expected):
    assert trained_parts(place, config(place, **fields)) == expected
    folder = place / "run/shadow"
    plain = AutoModelForCausalLM.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    model = get_shadow_model(base, tiny_config(shadow_model=str(folder), adapter_dtype="float32")).eval()
    with torch.no_grad():
        shadow = model(tokens(), output_shadow_logits=True).shadow_logits
        assert_close(plain(tokens()).logits, shadow, rtol=1e-4, atol=1e-5)
    initial = run(config(place, steps=0, output=str(place / "zero"))).shadow
    assert not torch.equal(model.network().projection.weight, read_projection(str(initial)))


def base_again(place):
    return AutoModelForCausalLM.from_pretrained(place / "base")


def test_no_steps_write_the_projection_of_eq_12_and_its_true_residual(place):
    record = run(config(place, steps=0, data="")).record
    base, small = (AutoModelForCausalLM.from_pretrained(place / n).double() for n in ("base", "small"))
    expected = torch.linalg.pinv(base.lm_head.weight) @ small.lm_head.weight
    residual = (base.lm_head.weight @ expected - small.lm_head.weight).norm() / small.lm_head.weight.norm()
    assert record["initial_relative_residual"] == pytest.approx(residual.item(), rel=1e-6)
    model = get_shadow_model(base_again(place), tiny_config(shadow_model=str(place / "run/shadow")))
    assert_close(model.network().projection.weight, expected, rtol=1e-5, atol=1e-6)


def test_a_stopped_run_goes_on_to_the_same_weights(place):
    whole = run(config(place, steps=4))
    first = run(config(place, steps=4, output=str(place / "again")))
    assert not first.interrupted
    # As if it had been stopped behind step 2.
    shutil.rmtree(place / "again/shadow")
    shutil.rmtree(place / "again/checkpoints/checkpoint-4")
    second = run(config(place, steps=4, output=str(place / "again"), resume=True))
    one, two = (AutoModelForCausalLM.from_pretrained(done.shadow).state_dict() for done in (whole, second))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_blocks_of_the_base_and_fresh_ones_are_pretrained_behind_its_own_embeddings(place):
    narrow = {"shadow_hidden_size": 16, "shadow_num_attention_heads": 2, "shadow_num_key_value_heads": 1}
    for index, fields in enumerate(({"shadow": "base:last:2"}, {"shadow": "implicit", **narrow})):
        done = run(config(place, objective="distill", output=str(place / f"run{index}"), **fields))
        plain = AutoModelForCausalLM.from_pretrained(done.shadow)
        if fields["shadow"] == "implicit":
            assert (plain.config.num_attention_heads, plain.config.num_key_value_heads) == (2, 1)
        model = get_shadow_model(base_again(place), tiny_config(shadow_model=str(done.shadow), adapter_dtype="float32"))
        with torch.no_grad():
            shadow = model.eval()(tokens(), output_shadow_logits=True).shadow_logits
        assert_close(plain(tokens()).logits, shadow, rtol=1e-4, atol=1e-5)


def test_distilling_a_copy_of_the_base_from_the_base_has_nothing_to_learn(place):
    settings = config(place, shadow="base:first:4", objective="distill")
    base, network, _, _ = prepare(settings)
    assert ProjectedShadow(base, network, settings, None)(tokens(), tokens()).loss.item() < 1e-6


@pytest.mark.parametrize("base", [{}, {"model_type": "gemma2"}, {"dtype": torch.bfloat16}])
def test_the_loss_on_text_is_the_cross_entropy_and_keeps_no_logits(base):
    base = tiny_base(**{"dtype": torch.float32, **base}, vocab_size=4001)
    shadow = tiny_config(shadow_hidden_size=16, shadow_num_attention_heads=2, adapter_dtype="float32")
    model, ids = ProjectedShadow(base, build_network(base, shadow), PretrainConfig(), None), tokens(2, 16)
    labels, kept, weight = ids.masked_fill(ids % 5 == 0, -100), [], model.projection.weight

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(ids, labels).loss
    (grad,) = torch.autograd.grad(loss, weight)
    assert max(kept) < 2 * 15 * 4001  # one row of logits for each position that has a next token
    plain = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    (expected,) = torch.autograd.grad(plain, weight)
    # Both take the sums in fp32, in another order; of a bf16 head each gradient is rounded to 8 bits on its way.
    is_bf16 = base.dtype == torch.bfloat16
    assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    assert_close(grad, expected, **({"rtol": 0.02, "atol": 1e-3} if is_bf16 else {"rtol": 1e-4, "atol": 1e-6}))


def test_several_processes_are_refused_before_anything_is_written(place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process, and 2 were launched"):
        run(config(place))
    assert not (place / "run").exists()


def test_the_loss_of_a_teacher_is_its_formula():
    settings = PretrainConfig(objective="distill", kl_weight=2.0, mse_weight=0.5, temperature=3.0)
    student, teacher = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    p, q = (teacher / 3).softmax(-1), (student / 3).softmax(-1)
    expected = 2.0 * 9 * (p * (p / q).log()).sum(-1).mean() + 0.5 * (student - teacher).square().mean()
    assert_close(teacher_loss(teacher, student, settings), expected)


# ---------------------------------------------------------------- text


def test_text_is_packed_into_full_rows_without_losing_a_token(place):
    dataset = PackedText(str(place / "text"), word_tokenizer(), length=16, buffer=0)
    rows = [row["input_ids"] for row, _ in zip(dataset, range(2 * 40 * 21 // 16), strict=False)]
    assert all(len(row) == 16 for row in rows)
    joined = " ".join(word_tokenizer().convert_ids_to_tokens(torch.cat(rows).tolist()))
    first_pass = " </s> ".join(stream_texts(str(place / "text")))
    assert joined.startswith(first_pass + " </s> ")


def test_the_order_depends_on_the_seed_and_keeps_every_document():
    documents = [str(i) for i in range(50)]
    orders = [list(mixed(documents, 10, random.Random(seed))) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(documents)
    assert list(mixed(documents, 0, random.Random(0))) == documents


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "line 2: no text in the field 'text'; it has body"),
        ("a.jsonl", b'{"text": \n', "line 1: not valid JSON"),
        ("a.txt.gz", b"not gzip", "cannot read"),
        ("a.csv", b"x", "expected a file or folder"),
        ("a.txt", b"", "holds no text"),
    ],
)
def test_text_that_cannot_be_used_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        next(iter(PackedText(str(tmp_path), word_tokenizer(), length=4)))


# ---------------------------------------------------------------- refusals


def test_models_with_other_tokenizers_are_refused(place):
    swapped = [*WORDS[:3], WORDS[4], WORDS[3], *WORDS[5:]]
    word_tokenizer(swapped).save_pretrained(place / "small")
    with pytest.raises(ArchitectureError, match="differ in 2 tokens, first 'w0'"):
        run(config(place))
    with pytest.raises(ArchitectureError, match="differ in 2 tokens"):
        get_shadow_model(base_again(place), tiny_config(shadow_model=str(place / "small")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objective": "clm"}, "expected one of 'projection', 'causal_lm', 'distill'"),
        ({"objective": "projection", "shadow": "implicit"}, "own head"),
        ({"objective": "distill", "kl_weight": 0.0, "mse_weight": 0.0}, "nothing would be learnt"),
        ({"steps": -1}, "steps=-1"),
        ({"batch_size": "8"}, "batch_size='8' is not valid: expected of type int"),
        ({"schedule": "cosin"}, "schedule='cosin' is not valid: expected one of cosine"),
        ({"warmup": 30}, "warmup=30 .* a share"),
        ({"clip": 0.0}, r"clip=0\.0 .* more than 0"),
        ({"dtype": "fp32"}, "dtype='fp32' .* one of auto, float32"),
        ({"data": ""}, "needs text"),
    ],
)
def test_settings_that_make_no_sense_are_refused(place, fields, message):
    with pytest.raises(ConfigError, match=message):
        run(config(place, **fields))
    assert not (place / "run").exists()


def test_sizes_for_a_small_model_that_has_its_own_are_refused(place):
    with pytest.raises(ConfigError, match="shadow_hidden_size=16 would be ignored"):
        run(config(place, shadow_hidden_size=16))


def test_a_projection_between_equal_widths_is_refused(place):
    with pytest.raises(ConfigError, match="no projection to train"):
        run(config(place, objective="projection", shadow=str(place / "base")))

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from shadowpeft.errors import DataError
from shadowpeft.train.data import (
    AnswerCollator,
    encode_classification,
    encode_generation,
    prompt_ids,
    target_ids,
)
from shadowpeft.train.tasks import TASKS

INTENT, CLASSES, INSTRUCTION = TASKS["intent"], TASKS["classification"], TASKS["instruction"]
SPECIAL = ["<s>", "</s>", "<pad>"]
TEXTS = ["Command: wake me at six", "Skill: alarm_set()", "Skill: play_music()", "Command: play some music"]
TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}\n{{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n"
    "{% if not enable_thinking %}(no thoughts)\n{% endif %}{% endif %}"
)


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a few merges, so that texts joined before encoding may encode differently."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=8, **options)


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a space in front of every text and BOS in front of that, as Llama's first tokenizers do."""
    characters = sorted({character for text in TEXTS for character in text if character != " "} | {"▁"})
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, "<unk>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def commands(count: int) -> list[dict]:
    return [{"text": f"play song {number}", "intent": "play_music"} for number in range(count)]


# ---------------------------------------------------------------- encoding answers


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), byte_tokenizer(bos_token=None), llama_tokenizer()])
@pytest.mark.parametrize("max_length", [512, 20])
def test_training_ids_start_with_exactly_the_ids_that_generation_starts_from(tokenizer, max_length):
    rows = commands(3)
    examples, _ = encode_generation(INTENT, tokenizer, rows, max_length)
    for row, example in zip(rows, examples, strict=True):
        num_prompt = example["labels"].count(-100)
        assert example["input_ids"][:num_prompt] == prompt_ids(INTENT, tokenizer, row, num_prompt)
        assert example["labels"][num_prompt:] == example["input_ids"][num_prompt:]


def test_the_loss_is_on_the_answer_and_the_end_token_only():
    tokenizer = byte_tokenizer()
    (example,), report = encode_generation(INTENT, tokenizer, commands(1), 512)
    learnt = [token for token in example["labels"] if token != -100]
    assert tokenizer.decode(learnt) == " play_music()</s>"
    assert tokenizer.decode(example["input_ids"]) == "<s>Command: play song 0\nSkill: play_music()</s>"
    assert (report.num_rows, report.longest) == (1, len(example["input_ids"]))
    assert report.num_prompts_truncated == report.num_targets_truncated == report.num_dropped == 0


def test_a_long_prompt_loses_its_start_but_not_bos_and_the_answer_stays_whole():
    tokenizer = byte_tokenizer()
    rows = [{"text": "please " * 30 + "play", "intent": "play_music"}, *commands(1)]
    examples, report = encode_generation(INTENT, tokenizer, rows, 40)
    text = tokenizer.decode(examples[0]["input_ids"])
    assert text.startswith("<s>") and not text.startswith("<s>Command")
    assert text.endswith("play\nSkill: play_music()</s>")
    assert len(examples[0]["input_ids"]) == report.longest == 40
    assert (report.num_prompts_truncated, report.num_targets_truncated) == (1, 0)


def test_an_answer_longer_than_the_limit_is_cut_at_the_right_and_counted():
    tokenizer = byte_tokenizer()
    row = {"prompt": "Count.", "answer": "one two three four five"}
    (example,), report = encode_generation(INSTRUCTION, tokenizer, [row], 9)
    answer = target_ids(tokenizer, [INSTRUCTION.target(row)])[0]
    assert example == {"input_ids": [tokenizer.bos_token_id, *answer[:8]], "labels": [-100, *answer[:8]]}
    assert (report.num_prompts_truncated, report.num_targets_truncated) == (1, 1)


def test_a_row_without_anything_to_learn_is_left_out_and_counted():
    tokenizer = byte_tokenizer(eos_token=None)
    rows = [{"prompt": "Say nothing.\n", "answer": ""}, {"prompt": "Say x.", "answer": "x"}]
    examples, report = encode_generation(INSTRUCTION, tokenizer, rows, 32)
    assert (len(examples), report.num_dropped) == (1, 1)
    with pytest.raises(DataError, match="none of the 1 rows has an answer to learn"):
        encode_generation(INSTRUCTION, tokenizer, rows[:1], 32)


def test_bos_comes_first_once_whether_or_not_the_tokenizer_adds_it():
    for tokenizer in (byte_tokenizer(), llama_tokenizer()):
        ids = prompt_ids(INTENT, tokenizer, commands(1)[0])
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert llama_tokenizer()("play")["input_ids"][0] == llama_tokenizer().bos_token_id
    assert byte_tokenizer()("play")["input_ids"][0] != byte_tokenizer().bos_token_id


def test_an_answer_gets_one_leading_space_where_the_tokenizer_writes_its_own():
    tokenizer = llama_tokenizer()
    assert tokenizer.convert_ids_to_tokens(target_ids(tokenizer, [" play"])[0]) == ["▁", "p", "l", "a", "y"]
    assert byte_tokenizer().decode(target_ids(byte_tokenizer(), [" play"])[0]) == " play"


def test_a_chat_template_frames_the_prompt_without_thinking_and_without_a_second_bos():
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    (example,), _ = encode_generation(INTENT, tokenizer, commands(1), 512)
    assert tokenizer.decode(example["input_ids"]) == (
        "<s>user\nCommand: play song 0\nSkill:</s><s>assistant\n(no thoughts)\nplay_music()</s>"
    )


def test_a_classified_text_is_raw_even_where_there_is_a_chat_template():
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    (example,), _ = encode_classification(CLASSES, tokenizer, [{"text": "good", "label": 1}], ["1"], 64)
    assert tokenizer.decode(example["input_ids"]) == "<s>good"


@pytest.mark.parametrize(
    ("row", "max_length", "message"),
    [
        ({"prompt": "", "answer": "x"}, 32, "row 1: the prompt of task 'instruction' is empty"),
        ({"prompt": "x", "answer": "x"}, 1, "max_length=1 is not valid: expected at least 2"),
    ],
)
def test_rows_that_cannot_be_learnt_from_are_refused(row, max_length, message):
    with pytest.raises(DataError, match=message):
        encode_generation(INSTRUCTION, byte_tokenizer(bos_token=None), [row], max_length)


# ---------------------------------------------------------------- encoding labels


def test_a_classified_text_is_cut_at_the_right_and_carries_its_labels_place():
    tokenizer = byte_tokenizer()
    rows = [{"text": "good " * 20, "label": "b"}, {"text": "bad", "label": "a"}]
    examples, report = encode_classification(CLASSES, tokenizer, rows, ["a", "b"], 12)
    assert [example["labels"] for example in examples] == [1, 0]
    assert tokenizer.decode(examples[0]["input_ids"]).startswith("<s>good good")
    assert (report.num_rows, report.num_prompts_truncated, report.longest) == (2, 1, 12)


def test_a_label_that_training_never_saw_is_refused_by_row_and_name():
    rows = [{"text": "x", "label": 0}, {"text": "y", "label": 7}]
    with pytest.raises(DataError, match="row 2: the label '7' is not among those of the training rows: 0, 1"):
        encode_classification(CLASSES, byte_tokenizer(), rows, ["0", "1"], 12)


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("side", ["right", "left"])
def test_answers_are_padded_on_the_asked_side_and_masked(side):
    tokenizer = byte_tokenizer()
    pad = tokenizer.pad_token_id
    examples = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = AnswerCollator(tokenizer, side=side, pad_to_multiple_of=4)(examples)
    rows = [[5, 6, 7, pad], [8, pad, pad, pad]] if side == "right" else [[pad, 5, 6, 7], [pad, pad, pad, 8]]
    assert batch["input_ids"].tolist() == rows
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != pad).long())
    assert batch["labels"][batch["attention_mask"] == 0].unique().tolist() == [-100]
    assert batch["labels"][batch["attention_mask"] == 1].tolist() == [-100, 6, 7, 8]


def test_class_labels_are_stacked_to_one_vector():
    batch = AnswerCollator(byte_tokenizer())(
        [{"input_ids": [5, 6], "labels": 3}, {"input_ids": [8], "labels": 0}]
    )
    assert batch["labels"].tolist() == [3, 0] and batch["input_ids"].shape == (2, 2)


def test_without_a_pad_token_the_end_token_fills_up_and_is_masked():
    tokenizer = byte_tokenizer(pad_token=None)
    batch = AnswerCollator(tokenizer)([{"input_ids": [5, 6]}, {"input_ids": [8]}])
    assert batch["input_ids"].tolist() == [[5, 6], [8, tokenizer.eos_token_id]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]] and "labels" not in batch


def test_without_pad_and_end_token_there_is_no_batch():
    tokenizer = byte_tokenizer(pad_token=None, eos_token=None)
    with pytest.raises(DataError, match="no pad and no end token"):
        AnswerCollator(tokenizer)([{"input_ids": [5]}])

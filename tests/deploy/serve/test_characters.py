"""A text is refused by its length alone only where no text of that length can have few enough tokens."""

import random

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, PreTrainedTokenizerFast

from deploy.tiny import byte_tokenizer
from shadowpeft.deploy.serve.characters import characters_per_token
from shadowpeft.train.data import token_ids

BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
SPACE = "\u2581"


def byte_level(normalizer=None, *, before=()) -> PreTrainedTokenizerFast:
    built = Tokenizer(models.BPE())
    if normalizer is not None:
        built.normalizer = normalizer
    built.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    built.train_from_iterator(["turn on the lights in the kitchen", "äöüé " * 9] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<|end|>")


def falling_back(normalizer=None, cut=None, **options) -> PreTrainedTokenizerFast:
    vocabulary = BYTES | {"a": 256, SPACE: 257, f"{SPACE}a": 258, f"{SPACE}{SPACE}": 259}
    merges = [(SPACE, "a"), (SPACE, SPACE)]
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **({"byte_fallback": True} | options)))
    if normalizer is not None:
        built.normalizer = normalizer
    if cut is not None:
        built.pre_tokenizer = cut
    return PreTrainedTokenizerFast(tokenizer_object=built)


SENTENCEPIECE = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
BOUNDED = {
    "bytes": (byte_tokenizer, 5),
    "merged bytes": (byte_level, 8),
    "digits": (lambda: byte_level(before=[pre_tokenizers.Digits(individual_digits=True)]), 8),
    "composed": (lambda: byte_level(normalizers.NFC()), 4 * 8),
    "sentencepiece": (lambda: falling_back(SENTENCEPIECE), 6),
    "metaspace": (lambda: falling_back(cut=pre_tokenizers.Metaspace()), 6),
}
TEXTS = ["the kitchen " * 30, "<|end|><pad>" * 30, "  " * 60, "e\u0301\u0323" * 60, "\U0001f600" * 40, "\u1fb7\u0345" * 9, ""]


@pytest.mark.parametrize("kind", BOUNDED)
def test_no_text_has_more_characters_than_its_tokens_can_stand_for(kind):
    tokenizer, expected = BOUNDED[kind][0](), BOUNDED[kind][1]
    most = characters_per_token(tokenizer)
    assert most is not None and most >= expected
    alphabet = "".join(TEXTS)
    texts = [*TEXTS, *("".join(random.Random(seed).choices(alphabet, k=50)) for seed in range(50))]
    assert all(len(text) <= most * len(token_ids(tokenizer, text)) for text in texts)


def with_token(**options) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(AddedToken("<call>", **options))
    return tokenizer


def word_level() -> PreTrainedTokenizerFast:
    built = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=built)


UNBOUNDED = {
    "words of any length": (word_level, "x" * 500),
    "unknown characters": (lambda: falling_back(byte_fallback=False), "x" * 500),
    "fused unknown characters": (lambda: falling_back(byte_fallback=False, unk_token="a", fuse_unk=True), "x" * 500),
    "white space": (lambda: falling_back(cut=pre_tokenizers.Whitespace()), " " * 500),
    "cut away": (lambda: falling_back(cut=pre_tokenizers.Split(Regex(" +"), "removed")), " " * 500),
    "stripped": (lambda: byte_level(normalizers.Strip()), " " * 500),
    "replaced": (lambda: byte_level(normalizers.Replace(Regex("x+"), "a")), "x" * 500),
    "shortened": (lambda: byte_level(normalizers.Replace("xxxxxxxxxxxxxxxxxxxx", "a")), "x" * 500),
    "white space at a token": (lambda: with_token(lstrip=True), " " * 500 + "<call>"),
}


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_where_characters_vanish_there_is_no_bound(kind):
    tokenizer, text = UNBOUNDED[kind][0](), UNBOUNDED[kind][1]
    assert len(token_ids(tokenizer, text)) < len(text) / 15
    assert characters_per_token(tokenizer) is None
    assert characters_per_token(with_token()) == len("<call>")

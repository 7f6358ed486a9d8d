"""How long a text may be so that its tokens can fit, read from the tokenizer without tokenising anything."""

import json
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from shadowpeft.deploy.tokenizer_parts import has_byte_tokens, steps

# A character of Unicode decomposes into at most 4, so that composing makes a text at most 4 times shorter.
_SHORTENS = {"Lowercase": 1, "NFD": 1, "NFKD": 1, "Prepend": 1, "NFC": 4, "NFKC": 4}
_CUTS_WITHOUT_LOSS = ("ByteLevel", "Digits", "Metaspace", "Split", "Punctuation", "UnicodeScripts")


def characters_per_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Characters of a text that one token stands for at most.

    None where no such number is known: characters may vanish (unknown ones, white space between words), or a token may
    stand for a word of any length.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    described = json.loads(backend.to_str())
    model, added = described["model"], described.get("added_tokens", [])
    cuts, shorter = steps(described.get("pre_tokenizer")), 1
    for step in steps(described.get("normalizer")):
        factor = _shortens(step)
        if factor is None:
            return None
        shorter *= factor
    if (
        model.get("type") != "BPE"
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
        or any(step["type"] not in _CUTS_WITHOUT_LOSS or step.get("behavior") == "Removed" for step in cuts)
        or any(token["lstrip"] or token["rstrip"] for token in added)
        or not _knows_all_bytes(model, any(step["type"] == "ByteLevel" for step in cuts))
    ):
        return None
    # A byte-level token has a letter for each byte, and no character has less than one byte.
    texts = [*model["vocab"], *(token["content"] for token in added)]
    if backend.normalizer is not None:
        texts += [backend.normalizer.normalize_str(token["content"]) for token in added]
    return shorter * max(map(len, texts))


def _shortens(normalizer: dict[str, Any]) -> int | None:
    """By how much a text may get shorter; None: by any amount."""
    if normalizer["type"] == "Replace":
        replaced = normalizer["pattern"].get("String")
        return 1 if replaced and len(normalizer["content"]) >= len(replaced) else None
    return _SHORTENS.get(normalizer["type"])


def _knows_all_bytes(model: dict[str, Any], is_byte_level: bool) -> bool:
    return all(byte in model["vocab"] for byte in ByteLevel.alphabet()) if is_byte_level else has_byte_tokens(model)

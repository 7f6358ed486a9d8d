"""The vocabulary of a BPE over sentencepiece's pieces, which llama.cpp joins by scores instead of merges."""

from typing import Any

from shadowpeft.deploy.tokenizer_parts import has_byte_tokens, steps

SPACE = "\u2581"
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def adds_space(described: dict[str, Any]) -> bool | None:
    """Whether texts get a space in front before each becomes ``▁``; None if that is not, or not all, what changes them."""
    normalizers = steps(described.get("normalizer"))
    if described.get("pre_tokenizer") is not None or normalizers not in ([_REPLACE], [_PREPEND, _REPLACE]):
        return None
    return len(normalizers) == 2


def piece_scores(model: dict[str, Any]) -> dict[str, float] | None:
    """Scores by which llama.cpp joins what the merges of a BPE join, in their order; None if none do.

    It joins any neighbours whose joined text is a token. So every pair that makes a token has to be a merge, and the merges
    of one token have to follow one another, as in files that were made of sentencepiece's.
    """
    plain = not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("ignore_merges"))
    if not plain or not has_byte_tokens(model):
        return None
    vocabulary, pairs, last = model["vocab"], {}, None
    for merge in model["merges"]:
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        joined = left + right
        if joined in pairs and joined != last:
            return None
        pairs.setdefault(joined, set()).add(left)
        last = joined
    for text in vocabulary:
        starts = {text[:end] for end in range(1, len(text)) if text[:end] in vocabulary and text[end:] in vocabulary}
        if starts != pairs.get(text, set()):
            return None
    return {text: -float(rank) for rank, text in enumerate(pairs)}

"""The vocabulary of a byte-level BPE tokenizer as GGUF metadata."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowpeft.deploy.packages import ExportError
from shadowpeft.train.data import as_chat, uses_chat

# How llama.cpp names the rules that cut text into words before the merges.
_DIGITS = {"type": "Digits", "individual_digits": True}
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_LLAMA3_PATTERN = _QWEN2_PATTERN.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
_PATTERNS = {_QWEN2_PATTERN: "qwen2", _LLAMA3_PATTERN: "llama-bpe"}


def tokenizer_metadata(
    tokenizer: PreTrainedTokenizerBase, gguf: Any, *, num_rows: int
) -> tuple[dict[str, Any], list[str]]:
    """(metadata, notes). A tokenizer that is no byte-level BPE is left out, and a note says so.

    Args:
        num_rows: of the table of embeddings; llama.cpp wants as many tokens.

    Raises:
        ExportError: the tokenizer has ids beyond them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {}
    rules = None if backend is None else word_rules(described.get("pre_tokenizer"))
    if described.get("model", {}).get("type") != "BPE" or rules is None:
        note = "the tokenizer is no byte-level BPE with known word rules, so the file holds no vocabulary"
        return {"tokenizer.ggml.model": "no_vocab"}, [note]
    tokens, kinds = _tokens(tokenizer, described, gguf, num_rows=num_rows)
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in described["model"]["merges"]]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rules,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": _adds_bos(tokenizer),
    }
    for name in ("bos", "eos"):
        if getattr(tokenizer, f"{name}_token_id") is not None:
            metadata[f"tokenizer.ggml.{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    if tokenizer.pad_token_id is not None:
        metadata["tokenizer.ggml.padding_token_id"] = tokenizer.pad_token_id
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata, []


def word_rules(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for a pre-tokenizer of the `tokenizers` library; None if it is none of the known ones."""
    if pre_tokenizer is None:
        return None
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    if parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
        return None
    before, uses_regex = parts[:-1], parts[-1].get("use_regex", True)
    if uses_regex and not before:
        return "gpt-2"
    if uses_regex and before == [_DIGITS]:
        return "smollm"
    if not uses_regex and len(before) == 1 and before[0].get("type") == "Split":
        return _PATTERNS.get(before[0]["pattern"].get("Regex", ""))
    return None


def _tokens(
    tokenizer: PreTrainedTokenizerBase, described: dict[str, Any], gguf: Any, *, num_rows: int
) -> tuple[list[str], list[int]]:
    """Texts and kinds by token number; numbers without a token get a placeholder, as llama.cpp's converter does."""
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    if max(texts) >= num_rows:
        raise ExportError(
            f"the tokenizer's last id is {max(texts)}, but the model's table of embeddings has {num_rows} rows; export "
            "the model with its own tokenizer, or resize_token_embeddings first"
        )
    special = {item["id"]: item["special"] for item in described.get("added_tokens", [])}
    tokens, kinds = [], []
    for number in range(num_rows):
        tokens.append(texts.get(number, f"[PAD{number}]"))
        if number not in texts:
            kinds.append(int(gguf.TokenType.UNUSED))
        elif number in special:
            kinds.append(int(gguf.TokenType.CONTROL if special[number] else gguf.TokenType.USER_DEFINED))
        else:
            kinds.append(int(gguf.TokenType.NORMAL))
    return tokens, kinds


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts of training and serving begin with BOS; from a template's text llama.cpp then takes off its own."""
    if tokenizer.bos_token_id is None:
        return False
    return not uses_chat(tokenizer) or as_chat(tokenizer, "a").startswith(str(tokenizer.bos_token))

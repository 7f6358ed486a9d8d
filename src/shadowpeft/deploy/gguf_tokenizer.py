"""The vocabulary of a BPE tokenizer as GGUF metadata: of bytes, or of sentencepiece's pieces."""

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowpeft.deploy.gguf_pieces import adds_space, piece_scores
from shadowpeft.deploy.packages import ExportError
from shadowpeft.deploy.tokenizer_parts import BYTE_TOKENS, steps
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
    """(metadata, notes). A tokenizer that is no BPE which llama.cpp knows is left out, and a note says so.

    Args:
        num_rows: of the table of embeddings; llama.cpp wants as many tokens.

    Raises:
        ExportError: the tokenizer has ids beyond them, or changes texts first as llama.cpp would not.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {}
    model, has_space = described.get("model", {}), adds_space(described)
    is_bpe = model.get("type") == "BPE"
    rules = word_rules(described.get("pre_tokenizer")) if is_bpe else None
    scores = piece_scores(model) if is_bpe and has_space is not None else None
    if rules is None and scores is None:
        note = (
            "the tokenizer is no byte-level BPE with known word rules, nor one of pieces that llama.cpp reads alike, so the "
            "file holds no vocabulary"
        )
        return {"tokenizer.ggml.model": "no_vocab"}, [note]
    notes = [] if rules is None else _notes_on_changes(described.get("normalizer"))
    tokens, kinds = _tokens(tokenizer, described, gguf, num_rows=num_rows, are_pieces=rules is None)
    metadata: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_bos_token": _adds_bos(tokenizer),
    }
    if scores is None:
        merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"]]
        metadata |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": rules, "tokenizer.ggml.merges": merges}
    else:
        metadata |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [scores.get(token, 0.0) for token in tokens],
            "tokenizer.ggml.add_space_prefix": has_space,
        }
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        if getattr(tokenizer, f"{name}_token_id") is not None:
            metadata[f"tokenizer.ggml.{key}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    if isinstance(tokenizer.chat_template, str):
        metadata["tokenizer.chat_template"] = tokenizer.chat_template
    return metadata, notes


def _notes_on_changes(normalizer: dict[str, Any] | None) -> list[str]:
    """llama.cpp's byte-level tokenizers change no text; nearly all texts have their characters composed (NFC) already.

    Raises:
        ExportError: other changes, after which a file without them would read other tokens.
    """
    changes = [step["type"] for step in steps(normalizer)]
    others = [change for change in changes if change != "NFC"]
    if others:
        raise ExportError(
            f"the tokenizer changes texts before it cuts them ({', '.join(others)}), which a GGUF file cannot say: llama.cpp "
            "would read other tokens than the model was trained on; write_gguf without the tokenizer and give llama.cpp "
            "token ids, or export to ONNX"
        )
    return ["llama.cpp does not compose characters (NFC) as the tokenizer does; give it texts in NFC"] if changes else []


def word_rules(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """llama.cpp's name for a pre-tokenizer of the `tokenizers` library; None if it is none of the known ones."""
    parts = steps(pre_tokenizer)
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space"):
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
    tokenizer: PreTrainedTokenizerBase, described: dict[str, Any], gguf: Any, *, num_rows: int, are_pieces: bool
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
        text = texts.get(number, f"[PAD{number}]")
        tokens.append(text)
        if number not in texts:
            kinds.append(int(gguf.TokenType.UNUSED))
        elif are_pieces and text == described["model"]["unk_token"]:
            kinds.append(int(gguf.TokenType.UNKNOWN))
        elif are_pieces and text in BYTE_TOKENS:
            kinds.append(int(gguf.TokenType.BYTE))
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

"""Parts of a `tokenizers` tokenizer, as its JSON describes them."""

from typing import Any

# The names of the tokens that stand for single bytes where a vocabulary falls back to them.
BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))


def steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the steps it consists of."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    children = part["normalizers"] if "normalizers" in part else part["pretokenizers"]
    return [step for child in children for step in steps(child)]


def has_byte_tokens(model: dict[str, Any]) -> bool:
    """Whether characters that are no token become those of their bytes, all of which there are."""
    return bool(model.get("byte_fallback")) and model["vocab"].keys() >= BYTE_TOKENS

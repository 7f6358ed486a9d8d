"""Parts of a `tokenizers` tokenizer, as its JSON describes them."""

from typing import Any


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
    return bool(model.get("byte_fallback")) and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))

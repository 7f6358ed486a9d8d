"""Text of an answer while it grows: only what can no longer change is shown, and nothing past a stop sequence."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_BROKEN = "\ufffd"


class AnswerText:
    """Decodes tokens one by one so that the pieces joined are what decoding all of them at once gives.

    Tokens are decoded in a window that starts at the last clean boundary, so that marks of a tokenizer's first word
    and characters of several tokens come out right. Text that may be the start of a stop sequence, or of a
    character, is held back.

    Args:
        tokenizer: of the model.
        stops: the answer ends in front of the first of these that appears.
        strip_start: leave out white space in front of the first word, as chat clients expect.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), *, strip_start: bool = False
    ) -> None:
        self._tokenizer, self._stops, self._strip_start = tokenizer, tuple(stops), strip_start
        self._ids: list[int] = []
        self._window, self._read = 0, 0
        self._held = ""
        self.shown = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that ``token`` makes certain; empty after a stop sequence."""
        self._ids.append(token)
        return self._show(self._decoded(final=False), final=False)

    def finish(self) -> str:
        """What was still held back."""
        return self._show(self._decoded(final=True), final=True)

    def _decoded(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._window : self._read])
        now = self._decode(self._ids[self._window :])
        if not final and (now.endswith(_BROKEN) or len(now) <= len(before)):
            return ""
        self._window, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _show(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        if self._strip_start and not self.shown:
            text = text.lstrip()
        end = first_stop(text, self._stops)
        if end is not None:
            self.stopped, text, self._held = True, text[:end], ""
        else:
            keep = 0 if final else held_back(text, self._stops)
            text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.shown += text
        return text


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop sequence starts in ``text``; None without one."""
    found = [place for place in (text.find(stop) for stop in stops) if place >= 0]
    return min(found, default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """Characters at the end of ``text`` that may be the start of a stop sequence."""
    longest = max((len(stop) for stop in stops), default=0)
    for size in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops if len(stop) > size):
            return size
    return 0


def holds_half_a_character(text: str) -> bool:
    """Whether a text holds half of a surrogate pair, as JSON can: no tokenizer takes it, and it cannot be sent."""
    return any("\ud800" <= character <= "\udfff" for character in text)

"""From messages and texts to the token ids that the model was trained to answer."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.protocol import Message
from shadowpeft.deploy.serve.text import holds_half_a_character
from shadowpeft.train.data import token_ids, uses_chat
from shadowpeft.train.tasks import Task


def chat_ids(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], task: Task | None, *, most_characters: int | None = None
) -> list[int]:
    """Ids of a conversation.

    With a task, its prompt around the last message, as in training. Else the tokenizer's chat template; else a plain
    transcript, since a base without template has no better convention.

    Args:
        most_characters: a longer text is refused before it is tokenised.

    Raises:
        ApiError: the template refuses the messages, the task's prompt needs more than one text, or a text is none or too
            long.
    """
    turns = [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in messages]
    if task is not None:
        reason = why_not_one_text(task)
        if reason is not None:
            raise ApiError(reason, param="messages")
        prompt = task.prompt(dict.fromkeys(task.fields, turns[-1]["content"]))
        turns = [{"role": "user", "content": prompt}]
        if not uses_chat(tokenizer):
            return text_ids(tokenizer, prompt, most_characters=most_characters)
    if uses_chat(tokenizer):
        try:
            text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False, enable_thinking=False)
        except TemplateError as error:  # a template's own words: no system role, turns that do not alternate
            raise ApiError(f"this model's chat template refuses the messages: {error}", param="messages") from error
        return _encode(tokenizer, str(text), most_characters)
    lines = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns]
    return text_ids(tokenizer, "\n".join([*lines, "Assistant:"]), most_characters=most_characters)


def why_not_one_text(task: Task) -> str | None:
    """Why a message alone does not make the task's prompt, or None if it does."""
    prompt = task.prompt({name: f"<{name}>" for name in task.fields})
    used = [name for name in task.fields if f"<{name}>" in prompt]
    if len(used) == 1:
        return None
    return (
        f"the prompt of task {task.name!r} is made of {' and '.join(used)}, but a message is one text; send ready-made "
        "prompts to /v1/completions"
    )


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, most_characters: int | None = None) -> list[int]:
    """Ids of a plain text, with BOS in front if the tokenizer has one; see :func:`chat_ids`."""
    start: Any = tokenizer.bos_token_id
    return [*([] if start is None else [start]), *_encode(tokenizer, text, most_characters)]


def check_ids(ids: Sequence[int], vocabulary: int) -> list[int]:
    """Ids that a client gave.

    Raises:
        ApiError: one of them is no token.
    """
    for token in ids:
        if not 0 <= token < vocabulary:
            raise ApiError(f"{token} is no token id: expected 0 to {vocabulary - 1}", param="prompt")
    return list(ids)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, most_characters: int | None) -> list[int]:
    if most_characters is not None and len(text) > most_characters:
        raise ApiError(
            f"the prompt has {len(text)} characters, but none of more than {most_characters} fits into the model's context; "
            "shorten it",
            code="context_length_exceeded",
        )
    if holds_half_a_character(text):
        raise ApiError("the text holds half a surrogate pair, which is no character", code="invalid_value")
    return token_ids(tokenizer, text)

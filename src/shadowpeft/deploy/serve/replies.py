"""Answers in the shape of OpenAI's API, whole or as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from shadowpeft.deploy.serve.errors import ApiError
from shadowpeft.deploy.serve.protocol import ChatRequest, Request
from shadowpeft.deploy.serve.sampling import TokenFacts
from shadowpeft.deploy.serve.sequence import End
from shadowpeft.deploy.serve.service import Answer


@dataclass
class Choice:
    """What was said so far under one index."""

    text: str = ""
    tokens: list[TokenFacts] = field(default_factory=list)
    reason: str | None = None
    num_tokens: int = 0


class Replies:
    """Writes one answer.

    Args:
        request: what was asked.
        answer: where it comes from.
        tokenizer: turns token ids of logprobs into texts.
    """

    def __init__(self, request: Request, answer: Answer, tokenizer: PreTrainedTokenizerBase) -> None:
        self._request, self._answer, self._tokenizer = request, answer, tokenizer
        self._is_chat = isinstance(request, ChatRequest)
        kind = "chatcmpl" if self._is_chat else "cmpl"
        self._head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model}
        self._started = time.monotonic()
        self.choices = [Choice() for _ in range(answer.num_choices)]

    async def whole(self) -> dict[str, Any]:
        """The complete answer as one object."""
        async for _ in self._collect():
            pass
        choices = []
        for index, choice in enumerate(self.choices):
            said = (
                {"message": {"role": "assistant", "content": choice.text}} if self._is_chat else {"text": choice.text}
            )
            logprobs = self._logprobs(choice.tokens, 0)
            choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": choice.reason})
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self.usage(), "shadow": self.info()}

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; an error after the first becomes an event of its own."""
        options = self._request.stream_options
        try:
            if self._is_chat:
                for index in range(len(self.choices)):
                    yield self._chunk(index, {"role": "assistant", "content": ""})
            async for index, text, tokens, offset in self._collect():
                if text or (tokens and self._request.num_top is not None):
                    yield self._chunk(index, {"content": text}, self._logprobs(tokens, offset))
                if self.choices[index].reason is not None:
                    yield self._last_chunk(index)
            if options is not None and options.include_usage:
                yield _event({**self._chunk_head(), "choices": [], "usage": self.usage(), "shadow": self.info()})
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            self._answer.cancel()  # the choices that did not fail: nobody will read them
            yield _event(error.body())

    async def _collect(self) -> AsyncIterator[tuple[int, str, list[TokenFacts], int]]:
        """(choice, new text, its tokens, characters before it) while the answer comes in."""
        async for index, event in self._answer.events():
            choice = self.choices[index]
            if isinstance(event, End):
                choice.reason, choice.num_tokens = event.reason, event.num_tokens
                yield index, "", [], len(choice.text)
                continue
            offset = len(choice.text)
            choice.text += event.text
            choice.tokens.extend(event.tokens)
            yield index, event.text, list(event.tokens), offset

    def usage(self) -> dict[str, Any]:
        """Counts of tokens; drafts under the names that OpenAI has for predicted tokens."""
        prompt, new = self._answer.num_prompt_tokens, sum(choice.num_tokens for choice in self.choices)
        counts: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
        info = self._answer.info
        if "drafted" in info:
            counts["completion_tokens_details"] = {
                "accepted_prediction_tokens": info["accepted"],
                "rejected_prediction_tokens": info["drafted"] - info["accepted"],
            }
        return counts

    def info(self) -> dict[str, Any]:
        """Who answered, how surely and how fast."""
        return {**self._answer.info, "latency_ms": round(1000 * (time.monotonic() - self._started), 2)}

    def _chunk_head(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk" if self._is_chat else "text_completion"}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> bytes:
        said = {"delta": delta} if self._is_chat else {"text": delta["content"]}
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": None}
        return _event({**self._chunk_head(), "choices": [choice]})

    def _last_chunk(self, index: int) -> bytes:
        """The end of a choice; that of the last one also says who answered, a field beside OpenAI's."""
        said: dict[str, Any] = {"delta": {}} if self._is_chat else {"text": ""}
        choice = {"index": index, **said, "logprobs": None, "finish_reason": self.choices[index].reason}
        is_last = all(choice.reason is not None for choice in self.choices)
        extra = {"shadow": self.info()} if is_last else {}
        return _event({**self._chunk_head(), "choices": [choice], **extra})

    def _logprobs(self, tokens: list[TokenFacts], offset: int) -> dict[str, Any] | None:
        if self._request.num_top is None:
            return None
        if self._is_chat:
            return {"content": [self._chat_logprob(facts) for facts in tokens], "refusal": None}
        texts = [self._text(facts.token) for facts in tokens]
        offsets = [offset + sum(map(len, texts[:place])) for place in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [facts.logprob for facts in tokens],
            "top_logprobs": [{self._text(token): value for token, value in facts.top} for facts in tokens],
            "text_offset": offsets,
        }

    def _chat_logprob(self, facts: TokenFacts) -> dict[str, Any]:
        top = [{**self._named(token), "logprob": value} for token, value in facts.top]
        return {**self._named(facts.token), "logprob": facts.logprob, "top_logprobs": top}

    def _named(self, token: int) -> dict[str, Any]:
        text = self._text(token)
        # Part of a character has bytes that its text does not show; null, as the protocol allows.
        return {"token": text, "bytes": None if "\ufffd" in text else list(text.encode())}

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()

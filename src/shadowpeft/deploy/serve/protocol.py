"""OpenAI's requests, as far as this server takes them, and a clear refusal of the rest."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shadowpeft.deploy.serve.errors import ApiError

_Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
_Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=1, le=2**31)]
_Stop = Annotated[str, Field(min_length=1, max_length=500)]
_Stops = _Stop | Annotated[list[_Stop], Field(max_length=16)]

# Fields whose other values would change the answer in a way this server does not know.
_ONLY: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": ({}, None),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "functions": ([], None),
    "response_format": ({"type": "text"}, None),
    "echo": (False, None),
    "suffix": ("", None),
    "best_of": (1, None),
    "modalities": (["text"], None),
}
# Fields that say nothing about the answer.
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}


class StreamOptions(BaseModel):
    """``include_usage`` asks for a last chunk with counts."""

    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool = False


class _Request(BaseModel):
    """What both endpoints share."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: Annotated[str, Field(min_length=1, max_length=200)]
    temperature: _Temperature | None = None
    top_p: _Share | None = None
    n: Annotated[int, Field(ge=1, le=16)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: _Stops | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: _Count | None = None

    @field_validator("n", "stream", mode="before")
    @classmethod
    def _null_means_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class TextPart(BaseModel):
    """A part of a message; only text is known."""

    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_completion_tokens: _Count | None = None

    @property
    def num_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Request):
    """``/v1/completions``; prompts are texts or token ids."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def num_top(self) -> int | None:
        return self.logprobs

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        is_ids = bool(self.prompt) and isinstance(self.prompt[0], int)
        return [self.prompt] if is_ids else list(self.prompt)  # type: ignore[list-item]


Request = ChatRequest | CompletionRequest
R = TypeVar("R", ChatRequest, CompletionRequest)


def parse(kind: type[R], body: bytes) -> R:
    """The request in ``body``.

    Raises:
        ApiError: no JSON object, a field that is missing, unknown, unsupported or outside its range.
    """
    try:
        values = _Anything.model_validate_json(body).model_dump()
    except ValidationError as error:
        reason = error.errors(include_input=False, include_url=False)[0]["msg"]
        raise ApiError(f"the body is not a JSON object: {reason}", code="invalid_json") from error
    for name, allowed in _ONLY.items():
        if name in values and name not in kind.model_fields and values.pop(name) not in allowed:
            raise ApiError(f"{name!r} is not supported by this server; leave it out", code="unsupported", param=name)
    for name in _IGNORED:
        values.pop(name, None)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from error


class _Anything(BaseModel):
    model_config = ConfigDict(extra="allow")


def _refusal(error: ValidationError) -> ApiError:
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"][:3])
    name = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden":
        return ApiError(f"unknown field {place!r}", code="unknown_field", param=name)
    return ApiError(f"{place}: {first['msg']}", code="invalid_value", param=name)

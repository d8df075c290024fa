"""The body of POST /v1/responses, and the chat completion that it asks for. Pure."""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from api.chat_request import Asked, JsonObject, ListOf, StreamOptions, example
from api.wires.responses import GOES_BACK
from relay.events import parts_of, text_in


class _Known(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """To this API null is what was left out, also under a name that is not known here."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None}


class Text(_Known):
    """What else the parts of an earlier output have, the model does not need again: `parsed` is the
    text once more, as the SDK has put it there."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: ListOf[JsonObject] | None = None
    logprobs: ListOf[JsonObject] | None = None
    parsed: Any = None

    def to_chat(self) -> JsonObject:
        return {"type": "text", "text": self.text}


class Refusal(_Known):
    type: Literal["refusal"]
    refusal: str

    def to_chat(self) -> JsonObject:
        return {"type": "refusal", "refusal": self.refusal}


class Image(_Known):
    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None

    def to_chat(self) -> JsonObject:
        detail = {"detail": self.detail} if self.detail else {}
        return {"type": "image_url", "image_url": {"url": self.image_url, **detail}}


def _as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


Part = Annotated[Text | Refusal | Image, Field(discriminator="type")]
Parts = Annotated[ListOf[Part], Field(min_length=1)]
Content = Annotated[Parts, BeforeValidator(_as_parts, json_schema_input_type=str | Parts)]
"""A string, or parts; a string is one part. The OpenAPI document must be told: it knows what comes
out of a validator, not what goes in."""


class _Item(_Known):
    """`id` and `status` are those of an item that an earlier response had in its output."""

    id: str | None = None
    status: str | None = None


class MessageItem(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: str | None = None

    def add_to(self, messages: list[JsonObject]) -> None:
        """What was said after a call stands before it: its outputs must follow it at once."""
        calls = self.role == "assistant" and messages and messages[-1].get("tool_calls")
        said = {"role": self.role, "content": _chat_content(self.content)}
        messages.insert(len(messages) - bool(calls), said)


class CallItem(_Item):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    parsed_arguments: Any = Field(None, description="As the SDK has put them there.")

    def add_to(self, messages: list[JsonObject]) -> None:
        """Calls belong to the one message of the assistant in which they were made."""
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        function = {"name": self.name, "arguments": self.arguments}
        call = {"id": self.call_id, "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)


class CallOutputItem(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: Content

    def add_to(self, messages: list[JsonObject]) -> None:
        content = _chat_content(self.output)
        messages.append({"role": "tool", "tool_call_id": self.call_id, "content": content})


class ReasoningItem(_Item):
    """Taken, so that an earlier output can be sent as it came. It is no message: where the model
    service wants it back, it stands in the one that followed from it."""

    type: Literal["reasoning"]
    summary: ListOf[JsonObject] = []
    content: ListOf[JsonObject] | None = None
    encrypted_content: str | None = None

    @property
    def thought(self) -> str:
        """What goes back of it; empty for nothing."""
        wanted = (self.id or "").startswith(f"{GOES_BACK}_")
        parts = parts_of(self.content, "reasoning_text") if wanted else ()
        return "".join(text_in(part, "text") for part in parts)


def _chat_content(parts: list[Part]) -> str | list[JsonObject]:
    match parts:
        case [Text(text=text)]:
            return text
    return [part.to_chat() for part in parts]


def _add_all(items: "list[Item]", messages: list[JsonObject]) -> None:
    thought = ""
    for item in items:
        if isinstance(item, ReasoningItem):
            thought += item.thought
            continue
        item.add_to(messages)
        said = messages[-1]
        if thought and said["role"] == "assistant":
            said["reasoning_content"] = said.get("reasoning_content", "") + thought
        thought = ""


def _kind_of(item: Any) -> Any:
    """A message need not say that it is one."""
    return item.get("type", "message") if isinstance(item, dict) else None


def _as_items(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _with_something_asked(items: list["Item"]) -> list["Item"]:
    """Of reasoning alone no message would be left for the model."""
    if all(isinstance(item, ReasoningItem) for item in items):
        message = "There is nothing in it that could be answered"
        raise PydanticCustomError("value_error", message)
    return items


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind_of),
]
Items = Annotated[ListOf[Item], Field(min_length=1)]
Input = Annotated[
    Items,
    Field(description="A text, or items."),
    BeforeValidator(_as_items, json_schema_input_type=str | Items),
    AfterValidator(_with_something_asked),
]


class Function(_Known):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None

    def to_chat(self) -> JsonObject:
        return {
            "type": "function",
            "function": self.model_dump(exclude={"type"}, exclude_none=True),
        }


class ToolChoice(_Known):
    """`none`, `auto` or `required`, as it stands or as the type; or a function by its name."""

    type: Literal["none", "auto", "required", "function"]
    name: str = ""

    def to_chat(self) -> str | JsonObject:
        named = {"type": "function", "function": {"name": self.name}}
        return named if self.type == "function" else self.type


def _as_choice(given: Any) -> Any:
    return {"type": given} if isinstance(given, str) else given


Choice = Annotated[
    ToolChoice | None,
    BeforeValidator(
        _as_choice, json_schema_input_type=Literal["none", "auto", "required"] | ToolChoice | None
    ),
]


class Format(_Known):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = None

    def to_chat(self) -> JsonObject:
        if self.type != "json_schema":
            return {"type": self.type}
        schema = self.model_dump(exclude={"type"}, exclude_none=True, by_alias=True)
        return {"type": self.type, "json_schema": schema}


class TextOptions(_Known):
    format: Format | None = None
    verbosity: str | None = None


class Reasoning(_Known):
    effort: str | None = None


Included = ListOf[Literal["reasoning.encrypted_content"]]


class ResponsesRequest(_Known):
    """The body of POST /v1/responses. `store` and `metadata` are for this server, which keeps every
    response for a while and does not tell metadata again: the model service hears of neither.
    `include` and `truncation` are taken as frameworks send them by themselves; it changes nothing.
    """

    model_config = example(input="Hello")

    model: str = Field(description="One of GET /v1/models.")
    input: Input
    background: bool | None = False
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    instructions: str | None = None
    tools: ListOf[Function] | None = None
    tool_choice: Choice = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_output_tokens: int | None = Field(None, ge=1)
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: JsonObject | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    include: Included | None = Field(None, description="A chat completion has none, so none comes.")
    truncation: Literal["disabled"] | None = None

    @property
    def format_type(self) -> str | None:
        return self.text.format.type if self.text and self.text.format else None

    def to_asked(self) -> Asked:
        """The chat completion that this is."""
        messages: list[JsonObject] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        _add_all(self.input, messages)
        fields = {
            "messages": messages,
            "tools": [tool.to_chat() for tool in self.tools] if self.tools else None,
            "tool_choice": self.tool_choice.to_chat() if self.tool_choice else None,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self.text.format.to_chat()
            if self.text and self.text.format
            else None,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_completion_tokens": self.max_output_tokens,
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "verbosity": self.text.verbosity if self.text else None,
            "user": self.user,
            "service_tier": self.service_tier,
            "prompt_cache_key": self.prompt_cache_key,
            "prompt_cache_retention": self.prompt_cache_retention,
            "prompt_cache_options": self.prompt_cache_options,
            "safety_identifier": self.safety_identifier,
        }
        return Asked.model_validate({k: v for k, v in fields.items() if v is not None})

"""What useChat asks: UI messages, made into the messages of a chat completion. Pure."""

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from api.chat_request import Asked, JsonObject, ListOf, example
from api.wires.ui_messages import GOES_BACK
from relay.errors import BadRequest
from relay.events import text_in

Id = Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^\n]*$")]

_ROUTING = frozenset({"id", "messages", "trigger", "message_id"})
_PASSED_OVER = frozenset({"reasoning", "reasoning-file", "source-url", "source-document", "custom"})
"""Of an answer: what a chat completion does not take back, but for some thoughts (`_thought`)."""
_DENIED = "The user did not allow this tool call."


HELLO = {"id": "message", "role": "user", "parts": [{"type": "text", "text": "Hello"}]}


class UIMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: Id
    role: Literal["system", "user", "assistant"]
    parts: ListOf[JsonObject]
    metadata: Any = Field(None, description="For the client alone; the model does not see it.")


class UIChatRequest(BaseModel):
    """The body of POST /api/chat. All but the first four go to the model as they are."""

    model_config = ConfigDict(extra="forbid") | example(id="chat", messages=[HELLO])

    id: Id = Field(description="Of the chat: under it the answer is resumed and stopped.")
    messages: ListOf[UIMessage] = Field(min_length=1)
    trigger: Literal["submit-message", "regenerate-message"] = "submit-message"
    message_id: Id | None = Field(None, alias="messageId")

    tools: ListOf[JsonObject] | None = None
    tool_choice: str | JsonObject | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    reasoning_effort: str | None = None

    @property
    def continued(self) -> str | None:
        """The message that the answer goes on with, as after a tool's output."""
        last = self.messages[-1]
        goes_on = self.trigger == "submit-message" and last.role == "assistant"
        return last.id if goes_on else None

    def to_asked(self) -> Asked:
        """Raises BadRequest, naming the part, for what a chat completion cannot say."""
        messages = [
            converted
            for index, message in enumerate(self.messages)
            for converted in to_chat_messages(message, f"messages.{index}")
        ]
        if not messages:
            raise BadRequest("messages: There is nothing in them that could be answered.")
        also = self.model_dump(exclude_unset=True, exclude=set(_ROUTING))
        return Asked.model_validate({"messages": messages, **also})


def to_chat_messages(message: UIMessage, where: str) -> Iterator[JsonObject]:
    parts = [(f"{where}.parts.{i}", part) for i, part in enumerate(message.parts)]
    if message.role == "assistant":
        for step in _steps(parts):
            yield from _answered(step)
        return
    content = [piece for at, part in parts for piece in _content(at, part, message.role)]
    if not content:
        raise BadRequest(f"{where}.parts: There is nothing in them for the model.")
    alone = len(content) == 1 and content[0]["type"] == "text"
    yield {"role": message.role, "content": content[0]["text"] if alone else content}


def _content(at: str, part: JsonObject, role: str) -> Iterator[JsonObject]:
    match part:
        case {"type": "text", "text": str(text)}:
            yield {"type": "text", "text": text}
        case {"type": "file", "mediaType": str(media), "url": str(url)} if role == "user":
            if media.partition("/")[0] != "image" or not url.startswith(
                ("https://", "http://", "data:image/")
            ):
                raise BadRequest(f"{at}: Of files only images are taken, by their URL.")
            yield {"type": "image_url", "image_url": {"url": url}}
        case {"type": str(kind)} if kind.startswith("data-"):
            pass  # For the client alone.
        case _:
            raise _unusable(at, part)


def _steps(parts: Sequence[tuple[str, JsonObject]]) -> Iterator[list[tuple[str, JsonObject]]]:
    """Each is what one request to the model said."""
    step: list[tuple[str, JsonObject]] = []
    for at, part in parts:
        if part.get("type") == "step-start":
            yield step
            step = []
        else:
            step.append((at, part))
    yield step


def _answered(step: list[tuple[str, JsonObject]]) -> Iterator[JsonObject]:
    """The text and the calls of one step, then what the tools gave.

    A call without an output is left out: the upstream refuses a call that nobody answered.
    Nothing comes of a step that failed before it said anything.
    """
    texts, calls, outputs = [], [], []
    for at, part in step:
        kind = part.get("type")
        if not isinstance(kind, str):
            raise _unusable(at, part)
        if kind == "dynamic-tool" or kind.startswith("tool-"):
            call, output = _tool(at, part)
            if output is not None:
                calls.append(call)
                outputs.append({"role": "tool", "tool_call_id": call["id"], "content": output})
        elif kind not in _PASSED_OVER:
            texts += [piece["text"] for piece in _content(at, part, "assistant")]
    said = {"role": "assistant", "content": "".join(texts) or None, **_thought(step)}
    if calls:
        yield {**said, "tool_calls": calls}
    elif said["content"]:
        yield said
    yield from outputs


def _thought(step: list[tuple[str, JsonObject]]) -> JsonObject:
    parts = [part for _, part in step if part.get("type") == "reasoning"]
    wanted = [part for part in parts if part.get("providerMetadata") == GOES_BACK]
    text = "".join(text_in(part, "text") for part in wanted)
    return {"reasoning_content": text} if text else {}


def _tool(at: str, part: JsonObject) -> tuple[JsonObject, str | None]:
    """A call, and its output if there is one."""
    name = part.get("toolName") or part["type"].removeprefix("tool-")
    match part:
        case {"toolCallId": str(call_id), "state": str(state)}:
            given = part.get("input")
            if given is None:  # Arguments that are no JSON the SDK has there.
                given = part.get("rawInput", {})
            function = {"name": name, "arguments": _json(given)}
            return {"id": call_id, "type": "function", "function": function}, _output(part, state)
        case _:
            raise _unusable(at, part)


def _output(part: JsonObject, state: str) -> str | None:
    if state == "output-available":
        output = part.get("output")
        return output if isinstance(output, str) else _json(output)
    if state == "output-error":
        return str(part.get("errorText"))
    return _DENIED if state == "output-denied" else None


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise BadRequest("The body nests too deeply: send plain JSON.") from None


def _unusable(at: str, part: JsonObject) -> BadRequest:
    kind = part.get("type")
    if not isinstance(kind, str):
        return BadRequest(f"{at}: The type of a part is a text: give it one.")
    return BadRequest(f"{at}: A part of the type {kind!r} like this is not known here.")

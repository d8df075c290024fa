"""What a caller may ask: the fields that the chat completions API knows, and nothing else.

Nothing in it can choose where the upstream call goes.
"""

import hashlib
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from relay.errors import BadRequest
from relay.log import Recovery

JsonObject = dict[str, Any]

T = TypeVar("T")
ListOf = Annotated[list[T], Field(fail_fast=True)]
"""It stops at the first wrong item: to tell of each would hold up the loop for seconds."""


HELLO: JsonObject = {"role": "user", "content": "Hello"}


def example(**body: Any) -> ConfigDict:
    """What Swagger UI sends unless it is told otherwise; a model that is asked for by its name is
    put in by `docs.py`. Without one it makes up a value for each field, and is refused."""
    return ConfigDict(json_schema_extra={"examples": [body]})


def _as_called(calls: list[JsonObject] | None) -> list[JsonObject] | None:
    """Without the arguments as the SDK has parsed them, beside those as the model wrote them."""
    for call in calls or ():
        if isinstance(function := call.get("function"), dict):
            function.pop("parsed_arguments", None)
    return calls


class _NullIsNothing(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_unknown_nulls(cls, given: Any) -> Any:
        """Null asks for nothing, also under a name that is not known here: many a client sends each
        parameter that OpenAI has, and a message back as it came."""
        if not isinstance(given, dict) or None not in given.values():
            return given
        known = cls.model_fields
        return {name: value for name, value in given.items() if value is not None or name in known}


class Message(_NullIsNothing):
    """One message of the conversation; its content goes to the model as it is."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | ListOf[JsonObject] | None = None
    name: str | None = None
    tool_calls: Annotated[ListOf[JsonObject] | None, AfterValidator(_as_called)] = None
    tool_call_id: str | None = None
    function_call: JsonObject | None = None
    refusal: str | None = None
    audio: JsonObject | None = None
    # Back to whom it came from: DeepSeek refuses the outputs of tools without what it thought.
    reasoning_content: str | None = None
    reasoning: str | None = None
    reasoning_details: ListOf[JsonObject] | None = None
    images: ListOf[JsonObject] | None = None
    # Azure refuses them where they come back.
    annotations: ListOf[JsonObject] | None = Field(
        None, exclude=True, description="Of an earlier answer; the model does not see them."
    )
    parsed: Any = Field(
        None,
        exclude=True,
        description="An earlier answer as the SDK has parsed it; the model does not see it.",
    )


class Asked(_NullIsNothing):
    """The fields of a chat completion that the model sees."""

    messages: ListOf[Message] = Field(min_length=1, description="The conversation so far.")

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    n: int | None = Field(None, ge=1, le=16)
    stop: str | ListOf[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    tools: ListOf[JsonObject] | None = None
    tool_choice: str | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    functions: ListOf[JsonObject] | None = None
    function_call: str | JsonObject | None = None
    response_format: JsonObject | None = None

    reasoning_effort: str | None = None
    verbosity: str | None = None
    prediction: JsonObject | None = None
    modalities: ListOf[Literal["text"]] | None = None
    web_search_options: JsonObject | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: JsonObject | None = None
    moderation: JsonObject | None = None
    safety_identifier: str | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    def to_stored(self, *also: object, webhook: str = "") -> tuple[JsonObject, str]:
        """What the model is to see: what the caller said and nothing that it left out, or gave as
        null, which would switch off the server's default; and a digest that is equal for equal
        bodies, in which `also` and a webhook count. Raises BadRequest for what JSON cannot carry
        further."""
        told = [{"webhook": webhook}] if webhook else []
        try:
            given = self.model_dump(exclude_unset=True, include=set(Asked.model_fields))
            stored = {name: value for name, value in given.items() if value is not None}
            text = json.dumps([stored, *also, *told], sort_keys=True, allow_nan=False)
        except (ValueError, RecursionError):
            raise BadRequest(
                "The body nests too deeply, or holds NaN or Infinity: send plain JSON."
            ) from None
        return stored, hashlib.sha256(text.encode()).hexdigest()


class ChatRequest(Asked):
    """The body of POST /chat."""

    model_config = example(messages=[HELLO], temperature=0.2)

    recovery: Recovery = Field(
        "restart",
        description="If the worker dies after the first chunk: begin the answer anew, or end the "
        "stream as `failed`, `interrupted`. For this server; the model does not see it.",
    )


class StreamOptions(BaseModel):
    """What either API of OpenAI knows of them."""

    model_config = ConfigDict(extra="forbid")

    include_obfuscation: Literal[False] | None = Field(
        None, description="There is no padding here against who measures encrypted events."
    )


class ChatStreamOptions(StreamOptions):
    include_usage: bool | None = False


class Completion(Asked):
    """What OpenAI and Azure know alike."""

    stream: bool | None = False
    stream_options: ChatStreamOptions | None = None


class ChatCompletionRequest(Completion):
    """The body of POST /v1/chat/completions."""

    model_config = example(messages=[HELLO])

    model: str = Field(description="One of GET /v1/models.")


class DeploymentRequest(Completion):
    """The body of POST /openai/deployments/{deployment}/chat/completions."""

    model_config = example(messages=[HELLO])

    model: str | None = Field(None, description="Passed over: the path names the deployment.")

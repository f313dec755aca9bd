"""Request bodies of the OpenAI API: what is understood, what is refused by name, what is ignored.

A field of OpenAI's, or a widespread extension, that would change the answer and that the server
does not do is refused unless it has the value that changes nothing. Fields nobody has heard of
are ignored, as clients of the API expect.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mlakit.serving.http.refusal import Refusal
from mlakit.serving.request import Sampling

Refused = dict[str, tuple[Any, ...]]
"""Field names with the values that change nothing."""

SWITCH = (None, False)
EXTENSIONS: Refused = {
    "min_p": (None, 0),
    "typical_p": (None, 1),
    "repetition_penalty": (None, 1),
    "length_penalty": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "min_tokens": (None, 0),
    "stop_token_ids": (None, []),
    "bad_words": (None, []),
    "use_beam_search": SWITCH,
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
    "include_stop_str_in_output": SWITCH,
    "skip_special_tokens": (None, True),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "response_format": (None, {"type": "text"}),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
    "grammar": (None,),
    "allowed_token_ids": (None,),
    "logits_processors": (None, []),
}
"""Fields of other servers, and one that is OpenAI's in a chat."""

CHAT_ONLY: Refused = {
    "audio": (None,),
    "modalities": (None, ["text"]),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "moderation": (None,),
    "web_search_options": (None,),
    "metadata": (None, {}),
    "store": SWITCH,
    "service_tier": (None, "auto", "default"),
    "prompt_cache_options": (None,),
    "prompt_cache_retention": (None,),
    "add_generation_prompt": (None, True),
    "continue_final_message": SWITCH,
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "documents": (None, []),
}

Body = TypeVar("Body", bound="GenerationFields")


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 5.0 is a whole one too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Seed = Annotated[Whole, Field(ge=-(2**63), le=2**63 - 1)]
TokenId = Annotated[Whole, Field(ge=0, le=2**31 - 1)]
Tokens = Annotated[Whole, Field(ge=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Bias], Field(max_length=1024)
]
StopText = Annotated[str, Field(min_length=1, max_length=256)]


class Fields(BaseModel):
    """A JSON object; types are not converted, and other fields may be there."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)


class StreamOptions(Fields):
    """How a stream ends."""

    include_usage: bool | None = Field(None, description="A last chunk with the token counts.")


class GenerationFields(Fields):
    """What both endpoints take."""

    refused: ClassVar[Refused] = EXTENSIONS

    model: str | None = Field(None, description="The served model; any other name is a 404.")
    n: Annotated[Whole, Field(ge=1, le=128)] | None = Field(None, description="Choices; 1.")
    stream: bool | None = Field(None, description="Server-sent events, a chunk at a time.")
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = Field(
        None, description="Strings that end the text and are not part of it."
    )
    seed: Seed | None = Field(None, description="Same seed and request, same text.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 is greedy; 1 by default."
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Sample from this share of probability; 1 by default."
    )
    top_k: Annotated[Whole, Field(ge=-1, le=2**31 - 1)] | None = Field(
        None, description="Sample from so many tokens; 0 or -1: from all (an extension)."
    )
    presence_penalty: Penalty | None = Field(None, description="For tokens that were written.")
    frequency_penalty: Penalty | None = Field(None, description="For each time they were.")
    logit_bias: Biases | None = Field(
        None, description="Token ids, as strings, and what is added to their logits."
    )
    ignore_eos: bool | None = Field(
        None, description="Write on after the end-of-text token (an extension)."
    )
    user: str | None = Field(None, max_length=256, description="Goes to the access log.")

    def require_done(self) -> None:
        """Refuses what the server does not do.

        Raises:
            Refusal: naming the field.
        """
        extra = self.model_extra or {}
        for name, harmless in self.refused.items():
            if name in extra and not _among(extra[name], harmless):
                raise Refusal(400, f"this server does not do '{name}'; leave it out", param=name)
        if self.stream_options is not None:
            if not self.stream:
                raise Refusal(
                    400, "'stream_options' goes with 'stream': true only", param="stream_options"
                )
            if (self.stream_options.model_extra or {}).get("include_obfuscation"):
                name = "stream_options.include_obfuscation"
                raise Refusal(400, f"this server does not do '{name}'; leave it out", param=name)

    @property
    def choices(self) -> int:
        """Texts per prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """A stream ends with the counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, max_tokens: int, logprobs: int | None, choice: int) -> Sampling:
        """How one choice is sampled; with a seed, each choice has its own, ``seed + choice``.

        Args:
            max_tokens: most new tokens.
            logprobs: as in ``Sampling``.
            choice: number of the choice among those of its prompt.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            stop=stop,
            seed=None if self.seed is None else self.seed + choice,
            logprobs=logprobs,
            ignore_eos=bool(self.ignore_eos),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
        )


class CompletionRequest(GenerationFields):
    """The body of ``POST /v1/completions``."""

    refused: ClassVar[Refused] = {
        **GenerationFields.refused,
        "suffix": (None, ""),
        "best_of": (None, 1),
    }

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    ) = Field(description="One text or several, as strings or as token ids.")
    max_tokens: Tokens | None = Field(None, description="16 by default.")
    logprobs: Annotated[Whole, Field(ge=0, le=5)] | None = Field(
        None, description="Log probabilities of the tokens and of so many likeliest ones."
    )
    echo: bool | None = Field(None, description="Put the prompt before the text.")

    def require_done(self) -> None:
        """As in GenerationFields."""
        super().require_done()
        if self.echo and self.logprobs is not None:
            raise Refusal(
                400, "this server gives no log probabilities of a prompt: 'echo' or 'logprobs'",
                param="echo",
            )  # fmt: skip

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each as it came."""
        given: Any = self.prompt
        single = isinstance(given, str) or isinstance(given[0], int)
        return [given] if single else given


class TextPart(Fields):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class Message(Fields):
    """One turn of a conversation."""

    not_done: ClassVar[tuple[str, ...]] = ("tool_calls", "function_call", "audio", "refusal")

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates take it; parts of text stand on lines of their own."""
        text = self.content
        if not isinstance(text, str):
            text = "\n".join(part.text for part in text)
        given = {"role": self.role, "content": text}
        given |= {"name": self.name} if self.name is not None else {}
        return given | ({"tool_call_id": self.tool_call_id} if self.tool_call_id else {})


class ChatRequest(GenerationFields):
    """The body of ``POST /v1/chat/completions``."""

    refused: ClassVar[Refused] = {**GenerationFields.refused, **CHAT_ONLY}

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Tokens | None = Field(None, description="Older name of max_completion_tokens.")
    max_completion_tokens: Tokens | None = Field(None, description="As many as fit by default.")
    logprobs: bool | None = Field(None, description="Log probabilities of the tokens.")
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = Field(
        None, description="And of so many likeliest ones."
    )
    safety_identifier: str | None = Field(None, max_length=256, description="As 'user'.")
    prompt_cache_key: str | None = Field(
        None, description="Not needed: equal beginnings are found without it."
    )

    def require_done(self) -> None:
        """As in GenerationFields."""
        super().require_done()
        for place, message in enumerate(self.messages):
            for name in Message.not_done:
                if (message.model_extra or {}).get(name):
                    field = f"messages.{place}.{name}"
                    raise Refusal(400, f"this server does not do '{field}'", param=field)
        if self.top_logprobs is not None and not self.logprobs:
            raise Refusal(400, "'top_logprobs' goes with 'logprobs': true only", param="logprobs")

    @property
    def asked_tokens(self) -> int | None:
        """Most new tokens, under either name."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def asked_logprobs(self) -> int | None:
        """As in ``Sampling``."""
        return (self.top_logprobs or 0) if self.logprobs else None


NAMES = frozenset(
    name
    for kind in (StreamOptions, TextPart, Message, CompletionRequest, ChatRequest)
    for name in kind.model_fields
)
"""Names of fields; the other parts of an error's place are pydantic's own."""


EITHER = {
    "prompt": "Input should be a string, strings, token ids, or lists of token ids; none empty",
    "stop": "Input should be a string of 1 to 256 characters, or at most 16 of them",
}
"""Of fields that may be several things, where pydantic would tell of each what is wrong with it."""


def parse(kind: type[Body], body: bytes) -> Body:
    """The request that a body holds.

    Raises:
        Refusal: the body is no JSON of that shape, or asks for what the server does not do.
    """
    try:
        found = kind.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        said: dict[str, str] = {}
        for problem in problems:
            names = [part for part in problem["loc"] if part in NAMES or isinstance(part, int)]
            if names and names[0] in EITHER:
                said[str(names[0])] = EITHER[str(names[0])]
            else:
                said[".".join(map(str, names))] = problem["msg"]
        words = [f"{place}: {message}" if place else message for place, message in said.items()]
        param = str(problems[0]["loc"][0]) if problems[0]["loc"] else None
        raise Refusal(400, "; ".join(words[:4]), param=param) from None
    found.require_done()
    return found


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    """Membership by value and kind: neither ``false`` is 0 nor ``true`` is 1."""
    return any(value == other and isinstance(value, bool) == isinstance(other, bool)
               for other in values)  # fmt: skip

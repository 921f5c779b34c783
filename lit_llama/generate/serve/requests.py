"""Requests of /v1/chat/completions and /v1/completions -> requests of the engine. Each field is obeyed or refused."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lit_llama.errors import ResourceError, UserError
from lit_llama.generate.engine.constraint import Constraint
from lit_llama.generate.engine.request import MAX_SEED, Overflow, Request, Sampling
from lit_llama.generate.llm import LLM
from lit_llama.generate.questions import Fitted, fitted_messages, fitted_text
from lit_llama.generate.serve.fields import ApiError, Fields, biases, check_text, kind, refusal, token_ids
from lit_llama.generate.serve.messages import read_messages, read_tool_choice, read_tools, response_schema
from lit_llama.generate.serve.models import Models
from lit_llama.generate.serve.tools import CallReader, call_form, call_grammar
from lit_llama.text.prompts.encode import Cutter, JinjaStyle, for_style, ids_of
from lit_llama.text.prompts.styles import Segment
from lit_llama.text.prompts.teller import ThoughtsReader, opens
from lit_llama.text.tokenizer.special import any_of

MAX_LOGPROBS = 20
_STOPS, _STOP_LENGTH = 64, 1000
_COMPLETION_TOKENS = 16  # as OpenAI has it
_OWN_NAMES = ("messages", "tools", "documents", "bos_token", "eos_token", "add_generation_prompt")
_SILENT = ("user", "safety_identifier", "prompt_cache_key", "metadata", "service_tier", "store")
"""Fields that tell a provider of its customers, and change no answer."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request of the wire, ready for the engine.

    Attributes:
        name: Of the model.
        llm: It.
        requests: One for each prompt.
        chat: Whether answers are messages.
        stream: Whether they are wanted as they come.
        include_usage: Whether a stream tells the counts of tokens at its end.
        echo: Prompts are given back before their continuations.
        opening: Text that answers begin with and that is not shown.
        reader: Finds calls in an answer; None where there are none.
        thoughts: Tells thoughts from the rest of an answer; None where all is content.
        dropped: Oldest turns, or tokens of texts, that were left out of the prompts.
    """

    name: str
    llm: LLM
    requests: list[Request]
    chat: bool
    stream: bool
    include_usage: bool
    echo: bool = False
    opening: str = ""
    reader: Callable[[], CallReader] | None = None
    thoughts: Callable[[], ThoughtsReader] | None = None
    dropped: int = 0

    @property
    def sampling(self) -> Sampling:
        """Sampling of all its prompts."""
        return self.requests[0].sampling

    @property
    def choices(self) -> int:
        """Answers in all."""
        return sum(request.sampling.n for request in self.requests)


def chat_request(body: Mapping[str, Any], models: Models) -> Asked:
    """Read a request of /v1/chat/completions.

    Raises:
        ApiError: A field is unknown, of a wrong kind or out of its range, or cannot be obeyed.
    """
    fields = Fields(body)
    name, llm = models.find(fields.text("model"))
    if llm.style is None:
        message = f"{name!r} has no chat template, so it does not say how to put messages; use /v1/completions"
        raise refusal("model", message, "unsupported_value")
    default = models.default(name)
    messages = read_messages(fields.list("messages"))
    tools = read_tools(fields.list("tools"))
    choice = read_tool_choice(fields.any("tool_choice"), tools)
    parallel = fields.flag("parallel_tool_calls", True)
    values = _sampling(fields, llm)
    values["logprobs"] = _chat_logprobs(fields)
    most = _most(fields, "max_completion_tokens", "max_tokens")
    schema = response_schema(fields.inner("response_format"))
    more = template_values(fields.object("chat_template_kwargs"), llm)
    stream, include_usage = _stream(fields)
    _refuse_others(fields)
    used = [] if choice == "none" else tools
    if used and schema is not None:
        raise refusal("response_format", "cannot be combined with tools, whose calls have a form of their own")
    form = call_form(llm, used) if used else None
    _check_size(models, llm, sum(len(message["content"]) for message in messages), "messages")
    sampling = _made(default, values)
    fitted = chat_prompt(llm, messages, used, more, _limit(models, llm, sampling, most), models.limits.overflow)
    constraint = None
    if form is not None:
        grammar = call_grammar(form, used, choice, parallel)
        constraint = _constraint("tools", lambda: llm.constraint(grammar=grammar))
    elif schema is not None:
        constraint = _constraint("response_format", lambda: llm.constraint(json_schema=schema))
    names = [tool["function"]["name"] for tool in used]
    return Asked(
        name=name,
        llm=llm,
        requests=_requests(models, llm, [fitted], sampling, most, "messages", constraint=constraint),
        chat=True,
        stream=stream,
        include_usage=include_usage,
        opening=llm.opening,
        reader=None if form is None else lambda: CallReader(form, names),
        thoughts=_thoughts(llm, fitted.ids) if schema is None and choice in ("none", "auto") else None,
        dropped=fitted.dropped,
    )


def _thoughts(llm: LLM, ids: Sequence[int]) -> Callable[[], ThoughtsReader] | None:
    """What tells thoughts from an answer whose prompt begins them, or whose template takes them back by their name."""
    opened = opens(llm.tokenizer.decode(list(ids[-16:])))
    style = llm.style
    knows = isinstance(style, JinjaStyle) and style.asks_for("reasoning_content")
    return (lambda: ThoughtsReader(opened)) if opened or knows else None


def completion_request(body: Mapping[str, Any], models: Models) -> Asked:
    """Read a request of /v1/completions; errors as for `chat_request`."""
    fields = Fields(body)
    name, llm = models.find(fields.text("model"))
    prompts = _prompts(fields.any("prompt"), llm, models)
    values = _sampling(fields, llm)
    logprobs = values["logprobs"] = fields.whole("logprobs", 0, MAX_LOGPROBS)
    echo = fields.flag("echo")
    most = _most(fields, "max_tokens")
    most = _COMPLETION_TOKENS if most is None else most
    stream, include_usage = _stream(fields)
    fields.only("best_of", 1, values.get("n", 1), why="answers are given as they are drawn; use n")
    fields.only("suffix", "", why="texts are continued, not filled in")
    _refuse_others(fields)
    if not most and not (echo and logprobs is not None):
        raise refusal("max_tokens", "is 0, expected 1 or more without echo and logprobs")
    scored = logprobs if echo else None
    if scored is not None and stream:
        raise refusal("stream", "cannot be combined with echo and logprobs, as a prompt is scored at the end")
    sampling = _made(models.default(name), values)
    overflow = models.limits.overflow if scored is None else "error"  # all of a text is scored
    fitted = [fitted_text(llm, ids, _limit(models, llm, sampling, most), overflow) for ids in prompts]
    return Asked(
        name=name,
        llm=llm,
        requests=_requests(models, llm, fitted, sampling, most, "prompt", scored=scored),
        chat=False,
        stream=stream,
        include_usage=include_usage,
        echo=echo,
        dropped=sum(prompt.dropped for prompt in fitted),
    )


def _limit(models: Models, llm: LLM, sampling: Sampling, most: int | None) -> int:
    """Tokens of a prompt that leave its answer room; half of all where the answer may be as long."""
    capacity = models.capacity(llm)
    return max(capacity - (sampling.max_new_tokens if most is None else most), capacity // 2)


def chat_prompt(
    llm: LLM,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    more: Mapping[str, Any],
    limit: int = 0,
    overflow: Overflow = "error",
) -> Fitted:
    """Return a conversation in the style of a model, with `drop_oldest` at most `limit` tokens of it.

    Raises:
        ApiError: The style cannot say something.
    """
    try:
        return fitted_messages(llm, messages, limit, overflow, tools, more)
    except UserError as error:
        raise refusal("messages", str(error).split(";")[0].split(", or leave such rows")[0]) from error


def text_ids(llm: LLM, text: str, begin: bool = True) -> list[int]:
    """Return the ids of a raw text, in which control tokens are words as any others.

    Args:
        llm: Whose tokenizer encodes it.
        text: The text.
        begin: Put the token that begins a text before it, where the model has one.

    Raises:
        ApiError: It cannot be encoded.
    """
    tokenizer = llm.tokenizer
    try:
        ids = ids_of(tokenizer, Cutter(tokenizer).runs([Segment(text)]))
    except UserError as error:
        raise refusal("prompt", str(error)) from error
    return [tokenizer.control[tokenizer.bos], *ids] if tokenizer.bos and begin else ids


def _check_size(models: Models, llm: LLM, size: int, param: str) -> None:
    """Refuse characters that cannot fit, whatever they are: encoding them takes 200 times as much memory as they do."""
    capacity, longest = models.capacity(llm), llm.longest_token
    if models.limits.overflow == "error" and size > capacity * longest:
        raise refusal(
            param,
            f"the prompt has {size} characters, but the model's maximum context length is {capacity} tokens of at most "
            f"{longest} bytes each; shorten the prompt",
            "context_length_exceeded",
        )


def _prompts(value: Any, llm: LLM, models: Models) -> list[list[int]]:
    size, most = llm.tokenizer.size, models.limits.max_choices

    def encoded(text: str, at: str) -> list[int]:
        _check_size(models, llm, len(text), at)
        return text_ids(llm, check_text(text, at))

    if isinstance(value, str):
        return [encoded(value, "prompt")]
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else "missing" if value is None else kind(value)
        raise refusal("prompt", f"is {found}, expected text, token ids, or a list of these")
    if isinstance(value[0], int):
        return [token_ids(value, "prompt", size)]
    if len(value) > most:
        raise refusal("prompt", f"holds {len(value)} prompts, expected at most {most}")
    prompts = []
    for index, prompt in enumerate(value):
        at = f"prompt[{index}]"
        if isinstance(prompt, str):
            prompts.append(encoded(prompt, at))
        elif isinstance(prompt, list) and prompt:
            prompts.append(token_ids(prompt, at, size))
        else:
            raise refusal(at, f"is {'an empty list' if prompt == [] else kind(prompt)}, expected text or token ids")
    return prompts


def _sampling(fields: Fields, llm: LLM) -> dict[str, Any]:
    """Fields of `Sampling` that a request sets."""
    size = llm.tokenizer.size
    bias = fields.object("logit_bias")
    top_k = fields.whole("top_k", -1, size)
    stop = fields.texts("stop", _STOPS, _STOP_LENGTH)
    values = {
        "temperature": fields.real("temperature", 0, 100),
        "top_p": fields.real("top_p", 0, 1),
        "top_k": None if top_k is None else max(top_k, 0),
        "min_p": fields.real("min_p", 0, 1),
        "repetition_penalty": fields.real("repetition_penalty", 0.001, 1000),
        "presence_penalty": fields.real("presence_penalty", -2, 2),
        "frequency_penalty": fields.real("frequency_penalty", -2, 2),
        "logit_bias": None if bias is None else biases(bias, "logit_bias", size),
        "n": fields.whole("n", 1, 1 << 20),
        "stop": stop or None,
        "seed": fields.whole("seed", 0, MAX_SEED),
    }
    found = {name: value for name, value in values.items() if value is not None}
    return {"seed": secrets.randbits(62), **found}


def _chat_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.whole("top_logprobs", 0, MAX_LOGPROBS)
    if top is not None and not wanted:
        raise refusal("top_logprobs", "is given, expected logprobs true with it")
    return (top or 0) if wanted else None


def _most(fields: Fields, *names: str) -> int | None:
    """The most tokens of an answer, of which all names that are given have to say the same."""
    found = {
        name: value
        for name in names
        if (value := fields.whole(name, 0 if name == names[-1] else 1, 1 << 40)) is not None
    }
    if len(set(found.values())) > 1:
        raise refusal(names[0], f"is {found[names[0]]}, but {names[1]} is {found[names[1]]}; expected one of them")
    if len(names) > 1 and 0 in found.values():
        raise refusal(names[-1], "is 0, expected 1 or more")
    return next(iter(found.values()), None)


def template_values(values: Mapping[str, Any] | None, llm: LLM) -> dict[str, Any]:
    """Read the values that a chat template is given besides; nothing of them becomes a control token."""
    style = llm.style
    for name, value in (values or {}).items():
        at = f"chat_template_kwargs.{name[:60]}"
        if not isinstance(style, JinjaStyle) or name in _OWN_NAMES or not style.asks_for(name):
            raise refusal(at, "is nothing that the model's chat template asks for", "unsupported_value")
        if not isinstance(value, str | int | float | bool | None):
            raise refusal(at, f"is {kind(value)}, expected text, a number or true or false")
        if isinstance(value, str):
            control = for_style(llm.tokenizer, style).control
            if found := any_of(control).search(check_text(value, at)):
                raise refusal(at, f"spells the control token {found[0]}")
    return dict(values or {})


def _stream(fields: Fields) -> tuple[bool, bool]:
    stream, options = fields.flag("stream"), fields.inner("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise refusal("stream_options", "is given, expected stream true with it")
    include = options.flag("include_usage")
    options.flag("include_obfuscation")  # padding against those who watch the sizes of packets
    options.end()
    return True, include


def _refuse_others(fields: Fields) -> None:
    fields.ignore(*_SILENT)
    fields.only("modalities", ["text"], why="this model writes text only")
    fields.only("reasoning_effort", why="set what the model's template asks for by chat_template_kwargs")
    fields.end()


def _made(default: Sampling, values: Mapping[str, Any]) -> Sampling:
    try:
        return replace(default, **values)
    except UserError as error:  # of a range that is checked there alone
        raise refusal("", str(error).replace("--", "")) from error


def _constraint(param: str, make: Callable[[], Constraint]) -> Constraint:
    try:
        return make()
    except ResourceError as error:
        raise ApiError(501, f"{param}: {error}", param) from error
    except (UserError, ValueError) as error:
        raise refusal(param, str(error)) from error


def _requests(
    models: Models,
    llm: LLM,
    prompts: Sequence[Fitted],
    sampling: Sampling,
    most: int | None,
    param: str,
    *,
    constraint: Constraint | None = None,
    scored: int | None = None,
) -> list[Request]:
    """A request for each prompt.

    Raises:
        ApiError: There are too many answers, or a prompt is empty, or too long with its answer.
    """
    limits, capacity = models.limits, models.capacity(llm)
    if len(prompts) * sampling.n > limits.max_choices:
        found = f"{sampling.n} answers to {len(prompts)} prompts" if len(prompts) > 1 else f"{sampling.n}"
        raise refusal("n", f"asks for {found}, expected at most {limits.max_choices} answers")
    slides = limits.overflow == "drop_oldest" and scored is None
    requests = []
    for number, fitted in enumerate(prompts):
        prompt = fitted.ids
        if not prompt:
            raise refusal(param, "is empty, expected at least one token")
        room = capacity - len(prompt)
        if room < (1 if most is None or slides else most):
            answer = "leaves none for an answer" if most is None or slides else f"and the answer up to {most}"
            raise refusal(
                param,
                f"the prompt has {len(prompt)} tokens {answer}, but the model's maximum context length is {capacity} "
                "tokens; shorten the prompt or the answer",
                "context_length_exceeded",
            )
        own = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room) if most is None else most)
        more = {"overflow": "drop_oldest", "keep": fitted.keep} if slides else {}
        requests.append(llm.request(prompt, own, number=number, constraint=constraint, prompt_logprobs=scored, **more))
    return requests

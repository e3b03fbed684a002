"""The fields of a request that the engine would take and that are not served, each with its reason.

Only what lets one client harm the others: end the engine that they share, hold its memory or its time unseen, or send
it to other machines. All else is the engine's to check. Knows the fields of vLLM 0.32, and that its types are lax.
"""

from collections.abc import Callable, Mapping
from typing import Any

from serving.protocols.grammar_limits import find_excessive_grammar
from serving.protocols.refusal import Refusal
from serving.protocols.route import Route

MOST_ANSWERS = 1024
"""Answers to one request, however short; admission limits their tokens. vLLM's own limit on the prompts of one request
is the same; its limit on `n` is 16,384, for each of them."""

Fields = Mapping[str, Any]

_ENDS_ENGINE = "they can end the engine, which other clients share"
_TRANSFER = {
    name: Refusal(name, f"'{name}' is not supported: it makes an engine read memory of another one")
    for name in ("kv_transfer_params", "ec_transfer_params")
}
"""These name a host that the engine takes memory blocks from, or keep blocks after the answer until one comes for
them; `kv_transfer_params` in `vllm_xargs` make vLLM fail on an assertion."""
_PROMPT_LOGPROBS = {
    "prompt_logprobs": Refusal("prompt_logprobs", f"log-probabilities of the prompt are not served: {_ENDS_ENGINE}")
}
"""vLLM scores the whole prompt for these, which can exhaust or end an engine."""
_ECHO = {
    "echo": Refusal(
        "echo", f"'echo' is not served for chat, because it asks for log-probabilities of the prompt: {_ENDS_ENGINE}"
    )
}
"""In chat, vLLM's `top_logprobs` is 0 by default, which is enough to score the prompt."""
_PRIORITY = {"priority": Refusal("priority", "'priority' is not served: the server decides who is next")}
"""An engine with `--scheduling-policy priority` lets a client that sets it go before all others, and stops their
answers for it; another one refuses it."""
_MEDIA_OPTIONS = {
    name: Refusal(name, f"'{name}' is not supported: only text content is served")
    for name in ("mm_processor_kwargs", "media_io_kwargs")
}
_STORED = {
    "background": Refusal("background", "answers in the background are not served", "false", "wait for the answer"),
    "store": Refusal("store", "responses are not kept here", "false", "leave it out, and send all turns each time"),
    **{
        name: Refusal(name, "responses are not kept here", todo="send all turns in 'input'")
        for name in ("previous_response_id", "conversation")
    },
}
"""vLLM's store of responses never forgets any, and an answer in the background has no client: it would hold no place,
and no swap would know of it."""
_UNSUPPORTED: Mapping[Route, Mapping[str, Refusal]] = {
    # vLLM has no `echo` and no `n` in responses and messages, and passes over what it does not know.
    Route.CHAT_COMPLETIONS: _PROMPT_LOGPROBS | _ECHO | _TRANSFER | _PRIORITY | _MEDIA_OPTIONS,
    Route.COMPLETIONS: _PROMPT_LOGPROBS | _TRANSFER | _PRIORITY,
    Route.RESPONSES: _PROMPT_LOGPROBS | _TRANSFER | _STORED | _PRIORITY | _MEDIA_OPTIONS,
    Route.MESSAGES: _PROMPT_LOGPROBS | _TRANSFER | _MEDIA_OPTIONS,
}
_SWITCHES = frozenset({"echo", "priority", "background", "store"})
"""Fields that ask for nothing when they are false, 0 or null; the others, when they are null."""


def find_refusal(fields: Fields, route: Route) -> Refusal | None:
    """Return the first reason not to serve a request; None where there is none."""
    unsupported = _UNSUPPORTED[route]
    for name in filter(unsupported.__contains__, fields):
        value = fields[name]
        if value if name in _SWITCHES else value is not None:
            return unsupported[name]
    return next((refusal for check in _CHECKS[route] if (refusal := check(fields))), None)


def _transfer_in_xargs(fields: Fields) -> Refusal | None:
    extra = fields.get("vllm_xargs")
    named = next((name for name in _TRANSFER if name in extra), None) if isinstance(extra, dict) else None
    return Refusal(f"vllm_xargs.{named}", _TRANSFER[named].wrong) if named else None


def _echo_with_logprobs(fields: Fields) -> Refusal | None:
    if not fields.get("echo") or fields.get("logprobs") is None:
        return None
    wrong = f"'echo' with 'logprobs' asks for log-probabilities of the prompt, which are not served: {_ENDS_ENGINE}"
    return Refusal("echo", wrong, todo="ask for one of the two")


_TEXT_PARTS = frozenset(
    {
        *("text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text"),
        *("thinking", "redacted_thinking", "tool_use", "tool_result"),
        *("tool_reference", "tool_addition", "tool_removal"),
    }
)
_MEDIA_KEYS = frozenset(
    {
        *("image_url", "input_image", "image_pil", "image_embeds", "audio_url", "input_audio", "audio_embeds"),
        *("video_url", "video_embeds", "prompt_embeds"),
    }
)
"""What vLLM takes for media in a part without a type, or with a `uuid`."""
_TURNS = (("messages", ("content",)), ("input", ("content", "output")))


def _media(fields: Fields) -> Refusal | None:
    """For a model that takes media, vLLM fetches the address of an image, a sound or a film: also one of this machine,
    or of a network that the client does not reach. Any other model refuses them itself."""
    for name, keys in _TURNS:
        turns = fields.get(name)
        for number, turn in enumerate(turns if isinstance(turns, list) else ()):
            for key in keys if isinstance(turn, dict) else ():
                # Most content is a text, and no list.
                if isinstance(content := turn.get(key), list) and not _all_text(content):
                    return _no_text(f"{name}.{number}.{key}")
    return None if _all_text(fields.get("system")) else _no_text("system")


def _no_text(param: str) -> Refusal:
    return Refusal(param, "content other than text is not served", "parts of text alone", "send what they say as text")


def _all_text(content: Any) -> bool:
    """Return whether every part of the content is text; the engine rejects malformed parts."""
    return not isinstance(content, list) or all(_is_text(part) for part in content if isinstance(part, dict))


def _is_text(part: Fields) -> bool:
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS or _MEDIA_KEYS & part.keys():
        return False
    return _all_text(part.get("content"))  # of the result of a tool


def _many_answers(fields: Fields) -> Refusal | None:
    each = fields.get("n")
    if each is None:
        each = 1
    if type(each) is not int:
        return Refusal("n", "'n' is no integer", "an integer", "")  # the engine would also take "2" and 2.0
    if each * _count_prompts(fields.get("prompt")) > MOST_ANSWERS:
        return Refusal("n", "too many answers in one request", f"'n' times prompts at most {MOST_ANSWERS}", "")
    return None


_SEVERAL = frozenset({Route.CHAT_COMPLETIONS, Route.COMPLETIONS})


def count_answers(fields: Fields, route: Route) -> int:
    """Return how many answers a request asks for; of one that `find_refusal` passes."""
    if route not in _SEVERAL:
        return 1
    return max(1, fields.get("n") or 1) * max(1, _count_prompts(fields.get("prompt")))


def _count_prompts(prompt: Any) -> int:
    """Return the number of prompts in one request; a list of numbers is one, of token ids."""
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return len(prompt) if several else 1


_CHECKS: Mapping[Route, tuple[Callable[[Fields], Refusal | None], ...]] = {
    Route.CHAT_COMPLETIONS: (_transfer_in_xargs, _many_answers, _media, find_excessive_grammar),
    Route.COMPLETIONS: (_transfer_in_xargs, _echo_with_logprobs, _many_answers, find_excessive_grammar),
    Route.RESPONSES: (_transfer_in_xargs, _media, find_excessive_grammar),
    Route.MESSAGES: (_transfer_in_xargs, _media, find_excessive_grammar),
}

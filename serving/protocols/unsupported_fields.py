"""Request fields that the engine would accept but the gateway rejects, each with the reason.

The list contains only fields that let one client harm other clients: by crashing the shared engine, using its memory or
time without being counted, or making it contact other machines. The engine checks all other fields. The list is based
on the fields of vLLM 0.32, whose type checks are lax.
"""

from collections.abc import Callable, Mapping
from typing import Any

from serving.protocols.grammar_limits import find_excessive_grammar
from serving.protocols.refusal import Refusal
from serving.protocols.route import Route

MAX_ANSWERS = 1024
"""Maximum number of answers to one request, regardless of their length; admission limits their tokens. vLLM has
the same limit on the number of prompts in one request, while its limit on `n` is 16,384 for each prompt."""

Fields = Mapping[str, Any]

_ENDS_ENGINE = "computing them can crash the engine, which other clients share"
_TRANSFER = {
    name: Refusal(name, f"'{name}' is not supported, because it makes an engine read another engine's memory")
    for name in ("kv_transfer_params", "ec_transfer_params")
}
"""Fields that make an engine fetch cached blocks from a host that the request names, or keep its own blocks after the
answer until another engine has fetched them. `kv_transfer_params` in `vllm_xargs` causes an assertion failure in
vLLM."""
_PROMPT_LOGPROBS = {
    "prompt_logprobs": Refusal(
        "prompt_logprobs", f"log-probabilities of the prompt are not supported, because {_ENDS_ENGINE}"
    )
}
"""Fields that make vLLM score the whole prompt, which can exhaust or crash an engine."""
_ECHO = {
    "echo": Refusal(
        "echo",
        f"'echo' is not supported for chat, because it requests the prompt's log-probabilities, and {_ENDS_ENGINE}",
    )
}
"""`echo` is rejected for chat, where vLLM's `top_logprobs` defaults to 0. This default is enough for `echo` to make
vLLM score the prompt."""
_PRIORITY = {
    "priority": Refusal("priority", "'priority' is not supported, because the server decides the order of requests")
}
"""On an engine with `--scheduling-policy priority`, a client that sets this field can preempt the answers of all other
clients. Other engines reject the field."""
_MEDIA_OPTIONS = {
    name: Refusal(name, f"'{name}' is not supported, because only text content is served")
    for name in ("mm_processor_kwargs", "media_io_kwargs")
}
_STORED = {
    "background": Refusal("background", "background responses are not supported", "false", "wait for the response"),
    "store": Refusal(
        "store", "responses are not stored here", "false", "omit 'store', and send all turns with each request"
    ),
    **{
        name: Refusal(name, "responses are not stored here", todo="send all turns in 'input'")
        for name in ("previous_response_id", "conversation")
    },
}
"""Fields for stored and background responses. vLLM never deletes stored responses. A background answer has no
client, so it would hold no admission slot and swaps would not wait for it."""
_UNSUPPORTED: Mapping[Route, Mapping[str, Refusal]] = {
    # In responses and messages vLLM has no `echo` and no `n`; it ignores unknown fields.
    Route.CHAT_COMPLETIONS: _PROMPT_LOGPROBS | _ECHO | _TRANSFER | _PRIORITY | _MEDIA_OPTIONS,
    Route.COMPLETIONS: _PROMPT_LOGPROBS | _TRANSFER | _PRIORITY,
    Route.RESPONSES: _PROMPT_LOGPROBS | _TRANSFER | _STORED | _PRIORITY | _MEDIA_OPTIONS,
    Route.MESSAGES: _PROMPT_LOGPROBS | _TRANSFER | _MEDIA_OPTIONS,
}
_SWITCHES = frozenset({"echo", "priority", "background", "store"})
"""Fields that have no effect if they are false, 0 or null. All other fields have no effect only if they are null."""


def find_refusal(fields: Fields, route: Route) -> Refusal | None:
    """Return a refusal for the first unsupported field in a request, or None if there is none."""
    unsupported = _UNSUPPORTED[route]
    for name in filter(unsupported.__contains__, fields):
        value = fields[name]
        if value if name in _SWITCHES else value is not None:
            return unsupported[name]
    return next((refusal for check in _CHECKS[route] if (refusal := check(fields))), None)


def _transfer_in_xargs(fields: Fields) -> Refusal | None:
    extra = fields.get("vllm_xargs")
    param = next((name for name in _TRANSFER if name in extra), None) if isinstance(extra, dict) else None
    return Refusal(f"vllm_xargs.{param}", _TRANSFER[param].wrong) if param else None


def _echo_with_logprobs(fields: Fields) -> Refusal | None:
    if not fields.get("echo") or fields.get("logprobs") is None:
        return None
    wrong = (
        "'echo' with 'logprobs' requests the prompt's log-probabilities, which are not supported, because "
        f"{_ENDS_ENGINE}"
    )
    return Refusal("echo", wrong, todo="send either 'echo' or 'logprobs', not both")


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
"""Keys that make vLLM treat a content part as media if the part has no type, or has a `uuid`."""
_TURNS = (("messages", ("content",)), ("input", ("content", "output")))


def _media(fields: Fields) -> Refusal | None:
    """Return a refusal if a request contains media.

    For a multimodal model, vLLM fetches the URL of an image, audio or video, even if the URL points to this machine
    or to a network that the client cannot reach. For other models, vLLM itself rejects media.
    """
    for name, keys in _TURNS:
        turns = fields.get(name)
        for number, turn in enumerate(turns if isinstance(turns, list) else ()):
            for key in keys if isinstance(turn, dict) else ():
                # Most content is a string, not a list.
                if isinstance(content := turn.get(key), list) and not _all_text(content):
                    return _no_text(f"{name}.{number}.{key}")
    return None if _all_text(fields.get("system")) else _no_text("system")


def _no_text(param: str) -> Refusal:
    return Refusal(param, "only text content is supported", "text parts only", "send the content as text")


def _all_text(content: Any) -> bool:
    """Return whether all parts of a message's content are text. The engine rejects malformed parts itself."""
    return not isinstance(content, list) or all(_is_text(part) for part in content if isinstance(part, dict))


def _is_text(part: Fields) -> bool:
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS or _MEDIA_KEYS & part.keys():
        return False
    return _all_text(part.get("content"))  # of a tool's result


def _many_answers(fields: Fields) -> Refusal | None:
    each = fields.get("n")
    if each is None:
        each = 1
    if type(each) is not int:
        return Refusal("n", "'n' is not an integer", "an integer", "")  # the engine would also take "2" and 2.0
    if each * _count_prompts(fields.get("prompt")) > MAX_ANSWERS:
        return Refusal(
            "n", "too many answers in one request", f"at most {MAX_ANSWERS} for 'n' times the number of prompts", ""
        )
    return None


_SEVERAL = frozenset({Route.CHAT_COMPLETIONS, Route.COMPLETIONS})


def count_answers(fields: Fields, route: Route) -> int:
    """Return the number of answers that a client requests. Call this only if `find_refusal` returned None."""
    if route not in _SEVERAL:
        return 1
    return max(1, fields.get("n") or 1) * max(1, _count_prompts(fields.get("prompt")))


def _count_prompts(prompt: Any) -> int:
    """Return the number of prompts in one request. A list of numbers is a single prompt of token ids."""
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return len(prompt) if several else 1


_CHECKS: Mapping[Route, tuple[Callable[[Fields], Refusal | None], ...]] = {
    Route.CHAT_COMPLETIONS: (_transfer_in_xargs, _many_answers, _media, find_excessive_grammar),
    Route.COMPLETIONS: (_transfer_in_xargs, _echo_with_logprobs, _many_answers, find_excessive_grammar),
    Route.RESPONSES: (_transfer_in_xargs, _media, find_excessive_grammar),
    Route.MESSAGES: (_transfer_in_xargs, _media, find_excessive_grammar),
}

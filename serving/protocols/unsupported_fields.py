"""The fields of a request that the engine would take and that are not served, each with its reason.

Only what lets one client harm the others: end the engine that they share, hold its memory or its time unseen, or send
it to other machines. All else is the engine's to check. Knows the fields of vLLM 0.32, and that its types are lax.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from serving.protocols.grammar_limits import excess, objects
from serving.protocols.refusal import Refusal
from serving.protocols.route import Route

MOST_ANSWERS = 1024
"""Answers to one request, however short; admission limits their tokens. vLLM's own limit on the prompts of one request
is the same; its limit on `n` is 16,384, for each of them."""

Fields = Mapping[str, Any]


def find_refusal(fields: Fields, route: Route) -> Refusal | None:
    """The first reason not to serve a request; None where there is none."""
    for check in CHECKS[route] if not _RARE.isdisjoint(fields) else _ALWAYS[route]:
        if not check.names.isdisjoint(fields) and (refusal := check.look(fields)):
            return refusal
    return None


_ENDS_ENGINE = "they can end the engine, which other clients share"


def _prompt_logprobs(fields: Fields) -> Refusal | None:
    """vLLM scores the whole prompt for these, which can exhaust or end an engine."""
    if fields.get("prompt_logprobs") is None:
        return None
    return Refusal("prompt_logprobs", f"log-probabilities of the prompt are not served: {_ENDS_ENGINE}")


def _echo_of_chat(fields: Fields) -> Refusal | None:
    """There vLLM's `top_logprobs` is 0 by default, which is enough to score the prompt."""
    if not fields.get("echo"):
        return None
    wrong = f"'echo' is not served for chat, because it asks for log-probabilities of the prompt: {_ENDS_ENGINE}"
    return Refusal("echo", wrong)


def _echo_with_logprobs(fields: Fields) -> Refusal | None:
    if not fields.get("echo") or fields.get("logprobs") is None:
        return None
    wrong = f"'echo' with 'logprobs' asks for log-probabilities of the prompt, which are not served: {_ENDS_ENGINE}"
    return Refusal("echo", wrong, todo="ask for one of the two")


def _transfer(fields: Fields) -> Refusal | None:
    """These name a host that the engine takes memory blocks from, or keep blocks after the answer until one comes for
    them; `kv_transfer_params` in `vllm_xargs` make vLLM fail on an assertion."""
    extra = fields.get("vllm_xargs")
    for name in ("kv_transfer_params", "ec_transfer_params"):
        inside = isinstance(extra, dict) and name in extra
        if inside or fields.get(name) is not None:
            wrong = f"'{name}' is not served: it is between engines, and says where one takes its memory from"
            return Refusal(f"vllm_xargs.{name}" if inside else name, wrong)
    return None


def _kept_responses(fields: Fields) -> Refusal | None:
    """vLLM's store of responses never forgets any, and an answer in the background has no client: it would hold no
    place, and no swap would know of it."""
    if fields.get("background"):
        return Refusal("background", "answers in the background are not served", "false", "wait for the answer")
    if fields.get("store"):
        return Refusal("store", "responses are not kept here", "false", "leave it out, and send all turns each time")
    for name in ("previous_response_id", "conversation"):
        if fields.get(name) is not None:
            return Refusal(name, "responses are not kept here", todo="send all turns in 'input'")
    return None


def _priority(fields: Fields) -> Refusal | None:
    """An engine with `--scheduling-policy priority` lets who sets it go before all others, and stops their answers for
    it; another one refuses it."""
    if fields.get("priority") in (None, 0):
        return None
    return Refusal("priority", "'priority' is not served: the server decides who is next")


_TEXT_PARTS = frozenset(
    {
        *("text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text"),
        *(
            "thinking",
            "redacted_thinking",
            "tool_use",
            "tool_result",
            "tool_reference",
            "tool_addition",
            "tool_removal",
        ),
    }
)
_MEDIA_KEYS = frozenset(
    {
        *("image_url", "input_image", "image_pil", "image_embeds", "audio_url", "input_audio", "audio_embeds"),
        *("video_url", "video_embeds", "prompt_embeds"),
    }
)
"""What vLLM takes for media in a part without a type, or with a `uuid`."""


_MEDIA_OPTIONS = ("mm_processor_kwargs", "media_io_kwargs")
_TURNS = (("messages", ("content",)), ("input", ("content", "output")))


def _media(fields: Fields) -> Refusal | None:
    """For a model that takes media, vLLM fetches the address of an image, a sound or a film: also one of this machine,
    or of a network that the client does not reach. Any other model refuses them itself."""
    for name in _MEDIA_OPTIONS:
        if fields.get(name) is not None:
            return Refusal(name, f"'{name}' is not served: there is no content but text")
    for name, keys in _TURNS:
        turns = fields.get(name)
        if not isinstance(turns, list):
            continue
        for number, turn in enumerate(turns):
            for key in keys if isinstance(turn, dict) else ():
                # Most content is a text, and no list.
                if isinstance(content := turn.get(key), list) and not _all_text(content):
                    return _no_text(f"{name}.{number}.{key}")
    return None if _all_text(fields.get("system")) else _no_text("system")


def _no_text(param: str) -> Refusal:
    return Refusal(param, "content other than text is not served", "parts of text alone", "send what they say as text")


def _all_text(content: Any) -> bool:
    """Whether content has no part that is no text; what is no part at all is the engine's to refuse."""
    if not isinstance(content, list):
        return True
    return all(_is_text(part) for part in content if isinstance(part, dict))


def _is_text(part: Fields) -> bool:
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS or _MEDIA_KEYS & part.keys():
        return False
    return _all_text(part.get("content"))  # of the result of a tool


def _grammars(fields: Fields) -> Refusal | None:
    """See serving.protocols.grammar_limits."""
    grammars = {param: grammar for param, grammar in _all_grammars(fields) if grammar is not None}
    if not grammars or not (limit := excess([*grammars.values()])):
        return None
    param = next((param for param, grammar in grammars.items() if excess([grammar])), next(iter(grammars)))
    return Refusal(param, f"'{param}' would keep the engine busy, which other clients share", limit, "make it simpler")


def _all_grammars(fields: Fields) -> Iterator[tuple[str, Any]]:
    """Every field that vLLM makes a grammar of, on whichever route."""
    for name in ("response_format", "structured_outputs"):
        yield name, fields.get(name)
    for name in ("text", "output_config"):  # of responses, of messages
        outer = fields.get(name)
        yield f"{name}.format", outer.get("format") if isinstance(outer, dict) else None
    tools = fields.get("tools")
    if isinstance(tools, list) and (
        _is_forced(fields.get("tool_choice")) or any(one.get("strict") for one in objects(tools, read=False))
    ):
        yield "tools", tools


def _is_forced(choice: Any) -> bool:
    kind = choice.get("type") if isinstance(choice, dict) else choice
    return kind not in (None, "auto", "none")


def _many_answers(fields: Fields) -> Refusal | None:
    each = fields.get("n")
    if each is None:
        each = 1
    if isinstance(each, bool) or not isinstance(each, int):
        return Refusal("n", "'n' is no integer", "an integer", "")  # the engine would also take "2" and 2.0
    if each * _count_prompts(fields.get("prompt")) > MOST_ANSWERS:
        return Refusal("n", "too many answers in one request", f"'n' times prompts at most {MOST_ANSWERS}", "")
    return None


def count_answers(fields: Fields, route: Route) -> int:
    """How many answers a request asks for; of one that `find_refusal` passes."""
    if route not in _SEVERAL:
        return 1
    return max(1, fields.get("n") or 1) * max(1, _count_prompts(fields.get("prompt")))


def _count_prompts(prompt: Any) -> int:
    """Prompts in one request; a list of numbers is one, of token ids."""
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    return len(prompt) if several else 1


class Check(NamedTuple):
    """One reason not to serve requests.

    Attributes:
        names: the fields that it looks at; without any of them there is nothing to look at.
    """

    names: frozenset[str]
    look: Callable[[Fields], Refusal | None]


_PROMPT_LOGPROBS = Check(frozenset({"prompt_logprobs"}), _prompt_logprobs)
_ECHO_OF_CHAT = Check(frozenset({"echo"}), _echo_of_chat)
_ECHO_WITH_LOGPROBS = Check(frozenset({"echo"}), _echo_with_logprobs)
_TRANSFER = Check(frozenset({"vllm_xargs", "kv_transfer_params", "ec_transfer_params"}), _transfer)
_KEPT_RESPONSES = Check(frozenset({"background", "store", "previous_response_id", "conversation"}), _kept_responses)
_PRIORITY = Check(frozenset({"priority"}), _priority)
_MANY_ANSWERS = Check(frozenset({"n", "prompt"}), _many_answers)
_MEDIA = Check(frozenset({"mm_processor_kwargs", "media_io_kwargs", "messages", "input", "system"}), _media)
_GRAMMARS = Check(frozenset({"response_format", "structured_outputs", "text", "output_config", "tools"}), _grammars)

_SEVERAL = frozenset({Route.CHAT_COMPLETIONS, Route.COMPLETIONS})
CHECKS: Mapping[Route, tuple[Check, ...]] = {
    Route.CHAT_COMPLETIONS: (
        *(_PROMPT_LOGPROBS, _ECHO_OF_CHAT, _TRANSFER, _MANY_ANSWERS, _PRIORITY, _MEDIA, _GRAMMARS),
    ),
    Route.COMPLETIONS: (_PROMPT_LOGPROBS, _ECHO_WITH_LOGPROBS, _TRANSFER, _MANY_ANSWERS, _PRIORITY, _GRAMMARS),
    # vLLM has no `echo` and no `n` there, and passes over what it does not know.
    Route.RESPONSES: (_PROMPT_LOGPROBS, _TRANSFER, _KEPT_RESPONSES, _PRIORITY, _MEDIA, _GRAMMARS),
    Route.MESSAGES: (_PROMPT_LOGPROBS, _TRANSFER, _MEDIA, _GRAMMARS),
}
_ALWAYS: Mapping[Route, tuple[Check, ...]] = {
    route: tuple(check for check in checks if check is _MEDIA) for route, checks in CHECKS.items()
}
_RARE = frozenset().union(*(check.names for checks in CHECKS.values() for check in checks if check is not _MEDIA))
"""Where a request has none of these, one check is left to make."""

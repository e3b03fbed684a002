"""A small test double for vLLM's HTTP interface, for tests of the layers in front of it.

Its answers depend, token by token, on the weights folder it holds, so that an answer mixing two versions
can be recognized. Like vLLM, it dies when a reload fails, answers from a stale prefix cache until the
cache is reset, and does not reset the cache while requests are running. It applies adapters to its
weights and answers as the merged weights of the same version would. While asleep, it reports that it is
healthy and delays completions until it is awake.
"""

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample
from tests.serving.socket_server import SocketServer, running
from tests.serving.vllm_wire import CompletionsWire, Counts, Wire, wire_of

DEAD_MESSAGE = "EngineCore encountered an issue. See stack trace (above) for the root cause."
EVENT_STREAM = "text/event-stream; charset=utf-8"
END_TOKEN = "<|im_end|>"


class Fault(Enum):
    """Fault that occurs in the next completions."""

    NONE = auto()
    DIE_BEFORE_ANSWER = auto()
    DIE_IN_STREAM = auto()
    """The engine dies after the second token."""
    END_WITHOUT_DONE = auto()
    ERROR_IN_STREAM = auto()
    """The engine fails on this request but stays alive."""
    DEATH_AT_ONCE_IN_STREAM = auto()
    """The engine reports its own death as the first event."""
    SILENCE = auto()
    """The engine sends nothing after the second token of a stream, and nothing at all without streaming."""


def _set_event() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass
class EngineDouble:
    """An ASGI application that responds as an engine would.

    Attributes:
        weights: folder that the double "holds".
        name: name of its single model.
        tokens: length of an answer in tokens.
        token_delay_s: seconds per token.
        delayed: number of tokens that were waited for.
        proceed: event for which all answers except those to probes wait before their first token.
        tokenize_delay_s: seconds to count the tokens of a prompt.
        linger_s: seconds between the last event of a stream and its end.
        max_model_len: length of the longest prompt, in words.
        finish_reason: finish reason of a non-streamed answer; `stop` for one more token, which is not in the
            answer's text, if the request's limit allows it.
        fault: fault that occurs in the next completions.
        message: fields of a chat message in addition to, or instead of, its text, such as tool calls or
            other content.
        refuse_with: (status, error) returned instead of every completion and token count.
        loadable: returns whether a reload of a folder works; if it does not, the double dies.
        reload_delay_s: seconds for a reload.
        probe_noise: nats added to all log-probabilities.
        label: returns the name that answers use for a weights folder.
        stuck_resets: number of prefix cache resets that fail, as while an aborted request holds blocks.
        metrics: metrics page of the double.
        on_call: called with the path of each request before the double responds.
        requests: bodies of the received completion requests.
        heads: headers of the received completion requests.
        calls: paths of all requests, in order.
        cancelled: number of completions whose client disconnected.
        running: number of running completions.
        adapters: folders of the loaded adapters, keyed by name.
        most_adapters: largest number of adapters loaded at the same time.
        adapter_loads: folders of all adapter loads, in order.
        adapter_delay_s: seconds for an adapter load.
        broken_adapters: path endings of the adapter folders that it rejects.
        dropped_in_use: adapters that were unloaded while one of their answers was running.
        asleep: whether the double has freed its GPU.
        sleepless, wakeless: whether falling asleep, or waking, fails with an error.
        wakes_with: folder that it "holds" after the next wake, or None for the previous folder.
    """

    weights: str = "/models/tuned/1"
    name: str = "tuned"
    tokens: int = 4
    token_delay_s: float = 0.0
    delayed: int = 0
    proceed: asyncio.Event = field(default_factory=_set_event)
    tokenize_delay_s: float = 0.0
    linger_s: float = 0.0
    max_model_len: int = 1000
    finish_reason: str = "length"
    fault: Fault = Fault.NONE
    message: dict[str, Any] | None = None
    refuse_with: tuple[int, dict[str, Any]] | None = None
    loadable: Callable[[str], bool] = lambda folder: True
    reload_delay_s: float = 0.0
    probe_noise: float = 0.0
    label: Callable[[str], str] = lambda folder: Path(folder).name
    stuck_resets: int = 0
    metrics: str = ""
    on_call: Callable[[str], None] = lambda path: None
    requests: list[dict[str, Any]] = field(default_factory=list)
    heads: list[dict[str, str]] = field(default_factory=list)
    request_ids: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    cancelled: int = 0
    running: int = 0
    adapters: dict[str, str] = field(default_factory=dict)
    most_adapters: int = 0
    adapter_loads: list[str] = field(default_factory=list)
    adapter_delay_s: float = 0.0
    broken_adapters: set[str] = field(default_factory=set)
    dropped_in_use: list[str] = field(default_factory=list)
    asleep: bool = False
    sleepless: bool = False
    wakeless: bool = False
    wakes_with: str | None = None
    dead: bool = False
    die: Callable[[], None] = lambda: None
    """Kills the engine as SIGKILL would. Set by `running_engine`."""
    cached_weights: str = ""
    _in_use: Counter[str] = field(default_factory=Counter)
    _first_use: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cached_weights = self.weights

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        request = Request(scope, receive, send)
        path = request.url.path
        self.calls.append(path)
        self.on_call(path)
        match path:
            case "/health" | "/reset_prefix_cache" | "/version" | "/v1/models":
                await _json(send, 503 if self.dead else 200, self._simple(path))
            case "/metrics":
                await Response(self.metrics, media_type="text/plain")(scope, receive, send)
            case "/sleep":
                await self._sleep(request)
            case "/wake_up":
                await self._wake(send)
            case "/collective_rpc":
                await self._collective_rpc(send, await request.json())
            case "/v1/load_lora_adapter":
                await self._load_adapter(send, await request.json())
            case "/v1/unload_lora_adapter":
                await self._unload_adapter(send, await request.json())
            case "/tokenize" | "/v1/messages/count_tokens":
                await self._tokenize(send, path, await request.json())
            case "/v1/chat/completions" | "/v1/completions" | "/v1/responses" | "/v1/messages":
                await self._completion(request)
            case _:
                await _error(send, 404, "Not Found", kind="NotFound")

    def _simple(self, path: str) -> Any:
        if path == "/reset_prefix_cache":
            if self.running or self.stuck_resets > 0:
                self.stuck_resets -= 1
                return {"success": False}
            self.cached_weights = self.weights
            return {"success": True}
        listed: list[dict[str, Any]] = [{"id": self.name, "object": "model", "parent": None}]
        listed += [{"id": name, "object": "model", "parent": self.name} for name in self.adapters]
        models = {"object": "list", "data": listed}
        return {"/version": {"version": "0.32.0"}, "/v1/models": models}.get(path)

    async def _collective_rpc(self, send: Send, body: dict[str, Any]) -> None:
        assert body["method"] == "reload_weights", body
        await asyncio.sleep(self.reload_delay_s)
        folder = body["kwargs"]["weights_path"]
        if not self.loadable(folder):
            self.dead = True
            await _error(send, 500, DEAD_MESSAGE, kind="InternalServerError")
            self.die()
            return
        self.weights = folder
        await _json(send, 200, {"results": [None]})

    async def _sleep(self, request: Request) -> None:
        assert request.query_params["level"] == "1"
        if self.sleepless:
            await _error(request._send, 500, "CUDA error: out of memory", kind="InternalServerError")
        else:
            self.asleep, self.cached_weights = True, self.weights
            await _json(request._send, 200, {"status": "sleeping", "level": 1})

    async def _wake(self, send: Send) -> None:
        if self.wakeless:
            await _error(send, 500, "CUDA error: out of memory", kind="InternalServerError")
        else:
            self.asleep, self.weights = False, self.wakes_with or self.weights
            await _json(send, 200, {"status": "awake", "tags": None})

    async def _load_adapter(self, send: Send, body: dict[str, Any]) -> None:
        name, folder = body["lora_name"], body["lora_path"]
        await asyncio.sleep(self.adapter_delay_s)
        if name in self.adapters:
            await _error(send, 400, f"The lora adapter '{name}' has already been loaded.", kind="InvalidUserInput")
        elif any(folder.endswith(end) for end in self.broken_adapters):
            await _error(send, 500, f"no adapter in {folder}", kind="InternalServerError")
        else:
            self.adapters[name] = folder
            self._first_use.setdefault(name, folder)
            self.adapter_loads.append(folder)
            self.most_adapters = max(self.most_adapters, len(self.adapters))
            await _json(send, 200, "Success")

    async def _unload_adapter(self, send: Send, body: dict[str, Any]) -> None:
        name = body["lora_name"]
        if self._in_use[name]:
            self.dropped_in_use.append(name)
        if self.adapters.pop(name, None) is None:
            await _error(send, 404, f"The lora adapter '{name}' cannot be found.", kind="NotFoundError")
        else:
            await _json(send, 200, "Success")

    def weights_of(self, model: str) -> str:
        """Return the weights that answer for a model. For an adapter, these are the merged weights of its version.
        A name that is reused gets what the prefix cache contains from its first use.
        """
        if model == self.name:
            return self.weights
        return str(Path(self._first_use[model]).with_name("merged"))

    async def _tokenize(self, send: Send, path: str, body: dict[str, Any]) -> None:
        await asyncio.sleep(self.tokenize_delay_s)
        if self.refuse_with:
            status, error = self.refuse_with
            await _json(send, status, {"error": error})
            return
        if (wrong := _wrong_field(body)) is not None:
            await _error(send, 400, f"no {wrong}", kind="Bad Request", param=f"body.{wrong}")
            return
        turns = body.get("messages") or []
        text = body.get("prompt") or " ".join(str(turn.get("content") or "") for turn in turns)
        tokens = [_token_id(word) for word in str(text).split()]
        count = {"count": len(tokens), "max_model_len": self.max_model_len, "tokens": tokens}
        await _json(send, 200, count if path == "/tokenize" else {"input_tokens": len(tokens)})

    async def _completion(self, request: Request) -> None:
        send = request._send
        body = await request.json()
        self.requests.append(body)
        self.heads.append(dict(request.headers))
        self.request_ids.append(request.headers.get("x-request-id", ""))
        if self.refuse_with:
            status, error = self.refuse_with
            await _json(send, status, {"error": error})
        elif body["model"] not in (self.name, *self.adapters):
            await _error(send, 404, f"The model `{body['model']}` does not exist.", kind="NotFoundError")
        elif (wrong := _wrong_field(body)) is not None:
            message = f"1 validation error:\n  {{'loc': 'body.{wrong}', 'msg': 'Input should be valid'}}"
            await _error(send, 400, message, kind="Bad Request", param=f"body.{wrong}")
        elif (length := _prompt_length(body)) > self.max_model_len:
            message = (
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{length} input tokens. (parameter=input_tokens, value={length})"
            )
            if request.url.path == "/v1/messages":
                error = {"type": "BadRequestError", "message": message}
                await _json(send, 400, {"type": "error", "error": error})
            else:
                await _error(send, 400, message, kind="BadRequestError", param="input_tokens")
        else:
            await self._run_until_disconnect(request, body)

    async def _run_until_disconnect(self, request: Request, body: dict[str, Any]) -> None:
        self.running += 1
        self._in_use[body["model"]] += 1
        wire = wire_of(request.url.path, body["model"], body)
        work = asyncio.create_task(self._answer(request._send, body, wire))
        leaving = asyncio.create_task(_gone(request.receive))
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.cancelled += 1
        finally:
            work.cancel()
            leaving.cancel()
            await asyncio.wait((work, leaving))
            self.running -= 1
            self._in_use[body["model"]] -= 1
        if not work.cancelled():
            work.result()

    async def _answer(self, send: Send, body: dict[str, Any], wire: Wire) -> None:
        while self.asleep:
            await asyncio.sleep(0.01)
        if self.fault is Fault.DIE_BEFORE_ANSWER:
            self.die()
            await asyncio.sleep(3600)
        if body.get("stream"):
            await self._stream(send, body, wire)
            return
        if self.fault is Fault.SILENCE:
            await asyncio.sleep(3600)
        words = [word async for word in self._words(body)]
        counts = self._counts(body)
        reason = self._finish_reason(body)
        counts = Counts(counts.prompt, len(_ended(words, reason)))
        answer = wire.whole(words, counts, reason)
        for choice in answer.get("choices", ()):
            if isinstance(wire, CompletionsWire) and wire.wants_logprobs:
                ended = _ended(words, reason)
                choice["logprobs"] = wire.logprobs(ended, self._logprobs(ended, _prompt_length(body), body["model"]))
            if body.get("return_token_ids"):
                choice["token_ids"] = [_token_id(word.strip()) for word in _ended(words, reason)]
            if self.message and "message" in choice:
                choice["message"] |= self.message
            if body.get("prompt_logprobs") is not None:
                choice["prompt_logprobs"] = self.prompt_logprobs(body["prompt"], body["model"])
        await _json(send, 200, answer)

    async def _stream(self, send: Send, body: dict[str, Any], wire: Wire) -> None:
        headers = [(b"content-type", EVENT_STREAM.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        counts, words = self._counts(body), list[str]()
        if self.fault is Fault.DEATH_AT_ONCE_IN_STREAM:
            self.dead = True
            await _events(send, wire.failure(DEAD_MESSAGE))
        else:
            await _events(send, wire.opening(counts))
        async for word in self._words(body):
            words.append(word)
            reason = "length" if len(words) == counts.completion else None
            (logprob,) = self._logprobs([word], counts.prompt + len(words) - 1, body["model"])
            await _events(send, [wire.token(word, reason, logprob)])
            if len(words) == 2 and await self._fails_in_stream(send, wire):
                return
        await _events(send, wire.closing(words, counts))
        await asyncio.sleep(self.linger_s)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fails_in_stream(self, send: Send, wire: Wire) -> bool:
        match self.fault:
            case Fault.DIE_IN_STREAM:
                self.die()
            case Fault.SILENCE:
                await asyncio.sleep(3600)
            case Fault.ERROR_IN_STREAM:
                events = wire.failure("no room in /root/secret/cache.bin")
                if not events:
                    raise RuntimeError("the connection is cut")
                await _events(send, events)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            case Fault.END_WITHOUT_DONE:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
            case _:
                return False
        return True

    async def _words(self, body: dict[str, Any]) -> AsyncIterator[str]:
        if body.get("prompt_logprobs") is None:
            await self.proceed.wait()
        for index in range(self._counts(body).completion):
            if self.token_delay_s:
                self.delayed += 1
                await asyncio.sleep(self.token_delay_s)
            # Asked for each token: weights that change under a running answer show in it.
            stale = "" if self.cached_weights == self.weights else "stale-"
            yield f"{stale}{self.label(self.weights_of(body['model']))}.{index} "

    def _counts(self, body: dict[str, Any]) -> Counts:
        longest = body.get("max_tokens") or body.get("max_output_tokens") or self.tokens
        return Counts(_prompt_length(body), min(longest, self.tokens))

    def _logprobs(self, words: list[str], start: int, model: str) -> list[float]:
        """Return the log-probabilities of an answer's tokens. Scoring its text as a prompt gives the same ones."""
        weights = self.weights_of(model)
        return [
            logprob_of(weights, _token_id(word.strip()), at) + self.probe_noise
            for at, word in enumerate(words, start=start)
        ]

    def _finish_reason(self, body: dict[str, Any]) -> str:
        longest = body.get("max_tokens") or body.get("max_output_tokens")
        cut = self.finish_reason == "stop" and longest and longest <= self.tokens
        return "length" if cut else self.finish_reason

    def prompt_logprobs(self, prompt: list[int], model: str) -> list[dict[str, Any] | None]:
        weights = self.weights_of(model)
        first: list[dict[str, Any] | None] = [None]
        return first + [
            {str(token): {"logprob": logprob_of(weights, token, position) + self.probe_noise, "rank": 1}}
            for position, token in enumerate(prompt[1:], start=1)
        ]


def logprob_of(weights: str, token: int, position: int) -> float:
    """Return the double's log-probability for a token, between -10 and 0."""
    digest = hashlib.sha256(f"{weights}|{token}|{position}".encode()).digest()
    return -10 * int.from_bytes(digest[:4], "big") / 2**32


@asynccontextmanager
async def running_engine(double: EngineDouble, socket: Path) -> AsyncIterator[SocketServer]:
    """Run a double on a socket while the context is active. It can be killed and restarted as another engine."""
    async with running(double, socket) as server:

        def die() -> None:
            double.dead = True
            server.kill()

        double.die = die
        yield server


def tokenized(example: ChatExample) -> TokenizedExample:
    """Return an example tokenized as in training, using the double's tokens."""
    prompt = [_token_id(word) for message in example.prompt for word in message.content.split()]
    ids = (*prompt, *(_token_id(word) for word in [*example.answer.split(), END_TOKEN]))
    return TokenizedExample(ids, ((len(prompt), len(ids)),))


def _token_id(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:2], "big")


def _wrong_field(body: dict[str, Any]) -> str | None:
    """Return the name of the first field that has a type vLLM rejects, or None."""
    turns = body.get("messages", body.get("input"))
    if isinstance(turns, list) and not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        return "messages" if "messages" in body else "input"
    for name in ("max_tokens", "max_output_tokens"):
        if body.get(name) is not None and (type(body[name]) is not int or body[name] < 1):
            return name
    known = {"messages": list, "input": str | list, "prompt": str | list}
    given = [name for name in known if isinstance(body.get(name), known[name])]
    return None if given else "messages"


def _ended(words: list[str], reason: str) -> list[str]:
    """Append the end token to an answer that ended by itself."""
    return [*words, END_TOKEN] if reason == "stop" else words


def _prompt_length(body: dict[str, Any]) -> int:
    prompt = body.get("messages", body.get("prompt") or body.get("input") or "")
    if not isinstance(prompt, list):
        return len(str(prompt).split())
    return sum(len(str(turn.get("content") or "").split()) if isinstance(turn, dict) else 1 for turn in prompt)


async def _gone(receive: Receive) -> None:
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except ClientDisconnect:
        pass


async def _json(send: Send, status: int, content: Any) -> None:
    body = b"" if content is None else json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _error(send: Send, status: int, message: str, *, kind: str, param: str | None = None) -> None:
    await _json(send, status, {"error": {"message": message, "type": kind, "param": param, "code": status}})


async def _events(send: Send, events: list[bytes]) -> None:
    for event in events:
        await send({"type": "http.response.body", "body": event, "more_body": True})

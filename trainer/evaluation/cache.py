"""Caches models' answers, so that no model answers the same example twice in training, sweeps and comparisons.

The cache file contains one line of JSON per example.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from svc.dataset.schema.example import ChatExample, any_call_tools
from svc.engine.device import DeviceCapabilities
from svc.engine.probes import engine_facts
from svc.evaluation.results import ExampleResult
from svc.files.disk import write_whole
from svc.model_folder.chat_template import TemplateKwargs
from svc.settings.settings import Settings
from trainer.data.fingerprint import fingerprint

log = logging.getLogger(__name__)
KnownResults = dict[tuple[str, int], ExampleResult]
"""Results keyed by the example's cache key and the answer's token limit."""


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    example: str
    result: ExampleResult


class EvaluationCache:
    """Cached evaluation results of a model under a given set of conditions.

    Args:
        folder: folder with the caches of all models. It is created when the first result is added.
        conditions: everything that affects the answers except for their token limits, such as the weights and the kind
            of engine.
    """

    def __init__(self, folder: Path, *conditions: str) -> None:
        self._path = folder / f"{hashlib.sha256(chr(0).join(conditions).encode()).hexdigest()[:32]}.jsonl"

    def find(self, examples: Sequence[ChatExample], limits: Sequence[int]) -> tuple[ExampleResult, ...] | None:
        """Return the cached results of these examples, in order, or None if any of them is missing.

        Args:
            limits: maximum number of tokens for each answer. An answer may be different under another limit.
        """
        return find_results(self._read(), examples, limits)

    def add(self, examples: Sequence[ChatExample], results: Sequence[ExampleResult]) -> None:
        """Store one result per example, given in the same order as the examples.

        Scores are left out, because they depend on the metrics.
        """
        known = self._read()
        answers = [result.model_copy(update={"scores": {}}) for result in results]
        known |= results_by_example(zip(examples, answers, strict=True))
        lines = (_Line(example=name, result=result).model_dump_json() for (name, _), result in known.items())
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, "".join(f"{line}\n" for line in lines).encode("utf-8"))

    def _read(self) -> KnownResults:
        try:
            lines = [_Line.model_validate_json(line) for line in self._path.read_bytes().splitlines()]
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError):
            log.warning("could not read %s, so its examples will be evaluated again", self._path, exc_info=True)
            return {}
        return {(line.example, line.result.limit): line.result for line in lines}


def evaluation_cache(
    settings: Settings,
    capabilities: DeviceCapabilities,
    revision: str,
    model: Path,
    *,
    template_kwargs: TemplateKwargs,
) -> EvaluationCache:
    """Return the cache of a model's answers on an engine with the current settings.

    Args:
        revision: digest of the model's content.
        model: folder of the model.
        template_kwargs: arguments of the model's chat template.
    """
    facts = engine_facts(settings.engine, capabilities, model)
    arguments = " ".join(settings.engine.args)
    template = [json.dumps(dict(template_kwargs), sort_keys=True)] if template_kwargs else []
    folder = settings.home / "cache" / "evaluations"
    return EvaluationCache(folder, revision, facts.key, arguments, *template)


def results_by_example(pairs: Iterable[tuple[ChatExample, ExampleResult]]) -> KnownResults:
    """Return results keyed by example and token limit, as expected by `find_results`."""
    listed = list(pairs)
    names = _names([example for example, _ in listed])
    return {(name, result.limit): result for name, (_, result) in zip(names, listed, strict=True)}


def find_results(
    known: KnownResults, examples: Sequence[ChatExample], limits: Sequence[int]
) -> tuple[ExampleResult, ...] | None:
    """Return the results for these examples, in order, or None if any example lacks a result for its token limit."""
    results = [known.get(key) for key in zip(_names(examples), limits, strict=True)]
    return tuple(result for result in results if result is not None) if all(results) else None


def _names(examples: Sequence[ChatExample]) -> list[str]:
    """Return the cache key of each example.

    For examples with tools, the key also depends on whether tool calls are parsed.
    """
    calls = any_call_tools(examples)
    return [f"{fingerprint([example])}{'+calls' if calls and example.tools else ''}" for example in examples]

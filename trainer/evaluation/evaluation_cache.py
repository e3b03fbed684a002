"""Cache of model answers, shared by training and comparison so that no model has to answer the same example
twice.
"""

import json
from pathlib import Path

from svc.engine.device import DeviceCapabilities
from svc.engine.probes import engine_facts
from svc.model_folder.chat_template import TemplateKwargs
from svc.settings.settings import Settings
from trainer.evaluation.cache import EvaluationCache


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

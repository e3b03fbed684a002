"""Where answers are kept that no model needs to be asked for again: one place for training and for comparing."""

import json
from pathlib import Path

from svc.engine.device import DeviceCapabilities
from svc.engine.probes import engine_facts
from svc.evaluation.cache import EvaluationCache
from svc.model_folder.chat_template import TemplateKwargs
from svc.settings import Settings


def evaluation_cache(
    settings: Settings,
    capabilities: DeviceCapabilities,
    revision: str,
    model: Path,
    *,
    template_kwargs: TemplateKwargs,
) -> EvaluationCache:
    """What a model has answered before, on an engine as it is started now.

    Args:
        revision: names the model's content.
        model: its folder.
        template_kwargs: what its chat template is given.
    """
    facts = engine_facts(settings.engine, capabilities, model)
    arguments = " ".join(settings.engine.args)
    template = [json.dumps(dict(template_kwargs), sort_keys=True)] if template_kwargs else []
    folder = settings.home / "cache" / "evaluations"
    return EvaluationCache(folder, revision, facts.key, arguments, *template)

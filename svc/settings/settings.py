"""All settings of a machine, section by section."""

from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from svc.settings.client_apis import BatchSettings, FilesSettings, FineTuningSettings
from svc.settings.engine import AdapterSettings, EngineSettings, RaySettings
from svc.settings.gates import GateSettings
from svc.settings.monitoring import HoldoutSettings, MonitorSettings, RequestLogSettings, TelemetrySettings
from svc.settings.rollout import RolloutSettings
from svc.settings.section import AbsolutePath, Section
from svc.settings.serve import RequestLimits, ServeSettings
from svc.settings.storage import ArtifactSettings, StoreSettings
from svc.settings.webhook import WebhookSettings

ENV_PREFIX = "SVC_"


class ModelSettings(Section):
    """Settings of one served model that override the general settings."""

    engine: EngineSettings = EngineSettings()
    """`engine` settings that override the general ones for this model."""
    idle_s: float | None = Field(None, gt=0)
    """Overrides `serve.idle_s`, in seconds."""
    rollout: RolloutSettings = RolloutSettings()
    """Rollout steps for every promotion of this model, see docs/rollouts.md."""
    gates: GateSettings = GateSettings()
    """Gates for every promotion of this model, see docs/rollouts.md."""


class Settings(BaseSettings):
    """All settings. The `home` folder contains all state except the cache of base models."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,  # it may contain the password of `store.url`
    )

    home: AbsolutePath = Field(Path(".svc"), validate_default=True)
    """Folder for all state."""
    base_cache: AbsolutePath = Field(Path("~/.cache/tuneserve/base"), validate_default=True)
    """Folder for downloaded base models."""
    tracking_uri: str = ""
    """URL of the MLflow tracking server; default: a database in `home`."""
    store: StoreSettings = StoreSettings()
    artifacts: ArtifactSettings = ArtifactSettings()
    ray: RaySettings = RaySettings()
    engine: EngineSettings = EngineSettings()
    adapters: AdapterSettings = AdapterSettings()
    serve: ServeSettings = ServeSettings()
    request_limits: RequestLimits = RequestLimits()
    request_log: RequestLogSettings = RequestLogSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
    holdout: HoldoutSettings = HoldoutSettings()
    monitor: MonitorSettings = MonitorSettings()
    fine_tuning: FineTuningSettings = FineTuningSettings()
    batches: BatchSettings = BatchSettings()
    files: FilesSettings = FilesSettings()
    webhooks: tuple[WebhookSettings, ...] = Field((), max_length=20)
    """Receivers of messages about rollouts, each `{url: ..., secret_file: ...}`, see docs/rollouts.md."""
    models: dict[str, ModelSettings] = Field({})
    """Settings of single models, which override the general ones; keyed by model name: `{engine: {...}, idle_s: ...,
    rollout: {...}, gates: {...}}`."""

    @field_validator("webhooks")
    @classmethod
    def _check_webhooks(cls, webhooks: tuple[WebhookSettings, ...]) -> tuple[WebhookSettings, ...]:
        if len({each.url for each in webhooks}) < len(webhooks):
            raise ValueError("two webhooks have the same URL")
        return webhooks

    def idle_s_of(self, name: str) -> float | None:
        """Return the idle time in seconds after which a model's engines sleep or stop, or None if idle engines keep
        running.
        """
        own = self.models[name].idle_s if name in self.models else None
        return own or self.serve.idle_s

    def model_settings(self, name: str) -> ModelSettings:
        """Return a model's own settings, or the defaults if it has none."""
        return self.models.get(name, ModelSettings())

    def engine_for(self, name: str) -> EngineSettings:
        """Return a model's engine settings: the `engine` section, overridden by the model's section in `models`."""
        own = self.models[name].engine if name in self.models else EngineSettings()
        given = {key: getattr(own, key) for key in own.model_fields_set}
        return self.engine.model_copy(update=given)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Accept only values passed as arguments. `load_settings` merges the sources itself, so that flags override
        the environment.
        """
        return (init_settings,)

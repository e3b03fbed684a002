"""The administration of the server on this machine: the server's settings decide, and its errors are shown in full."""

import asyncio

import pytest

from serving.rollout.local_client import LocalAdministration
from serving.rollout.promotion import PromotionRequest
from svc.errors import GateError
from svc.settings.rollout import RolloutSettings
from svc.settings.settings import ModelSettings
from svc.store.rollouts import RolloutState, find_rollout
from tests.serving.home import Home
from tests.serving.versions import NAME, make_version, target

pytestmark = pytest.mark.slow


async def test_promotion_uses_rollout_steps_configured_only_on_the_server(home: Home) -> None:
    plain = home.settings
    steps = RolloutSettings(shadow=5, max_step_s=7)
    home.settings = plain.model_copy(update={"models": {NAME: ModelSettings(rollout=steps)}})
    async with home.serving(f"{NAME}@1"):
        here = LocalAdministration.of(plain)
        change = await asyncio.to_thread(here.promote, PromotionRequest(target(2).version))
        record = find_rollout(home.store, NAME)
        assert record is not None and (record.id, record.plan) == (change.rollout, steps)
        await asyncio.to_thread(here.rollback, NAME, reason=None)
        while (record := find_rollout(home.store, NAME)) is None or record.state is not RolloutState.ENDED:
            await asyncio.sleep(0.02)


async def test_refused_local_promotion_reports_reason_and_advice_but_not_the_server_address(home: Home) -> None:
    make_version(home.registry, 4, failed=("accuracy below 0.5",))
    async with home.serving(f"{NAME}@1"):
        here = LocalAdministration.of(home.settings)
        with pytest.raises(GateError) as refused:
            await asyncio.to_thread(here.promote, PromotionRequest(target(4).version))
    assert "reported" not in refused.value.wrong
    assert "accuracy below 0.5" in str(refused.value) and "--force" in refused.value.todo

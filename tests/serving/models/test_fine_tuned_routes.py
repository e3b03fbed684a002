"""Tests fine-tuned models through OpenAI's official client: listing, retrieving, chatting and deleting."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Model, ModelDeleted
from openai.types.chat import ChatCompletionMessageParam
from sqlalchemy import Engine as Store

from serving.access.keyring import IssuedKey
from svc.identity.principal import Scope
from svc.store.audit import read_events
from tests.serving.fine_tuning.fine_tuning_service import FineTuningService, strict
from tests.serving.service import NAME
from tests.serving.trained import add_job

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "one two three"}]


class Owners:
    """Two keys on one service. Alice has a fine-tuned model, whose version is served."""

    def __init__(self, service: FineTuningService, store: Store) -> None:
        self.service = service
        self.store = store
        self.alice, self.bob = (service.key(Scope.INFER, Scope.JOBS, name=name) for name in ("alice", "bob"))
        self.model = self.add(self.alice)

    def add(self, key: IssuedKey) -> str:
        job = add_job(self.store, owner=key.key.id, name=NAME)
        assert job.fine_tuned_model
        return job.fine_tuned_model

    @asynccontextmanager
    async def clients(self) -> AsyncIterator[tuple[AsyncOpenAI, AsyncOpenAI]]:
        async with self.service.official(self.alice) as alice, self.service.official(self.bob) as bob:
            yield alice, bob


@pytest.fixture
async def owners(store: Store, socket_folder: Path) -> AsyncIterator[Owners]:
    service = FineTuningService(socket_folder, store=store, base=None)
    async with service.run():
        yield Owners(service, store)


async def listed(client: AsyncOpenAI) -> list[str]:
    return [model.id async for model in client.models.list() if model.id.startswith("ft:")]


@pytest.mark.slow
async def test_key_can_list_and_retrieve_only_its_own_models(owners: Owners) -> None:
    other = owners.add(owners.bob)
    async with owners.clients() as (alice, bob):
        assert await listed(alice) == [owners.model]
        assert await listed(bob) == [other]
        model = Model.model_validate((await alice.models.retrieve(owners.model)).to_dict(), strict=True)
        assert (model.id, model.owned_by) == (owners.model, "tuneserve")
        with pytest.raises(openai.NotFoundError) as caught:
            await bob.models.retrieve(owners.model)
        assert caught.value.code == "model_not_found"


async def test_key_can_chat_only_with_its_own_models(owners: Owners) -> None:
    async with owners.clients() as (alice, bob):
        raw = await alice.chat.completions.with_raw_response.create(model=owners.model, messages=MESSAGES)
        assert raw.headers["x-model-version"] == f"{NAME}@1"
        stream = await alice.chat.completions.create(model=owners.model, messages=MESSAGES, stream=True)
        assert [chunk async for chunk in stream]
        with pytest.raises(openai.NotFoundError):
            await bob.chat.completions.create(model=owners.model, messages=MESSAGES)


@pytest.mark.slow
async def test_deleted_model_is_neither_listed_nor_served(owners: Owners) -> None:
    async with owners.clients() as (alice, bob):
        await alice.chat.completions.create(model=owners.model, messages=MESSAGES)
        with pytest.raises(openai.NotFoundError):
            await bob.models.delete(owners.model)
        deleted = strict(ModelDeleted, (await alice.models.delete(owners.model)).to_dict())
        assert (deleted.id, deleted.deleted) == (owners.model, True)
        assert await listed(alice) == []
        with pytest.raises(openai.NotFoundError):
            await alice.chat.completions.create(model=owners.model, messages=MESSAGES)
        with pytest.raises(openai.NotFoundError):
            await alice.models.delete(owners.model)
    events = [event for event in read_events(owners.store, newest=10) if event.action == "model.delete"]
    assert [(event.subject, event.details["version"]) for event in events] == [(owners.model, f"{NAME}@1")]


async def test_admin_can_list_and_delete_models_of_all_keys(owners: Owners) -> None:
    admin = owners.service.key(Scope.ADMIN)
    async with owners.service.official(admin) as client:
        assert await listed(client) == [owners.model]
        await client.models.delete(owners.model)
        assert await listed(client) == []


async def test_key_granted_access_to_a_model_can_use_but_not_delete_it(owners: Owners) -> None:
    guest = owners.service.key(Scope.INFER, models=[NAME])
    async with owners.service.official(guest) as client:
        await client.chat.completions.create(model=owners.model, messages=MESSAGES)
        assert await listed(client) == []
        with pytest.raises(openai.PermissionDeniedError) as caught:
            await client.models.delete(owners.model)
        assert caught.value.code == "model_not_deletable"

"""A fake server, and clients of it that wait milliseconds where real ones wait seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.client.fake_tinker import FAST, FakeTinker
from tinsmith.client import SamplingClient, ServiceClient, TrainingClient


@pytest.fixture
def server() -> FakeTinker:
    return FakeTinker()


@pytest.fixture
def service(server: FakeTinker) -> Iterator[ServiceClient]:
    with ServiceClient(base_url="http://fake.test", api_key="tml-secret", timing=FAST, transport=server) as client:
        yield client


@pytest.fixture
def training(service: ServiceClient, server: FakeTinker) -> TrainingClient:
    client = service.create_lora_training_client("tinsmith/tiny", rank=8).result(5)
    server.rewind()
    return client


@pytest.fixture
def sampling(service: ServiceClient, server: FakeTinker) -> SamplingClient:
    client = service.create_sampling_client(base_model="tinsmith/tiny").result(5)
    server.rewind()
    return client

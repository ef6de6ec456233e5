from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from tests.support.edge import EdgeHarness


@pytest_asyncio.fixture
async def edge() -> AsyncIterator[EdgeHarness]:
    async with EdgeHarness() as harness:
        yield harness

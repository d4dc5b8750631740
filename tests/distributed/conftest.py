from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.workers import Workers


@pytest.fixture(scope="package")
def workers() -> Iterator[Workers]:
    pair = Workers()
    yield pair
    pair.close()

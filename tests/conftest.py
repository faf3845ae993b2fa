"""What all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

_SMALL = {"layers", "models", "parity"}


@pytest.fixture(autouse=True)
def one_thread_for_small_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Rows of a few dozen channels are done before a second thread has woken up, ten times so on a busy machine."""
    threads = torch.get_num_threads()
    if request.path.parent.name in _SMALL:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

from __future__ import annotations

import pytest

from mmkernels.train import Run, train, trainer


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run of two steps: its captions are nonsense, but always the same nonsense."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "HELD_OUT", 2)
        train(Run(steps=2, batch=1), out)
    return out

from __future__ import annotations

import pytest

from mmkernels import data


@pytest.fixture(scope="session")
def digits():
    return data.build("digits")


@pytest.fixture(scope="session")
def tokenizer(digits):
    return data.Tokenizer.train(digits.captions, 512)

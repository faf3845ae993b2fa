"""Hugging Face models served by our ops: `patch` a model, `revert` everything. transformers is an extra.

    from mmkernels.integrations import hf

    model = LlavaNextForConditionalGeneration.from_pretrained(...)
    print(hf.patch(model))                # what was replaced
    model.generate(...)
    hf.revert()                           # as if nothing had been

Importing this package also makes `attn_implementation="mmkernels"` and `experts_implementation="mmkernels"` valid names.
"""

from __future__ import annotations

import importlib.util

from mmkernels.integrations.hf._patch import explain as explain
from mmkernels.integrations.hf._patch import patch as patch
from mmkernels.integrations.hf._patch import register as register
from mmkernels.integrations.hf._undo import revert as revert

if importlib.util.find_spec("transformers") is not None:
    register()

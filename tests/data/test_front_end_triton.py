"""The front end's GPU kernel in Triton's interpreter, in a process where that is on, against the one on the CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

_CHECK = """
import warnings
warnings.filterwarnings("ignore")  # numpy's opinion of the interpreter
import numpy as np, torch
from skimage import data
from mmkernels.data.front_end import FrontEnd

cat = data.chelsea()
pictures = [np.ascontiguousarray(p) for p in (cat[:20, :31], cat[:45:2, :6])]
small = {
    "llava_next": dict(pinpoints=[(14, 28), (28, 14)], tile=14),
    "llava_uhd": dict(scale=14), "llava_uhd_eccv": dict(scale=14), "slime": dict(tile=14),
    "monkey": dict(canvas=(33, 30), window=14), "fuyu": dict(canvas=(20, 15), patch=10),
}
orders = set()


def on_device(pixels, todo, out, threads):
    orders.update(job.down_first for job in todo)
    front._on_device(pixels, todo, out)


for rule, options in small.items():
    for dtype in (torch.float32, torch.float16) if rule == "slime" else (torch.float32,):
        front = FrontEnd(rule, dtype=dtype, **options)
        law = front(pictures).patches
        front._fill = on_device
        ours = front(pictures).patches
        worst = float((ours.float() - law.float()).abs().max())
        if rule in ("llava_uhd", "monkey"):
            assert worst < (1e-5 if dtype == torch.float32 else 5e-3), (rule, dtype, worst)
        else:
            assert torch.equal(ours, law), (rule, dtype, worst)
        if rule in ("llava_uhd", "slime"):  # a wrong normalisation is seen
            front.affine[0] *= 1.01
            front.table = front.table[::-1].copy()
            assert float((front(pictures).patches.float() - law.float()).abs().max()) > 2e-3, rule
print("orders", sorted(orders))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_makes_what_the_cpu_makes():
    done = subprocess.run(
        [sys.executable, "-c", _CHECK],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "orders [0" in done.stdout

"""The image front end against Pillow and numpy on real photographs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as photographs

from mmkernels import _native
from mmkernels.data import images
from mmkernels.data.front_end import RULES, FrontEnd, jobs

REAL_BOUND = 1e-6  # of rules that do not round to bytes, against float64: unnormalised pixels lie in 0..1
BYTE_RULES = [name for name in RULES if name not in ("llava_uhd", "monkey")]
needs_host = pytest.mark.skipif(_native.host is None, reason="_host is not built")


def pictures():
    """Photographs of many shapes: whole ones, and cuts of them down to one line or one column."""
    cat, coffee, rocket = photographs.chelsea(), photographs.coffee(), photographs.rocket()
    cut = [cat, coffee[:300, :120], rocket[::5, ::3], coffee[:3, :500], coffee[:, 7:8], cat[40:41, 50:51]]
    return [np.ascontiguousarray(picture) for picture in cut]


def without_host(front, batch):
    kept, _native.host = _native.host, None
    try:
        return front(batch)
    finally:
        _native.host = kept


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def by_hand(pixels, plan):
    """LLaVA-NeXT in a user's own words: float32 `[1 + tiles, 3, 336, 336]`."""
    image = Image.fromarray(pixels)
    canvas = Image.new("RGB", (plan.grid[0] * 336, plan.grid[1] * 336))
    canvas.paste(image.resize(plan.resized, Image.Resampling.BICUBIC), plan.offset)
    views = [image.resize((336, 336), Image.Resampling.BICUBIC), *(canvas.crop(box) for box in plan.boxes)]
    return images.normalise(np.stack([np.asarray(view) for view in views]))


@needs_host
def test_llava_next_is_bit_for_bit_what_pillow_and_torch_make():
    for pixels in pictures():
        packed = FrontEnd("llava_next")([pixels])
        views = by_hand(pixels, packed.plans[0])
        rows = views.unfold(2, 14, 14).unfold(3, 14, 14).permute(0, 2, 3, 1, 4, 5).reshape(-1, 588)
        assert torch.equal(bits(packed.patches), bits(rows))


@needs_host
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_the_compiled_front_end_is_the_pillow_one(rule, dtype):
    front, batch = FrontEnd(rule, dtype=dtype), pictures()
    ours, law = front(batch), without_host(front, batch)
    for name in ("hw", "offsets", "sample"):
        assert torch.equal(getattr(ours, name), getattr(law, name))
    assert ours.offsets[-1] == len(ours.patches) == len(law.patches)
    if rule in BYTE_RULES:
        assert torch.equal(bits(ours.patches), bits(law.patches))
        return
    spread = float(np.abs(front.affine[0]).max() * 255)  # normalising stretches the error of a value in 0..1
    step = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    bound = REAL_BOUND * spread + step * law.patches.float().abs()
    assert ((ours.patches.float() - law.patches.float()).abs() <= bound).all()


@needs_host
@pytest.mark.parametrize("rule", ["llava_uhd", "monkey"])
def test_the_bound_is_tight_enough_to_catch_a_wrong_filter(rule):
    front, batch = FrontEnd(rule), pictures()[:1]
    law = without_host(front, batch)
    made = front.rule.jobs(0, law.plans[0], 14)[0]
    other = jobs.Job(**{**vars(made), "filter": 1 - made.filter})
    front.rule = front.rule._replace(jobs=lambda *_: [other])
    wrong = front(batch)
    n = len(wrong.patches)
    assert (wrong.patches - law.patches[:n]).abs().max() > 1e-3


@needs_host
def test_random_sizes_and_both_orders_of_the_axes():
    rng, noise, orders = np.random.default_rng(0), photographs.coffee(), set()
    for _ in range(40):
        h, w = rng.integers(1, 90, 2)
        width, height = (int(v) for v in rng.integers(1, 90, 2))
        job = jobs.Job(
            0,
            0,
            0,
            int(w),
            int(h),
            width,
            height,
            int(rng.integers(2)),
            0,
            0,
            0,
            0,
            1,
            1,
            width,
            height,
            1,
            1,
        )
        placed, _ = job.placed(0)
        orders.add(placed.down_first)
        front = FrontEnd("fuyu", mean=(0, 0, 0), std=(1 / 255,) * 3)
        out = torch.empty(width * height, 3)
        pixels = np.ascontiguousarray(noise[100 : 100 + h, 200 : 200 + w])
        front._fill([pixels], [placed], out, 1)
        pillow = Image.fromarray(pixels).resize((width, height), Image.Resampling(2 + job.filter))
        assert np.array_equal(np.rint(out.numpy()).reshape(height, width, 3), np.asarray(pillow))
    assert orders == {0, jobs.PILLOW >= 13}


@needs_host
@pytest.mark.parametrize("rule", RULES)
def test_threads_and_neighbours_change_no_bit(rule):
    front, batch = FrontEnd(rule), pictures()[:4]
    one = front(batch, threads=1)
    for threads in (2, 7):
        assert torch.equal(front(batch, threads=threads).patches, one.patches)
    alone = [front([picture], threads=3).patches for picture in batch]
    assert torch.equal(torch.cat(alone), one.patches)


DIGEST = """
import hashlib, sys
import numpy as np
from skimage import data
from mmkernels.data.front_end import FrontEnd
for rule in sys.argv[1:]:
    print(rule, hashlib.sha256(FrontEnd(rule)([np.ascontiguousarray(data.chelsea()[:99, :171])]).patches.numpy()).hexdigest())
"""


@needs_host
def test_every_instruction_set_makes_the_same_bytes():
    rules = BYTE_RULES
    expected = [
        hashlib.sha256(
            FrontEnd(r)([np.ascontiguousarray(photographs.chelsea()[:99, :171])]).patches.numpy()
        ).hexdigest()
        for r in rules
    ]
    for isa in _native.host.runnable_isas():
        command = [sys.executable, "-c", DIGEST, *rules]
        done = subprocess.run(
            command, env={**os.environ, "MMKERNELS_ISA": isa}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert [line.split()[1] for line in done.stdout.splitlines()] == expected, isa


def test_views_and_rows_of_a_batch():
    batch = [photographs.chelsea(), None, np.zeros((336, 336), dtype=np.uint8)]
    packed = FrontEnd("llava_next")(batch)
    assert packed.plans[1] is None
    assert packed.sample.tolist() == [0] * 3 + [2] * 3
    assert packed.hw.tolist() == [[24, 24]] * 6
    assert packed.offsets.tolist() == [576 * v for v in range(7)]
    grey = packed.patches[576 * 3]  # a black view in colour
    black = [-m / s for m, s in zip(images.MEAN, images.STD, strict=True)]
    assert torch.allclose(grey.reshape(3, 196), torch.tensor(black)[:, None].expand(3, 196))


def test_views_of_their_own_sizes():
    packed = FrontEnd("llava_uhd")([np.zeros((300, 1000, 3), dtype=np.uint8)])
    assert packed.hw.tolist() == [[22, 25]] * 3 + [[13, 43]]
    fuyu = FrontEnd("fuyu")([np.zeros((31, 61, 3), dtype=np.uint8)])
    assert fuyu.hw.tolist() == [[2, 3]]
    last = fuyu.patches[-1].reshape(30, 30, 3)  # one pixel of the picture, then padding
    assert torch.allclose(last[0, 0], torch.tensor(-1.0))
    assert torch.allclose(last[1:], torch.tensor((1 / 255 - 0.5) / 0.5))


def test_a_canvas_that_the_windows_do_not_cover():
    pixels = photographs.coffee()
    front = FrontEnd("monkey", canvas=(130, 140), window=56)
    ours, law = front([pixels]), without_host(front, [pixels])
    assert ours.hw.tolist() == [[4, 4]] * 5
    assert (ours.patches - law.patches).abs().max() < 1e-5

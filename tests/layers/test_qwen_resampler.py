"""Position tables, the query projection that is computed once, edges and refusals; arithmetic is tested in tests/parity."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from mmkernels import weights
from mmkernels.layers import QwenResampler, VisionConfig, VisionTower, interpolate_positions, sincos_positions


def _resampler(**changes) -> QwenResampler:
    torch.manual_seed(0)
    return QwenResampler(**{"grid": 3, "width": 32, "heads": 4, "media_width": 20, **changes})


def test_the_table_says_the_column_first():
    table = sincos_positions(16, 5)
    assert table.shape == (25, 16) and table.dtype == torch.float32
    for cell in range(25):
        row, column = divmod(cell, 5)
        for k in range(4):
            w = 10_000 ** (-k / 4)
            want = [f(p * w) for p in (column, row) for f in (math.sin, math.cos)]
            torch.testing.assert_close(table[cell, k::4], torch.tensor(want), rtol=1e-6, atol=1e-6)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # built in float32 all the same
    try:
        assert torch.equal(sincos_positions(16, 5), table)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [(32, 32), (5, 9), (16, 8), (1, 1)], ids=str)
def test_interpolation_is_torch_bicubic_in_float32(grid, dtype):
    torch.manual_seed(1)
    table = torch.randn(256, 6).to(dtype).requires_grad_()
    got = interpolate_positions(table, grid)
    picture = table.float().reshape(16, 16, 6).permute(2, 0, 1).unsqueeze(0)
    want = F.interpolate(picture, grid, mode="bicubic", align_corners=False)[0].flatten(1).T.to(dtype)
    assert torch.equal(got, want) and got.dtype == dtype
    up = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad((y * up).sum(), table)[0] for y in (got, want)))
    assert interpolate_positions(table, (16, 16)) is table


def test_interpolation_is_cubic_convolution_with_a_of_minus_three_quarters():
    """Along one row, by hand: centres at halves, the edge repeated, nothing smoothed when shrinking."""
    row = torch.randn(4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    table = row.repeat(4, 1).reshape(16, 1)  # the same in every row: only columns matter

    def kernel(x: float, a: float = -0.75) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    for size in (8, 3):
        want = []
        for i in range(size):
            at = (i + 0.5) * 4 / size - 0.5
            near = math.floor(at)
            want.append(
                sum(float(row[min(max(j, 0), 3)]) * kernel(at - j) for j in range(near - 1, near + 3))
            )
        got = interpolate_positions(table, (4, size)).view(4, size)
        torch.testing.assert_close(
            got, torch.tensor(want, dtype=torch.float64).expand(4, -1), rtol=1e-5, atol=1e-5
        )


@torch.no_grad()
def test_a_stored_table_of_224_pixels_reads_images_of_448():
    config = VisionConfig(224, 14, 16, 1, 2, 16, "gelu", 1e-6, class_token=False, any_size=True)
    torch.manual_seed(3)
    tower, resampler = VisionTower(config), QwenResampler(16, 16, 2, 16)
    assert tower.positions.shape[0] == resampler.positions.shape[0] == 256
    small, large = torch.randn(1, 3, 224, 224), torch.randn(1, 3, 448, 448)
    assert tower(small).shape[1] == 256 and tower(large).shape[1] == 1024
    assert resampler(tower(small)).shape == resampler(tower(large)).shape == (1, 256, 16)
    seen = []
    handle = tower.pre_norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    tower(torch.zeros(1, 3, 448, 448))  # without bias only positions are left
    handle.remove()
    torch.testing.assert_close(seen[0][0], interpolate_positions(tower.positions, (32, 32)))


def test_initial_values():
    torch.manual_seed(4)
    r = QwenResampler(8, 256, 2, 64)
    for weight in (r.query, r.kv.weight, r.out.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    bound = math.sqrt(6 / (256 + 3 * 256))
    assert 0.95 * bound < float(r.qkv.weight.detach().abs().max()) <= bound
    assert not r.qkv.bias.any() and not r.out.bias.any()
    assert "positions" in r.state_dict() and "positions" not in dict(r.named_parameters())
    assert isinstance(_resampler(media_width=None).kv, torch.nn.Identity)


class _Count:
    """How often the query projection was computed."""

    def __init__(self, resampler: QwenResampler, monkeypatch) -> None:
        self.count, compute = 0, resampler._project_queries

        def counted():
            self.count += 1
            return compute()

        monkeypatch.setattr(resampler, "_project_queries", counted)


def test_queries_are_projected_once_while_nothing_changes(monkeypatch):
    r, x = _resampler().eval(), torch.randn(2, 16, 20)
    counter = _Count(r, monkeypatch)
    recorded = r(x)
    with torch.no_grad():
        first = [r(x) for _ in range(3)]
        other = r(torch.randn(3, 9, 20))
    assert counter.count == 2 and other.shape == (3, 9, 32)
    assert all(torch.equal(y, recorded) for y in first)
    recorded = r(x)  # with gradients: anew, every time
    assert counter.count == 3 and recorded.requires_grad
    recorded.sum().backward()
    assert r.query.grad.any() and r.query_norm.weight.grad.any()


def _load(r):
    weights.load(r, {k: v + 0.5 for k, v in r.state_dict().items()})


def _load_state_dict(r):
    r.load_state_dict({k: v + 0.5 for k, v in r.state_dict().items()})


def _assign(r):
    r.load_state_dict({k: v + 0.5 for k, v in r.state_dict().items()}, assign=True)


def _data(r):
    r.qkv.weight.data = r.qkv.weight.data + 0.5


def _in_place(r):
    with torch.no_grad():
        r.query.mul_(1.5).add_(0.5 * torch.randn_like(r.query))


def _table(r):
    r.positions.zero_()


def _silently_then_eval(r):
    r.qkv.weight.data.add_(0.5 * torch.randn_like(r.qkv.weight))
    r.eval()


def _step(**options):
    def change(r):
        optimizer = torch.optim.AdamW(r.parameters(), lr=0.1, **options)
        with torch.enable_grad():
            r(torch.ones(1, 9, 20)).square().sum().backward()
        with torch.no_grad():
            r(torch.ones(1, 9, 20))  # a look between the two: it keeps what the step is about to change
        optimizer.step()

    return change


@pytest.mark.parametrize(
    "change",
    [_load, _load_state_dict, _assign, _data, _in_place, _table, _silently_then_eval,
     _step(foreach=False), _step(foreach=True), _step(fused=True)],
    ids=["load", "state_dict", "assign", "data", "in_place", "table", "silent", "adamw", "foreach", "fused"],
)  # fmt: skip
@torch.no_grad()
def test_no_change_of_the_weights_leaves_stale_queries(change):
    r, x = _resampler().eval(), torch.randn(2, 16, 20)
    before, kept = r(x), r.queries()
    change(r)
    after = r(x)
    assert not torch.allclose(after, before, atol=1e-3) and not torch.allclose(r.queries(), kept, atol=1e-3)
    with torch.enable_grad():
        torch.testing.assert_close(after, r(x).detach(), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_copies_dtypes_and_autocast_have_queries_of_their_own():
    r, x = _resampler().eval(), torch.randn(2, 16, 20)
    plain = r(x)
    twin, back = copy.deepcopy(r), pickle.loads(pickle.dumps(r))
    twin.query.add_(torch.randn_like(twin.query))
    assert torch.equal(r(x), plain) and torch.equal(back(x), plain) and not torch.equal(twin(x), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert r.queries().dtype == torch.bfloat16
    assert torch.equal(r(x), plain)
    wide = r.double()
    torch.testing.assert_close(wide(x.double()).float(), plain, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        inside = wide(x.double())
    torch.testing.assert_close(wide(x.double()), inside)


def test_a_query_that_may_look_nowhere_gets_the_bias():
    r, x = _resampler().double(), torch.randn(2, 9, 20, dtype=torch.float64, requires_grad=True)
    blocked = torch.zeros(9, 9, dtype=torch.bool)
    blocked[4] = True
    with torch.no_grad():
        r.out.bias.normal_()
    added = torch.zeros(9, 9, dtype=torch.float64).masked_fill(blocked, -torch.inf)
    for mask in (blocked, added):
        y = r(x, attn_mask=mask)
        assert torch.equal(y[:, 4], r.out.bias.expand(2, -1)) and torch.isfinite(y).all()
        torch.testing.assert_close(y[:, :4], r(x)[:, :4])
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in r.parameters())


def test_what_nobody_sees_changes_nothing():
    r, x = _resampler().double(), torch.randn(2, 9, 20, dtype=torch.float64)
    blocked = torch.zeros(9, 9, dtype=torch.bool)
    blocked[:, [2, 7]] = True
    results = []
    for fill in (0.0, torch.nan, torch.inf, 1e300):
        given = x.clone()
        given[:, [2, 7]] = fill
        given.requires_grad_()
        r.zero_grad()
        y = r(given, attn_mask=blocked)
        y.square().sum().backward()
        assert not given.grad[:, [2, 7]].any()
        results.append([y, given.grad, *(p.grad.clone() for p in r.parameters())])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))
    per_head = torch.zeros(2 * 4, 9, 9, dtype=torch.bool)
    per_head[:4, :, 1] = True  # all heads of the first image
    given = x.clone()
    given[0, 1] = torch.nan
    assert torch.isfinite(r(given, attn_mask=per_head)).all()


def test_no_images():
    r = _resampler()
    for mask in (None, torch.zeros(9, 16, dtype=torch.bool)):
        x = torch.randn(0, 16, 20, requires_grad=True)
        y = r(x, attn_mask=mask)
        y.sum().backward()
        assert y.shape == (0, 9, 32) and not any(p.grad.any() for p in r.parameters() if p.grad is not None)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_any_layout_of_the_input(layout):
    r, x = _resampler(), torch.randn(2, 16, 20)
    given = {
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "strided": x.repeat_interleave(2, -1)[..., ::2],
        "expanded": x[:1].expand(2, -1, -1),
    }[layout]
    torch.testing.assert_close(r(given), r(given.contiguous().clone()))


def test_compiles_into_one_graph():
    r = _resampler()
    compiled = torch.compile(r, backend="eager", fullgraph=True)
    for tokens in (9, 16):
        x = torch.randn(2, tokens, 20)
        torch.testing.assert_close(compiled(x), r(x))


def test_bad_input_is_refused_by_name():
    r, x = _resampler(), torch.randn(1, 12, 20)
    for error, match, call in (
        (ValueError, r"x: got 12 tokens, which are no square grid; expected grid_hw", lambda: r(x)),
        (ValueError, "x: got 0 tokens", lambda: r(x[:, :0])),
        (ValueError, "grid_hw: got 3 x 5, expected a grid of x's 12 tokens", lambda: r(x, grid_hw=(3, 5))),
        (ValueError, "grid_hw: got -3 x -4, expected positive", lambda: r(x, grid_hw=(-3, -4))),
        (ValueError, r"grid_hw: got 12, expected \(height, width\)", lambda: r(x, grid_hw=12)),
        (ValueError, "x: got shape", lambda: r(x[..., :8], grid_hw=(3, 4))),
        (ValueError, "x: got shape", lambda: r(x[0], grid_hw=(3, 4))),
        (TypeError, "x: got torch.float64, expected torch.float32", lambda: r(x.double(), grid_hw=(3, 4))),
        (ValueError, "attn_mask: got shape", lambda: r(x[:, :9], attn_mask=torch.zeros(9, 8))),
        (ValueError, "attn_mask: got shape", lambda: r(x[:, :9], attn_mask=torch.zeros(1, 9, 9))),
        (TypeError, "attn_mask: got torch.int64", lambda: r(x[:, :9], attn_mask=torch.zeros(9, 9).long())),
        (ValueError, "heads: got 5, expected a divisor of width = 32", lambda: _resampler(heads=5)),
        (ValueError, "width: got 30, expected a multiple of 4", lambda: _resampler(width=30, heads=2)),
        (ValueError, "grid: got 0", lambda: _resampler(grid=0)),
        (ValueError, "table: got 12 rows", lambda: interpolate_positions(torch.ones(12, 4), (3, 4))),
        (ValueError, "table: got shape", lambda: interpolate_positions(torch.ones(1, 9, 4), (3, 4))),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
    config = VisionConfig(12, 4, 16, 1, 2, 16, class_token=False, any_size=True)
    for images in (torch.randn(1, 3, 12, 14), torch.randn(1, 3, 0, 12)):
        with pytest.raises(ValueError, match=r"images: got .* pixels, expected whole patches of 4"):
            VisionTower(config)(images)

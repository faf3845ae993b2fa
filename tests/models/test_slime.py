"""SliME: sizes, stages that read whole pictures and tiles in turn, routing, layouts, decoding, released files, refusals."""

from __future__ import annotations

import pytest
import torch
from published_files import llama

from mmkernels import models, weights
from mmkernels.data import slicing
from mmkernels.models.slime import Tiles

WHOLE, LOCAL = 16, 9


@pytest.fixture
def model() -> models.Slime:
    torch.manual_seed(0)
    model = models.build("slime-tiny").eval()
    assert isinstance(model, models.Slime)
    return model


def tiles(*grids: tuple[int, int]) -> Tiles:
    random = torch.Generator().manual_seed(1)
    count = sum(1 + c * r for c, r in grids)
    return Tiles(torch.randn(count, 3, 32, 32, generator=random), grids)


@pytest.mark.parametrize(("name", "width"), [("slime-7b", 4096), ("slime-8b", 4096), ("slime-13b", 5120)])
def test_the_presets_have_the_published_size(name, width):
    model = models.build(name, device="meta", dtype=torch.bfloat16)
    d = 1024
    core = 4 * d**2 + 4 * d + 6 * d
    mlp = d * width + width + width**2 + width
    assert sum(p.numel() for p in model.adapter.parameters()) == mlp + core + 576 * d + 2 * d
    assert sum(p.numel() for p in model.sampler.parameters()) == core + 144 * d
    stage = {"slime-7b": 2e-5, "slime-8b": 1e-5, "slime-13b": 2e-5}[name]
    assert [s.learning_rate for s in model.stages()] == [1e-3, 1e-3, 1e-3, stage]
    assert model.config.router == "cosine" and model.router.top_p == 0.95


def test_stages_learn_in_turn(model):
    want = {
        "towers": {"vision", "lm"}, "whole": {"adapter.projection"}, "queries": {"adapter.resampler"}, "tiles": {"sampler"},
        "instruct": {"adapter.projection", "adapter.resampler", "adapter.gate", "sampler", "lm"},
    }  # fmt: skip
    for stage in model.stages():
        stage.freeze(model)
        found = set()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parts = name.split(".")
                found.add(".".join(parts[:2]) if parts[0] == "adapter" else parts[0])
        assert found == want[stage.name]


@pytest.mark.parametrize("stage", ["whole", "queries", "tiles", "instruct"])
def test_what_a_stage_reads_is_what_learns(model, stage):
    """One step of every stage: its parameters get gradients, and pictures have the places that it reads."""
    model.train()
    chosen = next(s for s in model.stages() if s.name == stage)
    model.enter(chosen)
    ids = torch.tensor([[2, 40, 41, 42], [2, 43, 44, 45]])
    output = model(tiles((2, 1), (1, 3)), ids, labels=ids)
    output.loss.backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert grads <= trained and grads
    if stage == "whole":
        assert output.logits.shape[1] == WHOLE + 3 and any("projection" in n for n in grads)
    if stage == "queries":
        assert output.logits.shape[1] == WHOLE + 3 and "adapter.resampler.query" in grads
    if stage == "tiles":
        assert output.logits.shape[1] <= 3 * LOCAL + 3 and "sampler.query" in grads
    if stage == "instruct":
        assert {"adapter.gate", "sampler.query", "adapter.resampler.query"} <= grads


@torch.no_grad()
def test_layout_and_routing(model):
    given = tiles((2, 1), (1, 3))
    ids = torch.tensor([[40, 2, 41, 42], [43, 2, 0, 0]])
    seen = model.encode(given)
    assert seen.whole.shape == (2, WHOLE, 128) and [len(t) for t in seen.local] == [2 * LOCAL, 3 * LOCAL]
    made, media = model.lay_out(ids, ids != 0, None, seen)
    at = 0
    for row in range(2):
        words = model.lm.embed(ids[row][(ids[row] != 0) & (ids[row] != 2)])
        kept = model.router(seen.local[row], words, torch.ones(len(words), dtype=torch.bool))
        want = [
            ids[row, 0].item(),
            *[2] * WHOLE,
            511,
            *[2] * len(kept),
            *[i for i in ids[row, 2:].tolist() if i],
        ]
        assert made.ids[row][made.mask[row]].tolist() == want
        both = torch.cat([seen.whole[row], seen.local[row][kept]])
        assert torch.equal(media[at : at + len(both)], both)
        at += len(both)
    assert at == len(media)


@torch.no_grad()
def test_tiles_are_merged_into_one_map(model):
    given = tiles((2, 2))
    local = model.encode(given).local[0].view(2, 3, 2, 3, 128)  # rows, cells, columns, cells
    hw = torch.full((4, 2), 4)
    alone = model.adapter.projection(model.sampler(model.vision(given.views[1:]), hw)).view(4, 3, 3, 128)
    for tile in range(4):
        row, column = divmod(tile, 2)
        torch.testing.assert_close(local[row, :, column], alone[tile], rtol=1e-4, atol=1e-4)


def test_the_most_tokens_are_the_planned_ones():
    for size in ((672, 1008), (1000, 300), (640, 480), (336, 336)):
        plan = slicing.slime(*size)
        assert plan.tokens == 577 + 144 * plan.grid[0] * plan.grid[1]


@torch.no_grad()
def test_generation_asks_the_router_once(model):
    given, ids = tiles((2, 1), (1, 2)), torch.tensor([[2, 40, 41], [2, 42, 0]])
    together = model.generate(given, ids, ids != 0, max_new_tokens=3, stop=())
    second = Tiles(given.views[3:], [(1, 2)])
    made, media = model.lay_out(ids[1:, :2], None, None, model.encode(second))
    slow = made.ids
    for _ in range(3):
        token = model(None, slow, media=media).logits[:, -1].argmax(-1)
        slow = torch.cat([slow, token[:, None]], 1)
    assert torch.equal(together[1], slow[0, -3:])


def test_rows_without_pictures(model):
    ids = torch.tensor([[40, 41, 42], [2, 43, 44]])
    assert torch.isfinite(model(tiles((1, 1)), ids).logits).all()
    model.train()
    model(None, ids[:1], labels=ids[:1]).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in grads.values()) and not grads["sampler.query"].any()


def test_a_released_file(model):
    torch.manual_seed(2)
    state, file = model.state_dict(), llama(model.state_dict())
    table = {
        "query": "query", "positions": "pos_embed", "qkv.weight": "attn.in_proj_weight", "qkv.bias": "attn.in_proj_bias",
        "out.weight": "attn.out_proj.weight", "out.bias": "attn.out_proj.bias", "query_norm.weight": "ln_q.weight",
        "query_norm.bias": "ln_q.bias", "media_norm.weight": "ln_kv.weight", "media_norm.bias": "ln_kv.bias",
        "post_norm.weight": "ln_post.weight", "post_norm.bias": "ln_post.bias",
    }  # fmt: skip
    moved = {f"adapter.resampler.{ours}": f"model.mm_projector.attn.{name}" for ours, name in table.items()}
    moved |= {f"sampler.{ours}": f"model.sampler.post_qformer.{name}" for ours, name in table.items()}
    for end in ("weight", "bias"):
        moved[f"adapter.projection.input.{end}"] = f"model.mm_projector.projection.0.{end}"
        moved[f"adapter.projection.output.{end}"] = f"model.mm_projector.projection.2.{end}"
    moved["adapter.gate"] = "model.mm_projector.w_gate"
    file |= {theirs: torch.randn_like(state[ours]) for ours, theirs in moved.items()}
    extra = {"w_noise": torch.zeros(128, 2), "mean": torch.zeros(1), "std": torch.ones(1)}
    file |= {f"model.mm_projector.{k}": v for k, v in extra.items()}
    weights.load(model, file, source="slime")
    now = model.state_dict()
    assert all(torch.equal(now[ours], file[theirs]) for ours, theirs in moved.items())
    weights.load(model.adapter, file, source="slime")
    weights.load(model.sampler, file, source="slime")
    file["model.mm_projector.w_other"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"left over: model\.mm_projector\.w_other"):
        weights.load(model, file, source="slime")


def test_bad_input_is_refused_by_name(model):
    ids = torch.tensor([[2, 40]])
    given = tiles((2, 1))
    for match, call in (
        ("images: got 3 views, expected 4", lambda: model(Tiles(given.views, [(3, 1)]), ids)),
        ("images: got 1, expected 2, as many as image tokens", lambda: model(given, torch.tensor([[2, 2]]))),
        ("images: got shape", lambda: model(Tiles(given.views[..., :8], [(2, 1)]), ids)),
        ("columns: got 0", lambda: model(Tiles(given.views, [(0, 1)]), ids)),
        ("input_ids: got 1 places for visual tokens", lambda: model(None, ids)),
        ("frames: got 2", lambda: model.expand(ids, frames=2)),
    ):
        with pytest.raises(ValueError, match=match):
            call()

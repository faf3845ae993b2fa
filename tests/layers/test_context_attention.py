"""Context attention against the published computation written out densely, its compression, its blocks and its edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from published_llama_vid import LM, QFORMER, TEXT, WIDTH, Eager, expected, inputs, published_state
from published_qformer import CONFIG, State
from torch import Tensor

from benchmarks.measure import extra_bytes
from mmkernels import weights
from mmkernels.layers import ContextAttention, content_tokens

PAD = 0


def layer(compress: str = "mean", state: State | None = None, **options: Any) -> ContextAttention:
    module = ContextAttention(WIDTH, LM, qformer=QFORMER, compress=compress, **options).double()
    weights.load(module, published_state() if state is None else state, source="llama_vid")
    return module


MODES = ["none", "mean", "grid:2", "grid:3", "grid:4"]


@pytest.mark.parametrize(
    ("compress", "tokens"),
    [(mode, tokens) for mode in MODES for tokens in (17, 16)] + [("none", 4), ("mean", 5), ("grid:2", 5)],
)
def test_every_mode_is_the_published_computation(compress: str, tokens: int) -> None:
    """With a class token (odd) and without; a grid of 3 on 4 x 4 patches gives 16 tokens."""
    x, state = inputs(tokens=tokens), published_state()
    ours = layer(compress)(**x)
    assert ours.shape == (2, 2, 3, 1 + content_tokens(compress, tokens // 2 * 2), LM)
    torch.testing.assert_close(ours, expected(state, compress, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tokens", [17, 2])
def test_gradients_are_the_published_computation_s(tokens: int) -> None:
    """With more patches than queries, and with fewer: the two orders of the scores' products."""
    x, state = inputs(tokens=tokens), published_state()
    for value in state.values():
        value.requires_grad_()
    frames = x["frames"].requires_grad_()
    module = layer("mean", {k: v.detach() for k, v in state.items()}, block=2)
    table = module.published("llama_vid")
    weight = torch.randn(expected(state, "mean", x).shape, dtype=torch.float64)
    names = [n for n, _ in module.named_parameters()]
    ours = torch.autograd.grad((module(**x) * weight).sum(), [frames, *module.parameters()])
    keys = list(state)
    theirs = torch.autograd.grad(
        (expected(state, "mean", x) * weight).sum(), [frames, *state.values()], allow_unused=True
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-8, atol=1e-9)
    found = {k: torch.zeros_like(state[k]) if g is None else g for k, g in zip(keys, theirs[1:], strict=True)}
    for name, grad in zip(names, ours[1:], strict=True):
        rule = next(r for r in table.rules if r.sources(name))
        wanted = rule.value([found[key] for key in rule.sources(name) or ()])
        torch.testing.assert_close(grad, wanted, rtol=1e-8, atol=1e-9, msg=name)


def test_attend_is_the_frame_s_part_of_it() -> None:
    random = torch.Generator().manual_seed(1)
    q, x = (torch.randn(5, n, WIDTH, generator=random, dtype=torch.float64) for n in (3, 16))
    for compress in MODES:
        ours = layer(compress, block=2).attend(q, x)
        torch.testing.assert_close(
            ours, Eager(published_state(), compress).tokens(q, x), rtol=1e-9, atol=1e-9
        )
    assert torch.equal(layer("mean").attend(q[:0], x[:0]), torch.empty(0, 2, LM, dtype=torch.float64))


def test_attend_takes_the_q_former_s_rows_too() -> None:
    """Rows of its own width are projected by `query`; those of the tower's width are taken to be projected."""
    module, random = layer("grid:2"), torch.Generator().manual_seed(1)
    rows = torch.randn(5, 3, CONFIG.hidden, generator=random, dtype=torch.float64)
    x = torch.randn(5, 16, WIDTH, generator=random, dtype=torch.float64)
    assert CONFIG.hidden != WIDTH
    assert torch.equal(module.attend(rows, x), module.attend(module.query(rows), x))


@pytest.mark.parametrize(
    ("compress", "patches", "tokens"),
    [("none", 256, 256), ("mean", 7, 1), ("grid:4", 256, 16), ("grid:2", 256, 4), ("grid:3", 16, 16), ("grid:2", 25, 4),
     ("grid:5", 49, 49), ("grid:4", 576, 16)],
)  # fmt: skip
def test_token_counts(compress: str, patches: int, tokens: int) -> None:
    assert content_tokens(compress, patches) == tokens


@pytest.mark.parametrize("block", [1, 2, 5, 6, 64])
def test_blocks_of_frames_change_nothing(block: int) -> None:
    """Blocks cut through samples: 2 x 3 frames in blocks of 5."""
    x = inputs()
    torch.testing.assert_close(layer(block=block)(**x), layer(block=3)(**x), rtol=1e-12, atol=1e-12)
    single = {k: v.float() if v.is_floating_point() else v for k, v in x.items()}
    whole, parts = layer().float()(**single), layer(block=block).float()(**single)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_a_tower_runs_block_by_block() -> None:
    x, seen = inputs(), []

    def tower(pictures: Tensor) -> Tensor:
        seen.append(len(pictures))
        return pictures.float() * 2

    ours = layer(block=4)(x.pop("frames"), **x, tower=tower)
    doubled = inputs()["frames"].float() * 2
    assert seen == [4, 2]
    torch.testing.assert_close(ours, layer()(doubled.double(), **x), rtol=1e-12, atol=1e-12)


def test_prompts_and_samples_do_not_meet() -> None:
    x, module = inputs(), layer()
    both = module(**x)
    for i in range(2):
        for j in range(2):
            one = {"text_ids": x["text_ids"][i, j], "text_mask": x["text_mask"][i, j]}
            alone = module(x["frames"][i][None], **{k: v[None, None] for k, v in one.items()})
            torch.testing.assert_close(both[i, j], alone[0, 0], rtol=1e-12, atol=1e-12)


def test_what_pads_the_text_changes_nothing() -> None:
    """The padding's embedding is NaN: tokens and gradients stay as they are, bit for bit."""
    x = inputs()
    x["text_ids"] = torch.where(x["text_mask"], x["text_ids"], PAD)
    beyond = {**x, "text_ids": torch.where(x["text_mask"], x["text_ids"], -100)}
    assert torch.equal(layer()(**x), layer()(**beyond))
    clean, dirty = layer(), layer()
    with torch.no_grad():
        dirty.qformer.embedding.weight[PAD] = torch.nan
    found = []
    for module in (clean, dirty):
        tokens = module(**x)
        tokens.square().sum().backward()
        found.append((tokens, {n: p.grad for n, p in module.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    for name, grad in found[0][1].items():
        if name != "qformer.embedding.weight":
            assert torch.equal(grad, found[1][1][name]), name


def test_frames_cost_what_their_tokens_cost() -> None:
    """Eight times the frames take the same workspace: the rest of the peak is the tokens, joined at the end."""

    def extra(frames: int, block: int = 4) -> float:
        x = torch.randn(1, frames, 64, WIDTH)
        ids = torch.ones(1, 1, TEXT, dtype=torch.int64)
        module = layer(block=block).float()
        with torch.no_grad():
            return extra_bytes(lambda: module(x, ids), "cpu")

    small, large = extra(16), extra(128)
    tokens = 2 * LM * 4
    assert large - small <= 2 * 112 * tokens + 4096
    assert extra(128, 128) > 8 * small  # all frames at once


def test_nothing_of_every_query_s_value_is_kept() -> None:
    """Forward and backward of the core hold no keys and no [Q, C] per frame beyond the absorbed queries."""
    frames, queries, patches, width = 8, 4, 256, 64
    module = ContextAttention(width, 8, qformer=_wide(width), block=frames)
    q, x = torch.randn(frames, queries, width), torch.randn(frames, patches, width)
    with torch.no_grad():
        assert extra_bytes(lambda: module.attend(q, x), "cpu") < x.nbytes / 4


def _wide(width: int) -> Any:
    return type(QFORMER)(**{**vars(QFORMER), "image_width": width})


def test_empty_video_and_no_prompts() -> None:
    module, x = layer(), inputs()
    assert module(x["frames"][:, :0], x["text_ids"]).shape == (2, 2, 0, 2, LM)
    assert module(x["frames"][:0], x["text_ids"][:0]).shape == (0, 2, 3, 2, LM)
    assert module(x["frames"], x["text_ids"][:, :0]).shape == (2, 0, 3, 2, LM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compress", ["mean", "grid:2"])
def test_the_core_is_as_exact_as_the_published_one(compress: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(1)
    q, x = (torch.randn(5, n, WIDTH, generator=random, dtype=torch.float64) for n in (3, 16))
    exact = Eager(published_state(), compress).tokens(q, x)
    state = {k: v.to(dtype) for k, v in published_state().items()}
    plain = Eager(state, compress).tokens(q.to(dtype), x.to(dtype)).double()
    ours = layer(compress).to(dtype).attend(q.to(dtype), x.to(dtype))
    assert ours.dtype == dtype
    allowed = 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_lower_precisions_run_through(how: str) -> None:
    x = inputs()
    exact, module, dtype = layer()(**x), layer(), torch.bfloat16 if how == "bfloat16" else torch.float32
    x["frames"] = x["frames"].to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        tokens = module.to(dtype)(**x)
    tokens.float().sum().backward()
    assert tokens.dtype == torch.bfloat16
    torch.testing.assert_close(tokens.double(), exact, rtol=0.1, atol=0.1)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())


def test_the_layer_compiles_into_one_graph() -> None:
    x, module = inputs(frames=1, prompts=1), layer()
    whole = torch.compile(module, backend="aot_eager", fullgraph=True)(**x)
    torch.testing.assert_close(whole, module(**x), rtol=1e-12, atol=1e-12)


def test_bad_input_is_refused_by_name() -> None:
    x, module = inputs(), layer()
    frames, ids, mask = x.values()
    for error, match, call in (
        (ValueError, "frames: got shape .*B = 2", lambda: module(frames[:1], ids)),
        (ValueError, "frames: got shape", lambda: module(frames[..., :3], ids)),
        (ValueError, "frames: got shape", lambda: module(frames[0, 0], ids[:1])),
        (ValueError, "text_ids: got shape", lambda: module(frames, ids[:, 0])),
        (ValueError, "text_mask: got shape", lambda: module(frames, ids, mask[..., :2])),
        (TypeError, "text_mask: got torch.int64", lambda: module(frames, ids, mask.long())),
        (TypeError, "text_ids: got torch.float64", lambda: module(frames, ids.double())),
        (ValueError, "max_positions = 9", lambda: module(frames, ids.repeat(1, 1, 2))),
        (ValueError, "patches: got 0 patches", lambda: module(frames[:, :, :0], ids)),
        (ValueError, "patches: got 6 patches a frame, expected a square", lambda: layer("grid:2")(frames[:, :, :6], ids)),
        (ValueError, "expected a grid of at most 4", lambda: layer("grid:5")(frames, ids)),
        (ValueError, "text_queries: got shape", lambda: module.attend(frames[0, :, :3, :4], frames[0])),
        (ValueError, "patches: got shape", lambda: module.attend(frames[0, :1, :3], frames[0])),
        (ValueError, "got 0 queries", lambda: module.attend(frames[0, :, :0], frames[0])),
        (ValueError, "compress: got 'grid:1'", lambda: layer("grid:1")),
        (ValueError, "compress: got 'grid:x'", lambda: layer("grid:x")),
        (ValueError, "compress: got 'max'", lambda: layer("max")),
        (ValueError, "compress: got None", lambda: content_tokens(None, 4)),  # type: ignore[arg-type]
        (ValueError, "select: got 'cls'", lambda: layer(select="cls")),
        (ValueError, "block: got 0", lambda: layer(block=0)),
        (ValueError, "qformer: got image_width = 12", lambda: ContextAttention(8, LM, qformer=QFORMER)),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()


def test_published_files_load_strictly() -> None:
    state = published_state()
    whole = {f"model.{key}": value for key, value in state.items()}
    whole |= {"model.layers.0.mlp.up_proj.weight": torch.zeros(2), "lm_head.weight": torch.zeros(2)}
    module = layer(state=whole)
    assert torch.equal(module.qformer.query_tokens, state["vlm_att_query"][0])
    assert torch.equal(module.content_down.weight, state["mm_projector.2.weight"])
    assert not any("lm_" in name for name in module.state_dict())
    with pytest.raises(ValueError, match=r"missing: vlm_att_query.*left over: vlm_att_queries"):
        layer(
            state={
                **{k: v for k, v in state.items() if k != "vlm_att_query"},
                "vlm_att_queries": torch.ones(1),
            }
        )


def test_keeping_every_token() -> None:
    """`select="all"` makes the class token a patch like the others."""
    x, module = inputs(), layer("none", select="all")
    assert module(**x).shape[3] == 1 + 17
    q = module.query(
        module.qformer(
            module.norm(x["frames"][0]), text_ids=x["text_ids"][0, 0].expand(3, -1), mode="instruct"
        )[:, : CONFIG.num_query]
    )
    torch.testing.assert_close(module(**x)[0, 0], module.attend(q, x["frames"][0]), rtol=1e-9, atol=1e-9)

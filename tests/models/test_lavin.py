"""LaVIN against its published computation: training with and without a picture, decoding, weights; sizes and stages."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import published_lavin as published
import pytest
import torch
from torch import Tensor

from mmkernels import models, weights
from mmkernels.layers import VisionConfig, VisionTower
from mmkernels.layers.attention import rotary_table, rotate
from mmkernels.layers.decoder_tables import halves
from mmkernels.models import LavinConfig

TINY: Any = models.config("lavin-tiny")


def small(half: bool = False, reads: str = "first_image", **changes: Any) -> LavinConfig:
    """Narrow, with LaVIN's proportions: class tokens after every second block of four, quick GELU."""
    dtype = torch.float16 if half else None
    adapter = replace(TINY.lm.block.adapter, router_dtype=dtype)
    vision = VisionConfig(
        image_size=16, patch_size=8, width=32, layers=4, heads=2, hidden=64, class_every=2,
        adapter=replace(adapter, reads=reads),
    )  # fmt: skip
    block = replace(TINY.lm.block, width=48, heads=4, hidden=40, adapter=adapter)
    lm = replace(TINY.lm, block=block, layers=2, vocab=64)
    marks = models.lavin.Marks(modality=-201, bos=1, image_prefix=(60, 61), text_prefix=(60, 62, 63))
    made = replace(
        TINY, vision=vision, lm=lm, marks=marks, tokens=replace(TINY.tokens, image=-200), visual_dtype=dtype
    )
    return replace(made, **changes)


def loaded(config: LavinConfig, s: published.State) -> models.Lavin:
    model: Any = models.build(config, dtype=torch.float64).eval()
    weights.load(model, published.leftovers(s), source="lavin")
    return model


def batch(config: LavinConfig, has: list[int], t: int = 14) -> tuple[Tensor, Tensor, Tensor]:
    """Ids that begin with bos, labels of their second half, pictures: black where there is none."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 60, (len(has), t), generator=g)
    ids[:, 0] = config.marks.bos
    ids[0, t - 3 :] = 0
    labels = torch.where(torch.arange(t) >= t // 2, ids, 0)
    size = config.vision.image_size
    images = torch.randn(len(has), 1, 3, size, size, generator=g, dtype=torch.float64)
    return ids, labels, images * torch.tensor(has)[:, None, None, None, None]


def rows_of(
    config: LavinConfig, ids: Tensor, labels: Tensor, has: list[int], length: int
) -> tuple[Tensor, Tensor]:
    """The published layout as ids, cut to `length`."""
    n, m = len(ids), config.marks
    picture = ids.new_full((n, config.places), config.tokens.image)
    some, none = torch.tensor(m.image_prefix), torch.tensor(m.text_prefix)
    kind = ids.new_full((n,), m.modality)
    rows, answers = models.lavin.insert_images(
        ids, labels, picture, some, none, torch.tensor(has), modality=kind, length=length
    )
    assert answers is not None
    return rows, answers


@pytest.mark.parametrize("half", [False, True], ids=["exact", "rounded"])
def test_a_mixed_batch_trains_as_published(half):
    config, has = small(half), [1, 0, 1]
    s = {k: v.requires_grad_("adapter" in k) for k, v in published.state(config).items()}
    ids, labels, images = batch(config, has)
    model = loaded(config, {k: v.detach() for k, v in s.items()})
    rows, answers = rows_of(config, ids, labels, has, ids.shape[1])
    output = model(images, rows, labels=answers)
    loss, logits = published.loss(config, s, ids, labels, images[:, 0], has, half)
    torch.testing.assert_close(output.logits, logits)
    torch.testing.assert_close(output.loss, loss.to(output.loss.dtype))
    (output.logits * 0.01).square().sum().backward()
    (logits * 0.01).square().sum().backward()
    grads, expected = ({n: p.grad for n, p in of} for of in (model.named_parameters(), s.items()))
    tolerance = {"rtol": 1e-2, "atol": 1e-4} if half else {}
    pairs = [("adapter_modality_embedding.weight",) * 2, ("adapter_proj.0.bias", "adapter_proj.conv_A.bias")]
    for ours, theirs, count in (
        ("lm.blocks", "layers", 2),
        ("vision.blocks", "backbone.visual.transformer.resblocks", 4),
    ):
        for i in range(count):
            a, b = f"{ours}.{i}.adapter.", f"{theirs}.{i}.adapter_attn."
            pairs += [
                (a + "router.weight", b + "expert_weights.weight"),
                (a + "down.bias", b + "conv_A.bias"),
            ]
            joined: Any = [expected[b + f"conv_{n}.weight"] for n in "BD"]
            torch.testing.assert_close(grads[a + "up"], torch.stack(joined).squeeze(-1), **tolerance)
    for ours, theirs in pairs:
        torch.testing.assert_close(grads[ours], expected[theirs], **tolerance)
    assert {n for n, g in grads.items() if g is not None} == {n for n in grads if "adapter" in n}


@torch.no_grad()
def test_how_pictures_of_a_batch_are_routed():
    """As published by the first one; by themselves they give what each gives in a batch of one."""
    config = small()
    s = published.state(config)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    together = published.encode_image(config, s, images, half=False)
    alone = torch.cat([published.encode_image(config, s, one[None], half=False) for one in images])
    for reads, expected in (("first_image", together), ("token", alone)):
        tower = VisionTower(
            replace(config.vision, adapter=replace(config.vision.adapter, reads=reads))
        ).double()
        weights.load(tower.eval(), s | {"backbone.visual.proj": torch.ones(1)}, source="lavin")
        torch.testing.assert_close(tower(images), expected)
    assert not torch.allclose(together, alone)


@torch.no_grad()
def test_the_plain_adapter_of_towers():
    config = small()
    config = replace(
        config, vision=replace(config.vision, adapter=replace(config.vision.adapter, routed=False))
    )
    s, images = published.state(config), torch.randn(2, 1, 3, 16, 16, dtype=torch.float64)
    expected = published.project(s, published.encode_image(config, s, images[:, 0], half=False))
    torch.testing.assert_close(loaded(config, s).encode(images)[:, 0], expected)


@pytest.mark.parametrize("lag", [0, 1], ids=["as_trained", "published"])
@torch.no_grad()
def test_decoding(lag):
    config = small(decode_lag=lag)
    s, (ids, _, images) = published.state(config), batch(config, [1])
    model, has = loaded(config, s), [1]
    prompt = rows_of(config, ids[:, :6], ids[:, :6], has, 6 + 2 + 2 + 1)[0]
    new = model.generate(images, prompt, max_new_tokens=6, stop=())
    lm = published.Llama(config, s, half=False)
    visual = published.project(s, published.encode_image(config, s, images[:, 0], half=False))
    table = s["tok_embeddings.weight"]
    text = torch.cat([table[ids[:, :1]], table[60:62][None], visual, table[ids[:, 1:6]]], 1)
    start = torch.cat([s["adapter_modality_embedding.weight"][None, 1:], text], 1)
    logits, position, found = lm.step(start, 0, keep=True)[:, -1], start.shape[1] - lag, []
    for _ in range(6):
        token = logits.argmax(-1)
        found.append(token)
        logits = lm.step(table[token][:, None], position, keep=True)[:, -1]
        position += 1
    assert torch.equal(new, torch.stack(found, 1))


@torch.no_grad()
def test_steps_from_a_cache_equal_the_whole_and_padding_changes_nothing():
    model: Any = models.build("lavin-tiny").eval()
    for p in model.parameters():
        p.normal_(std=0.2)
    prompts = [torch.tensor([[2, 40, 41, 42, 43]]), torch.tensor([[50, 51]])]
    images, both = torch.randn(2, 1, 3, 32, 32), torch.tensor([[2, 40, 41, 42, 43], [50, 51, 0, 0, 0]])
    ids, mask = model.expand(both, both != 0)
    whole = model(images, ids, mask).logits
    cache = model.new_cache(1, 12)
    first = ids[:1, :8]
    parts = [model(images[:1], first, cache=cache).logits]
    assert cache.text.start.tolist() == [1] and sorted(cache.text.kept) == [0, 1, 2, 3]
    parts += [model(input_ids=part, cache=cache).logits for part in ids[:1, 8:].split((1, 2, 1), 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole[:1], rtol=1e-3, atol=1e-3)
    together = model.generate(images, ids, mask, max_new_tokens=5, stop=())
    for n, prompt in enumerate(prompts):
        row, _ = model.expand(prompt)
        for _ in range(5):  # without a cache
            token = model(images[n : n + 1] if n == 0 else None, row).logits[:, -1].argmax(-1)
            row = torch.cat([row, token[:, None]], 1)
        assert torch.equal(together[n], row[0, -5:]), n


@torch.no_grad()
def test_the_modality_acts_through_the_routers_alone():
    model: Any = models.build("lavin-tiny").eval()
    ids, _ = model.expand(torch.tensor([[40, 41, 42]]))
    plain = model(input_ids=ids).logits
    model.adapter_modality_embedding.weight[0] += 1
    changed = model(input_ids=ids).logits  # fresh adapters: nothing to choose between
    assert torch.equal(changed[:, 1:], plain[:, 1:]) and not torch.equal(changed[:, 0], plain[:, 0])
    for block in model.lm.blocks:
        block.adapter.up[0].normal_()
    before = model(input_ids=ids).logits
    model.adapter_modality_embedding.weight[0] += 1
    assert not torch.allclose(model(input_ids=ids).logits[:, 1:], before[:, 1:])


def test_sizes():
    adapter = lambda width: 8 * width + 8 + 2 * (4 * width + width) + 2 * width + 2  # noqa: E731
    for name, layers, width, billions in (("lavin-7b", 32, 4096, 7.05), ("lavin-13b", 40, 5120, 13.33)):
        model: Any = models.build(name, device="meta", dtype=torch.bfloat16)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        count = sum(p.numel() for p in trained.values())
        assert count == (
            layers * adapter(width) + 24 * adapter(1024) + 1024 * 128 + 128 + 128 * width + width + 2 * width
        )
        assert set(trained) == {n for n, _ in model.named_parameters() if "adapter" in n}
        assert all(
            p.dtype == (torch.float32 if "adapter" in n else torch.bfloat16)
            for n, p in model.named_parameters()
        )
        assert abs(sum(p.numel() for p in model.parameters()) / 1e9 - billions) < 0.01
        assert model.config.places == 6
        if name == "lavin-7b":
            assert count == 3_781_296  # "3.8 M"
        groups = {g["weight_decay"]: g["params"] for g in model.stages()[-1].parameter_groups(model)}
        assert set(groups) == {0.0, 0.02} and sum(map(len, groups.values())) == len(trained)
        decayed = {id(p) for p in groups[0.02]}
        assert all((id(p) in decayed) == ("bias" not in n) for n, p in trained.items())
    assert models.config("lavin-13b-chat").lm.block.adapter.temperature == 5  # type: ignore[union-attr]


def test_what_is_frozen_stays_as_it_is_bit_for_bit():
    torch.manual_seed(0)
    model: Any = models.build("lavin-tiny").train()
    stage = model.stages()[-1]
    stage.freeze(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(stage.parameter_groups(model), lr=1e-2, betas=stage.betas)
    ids, mask = model.expand(torch.tensor([[2, 40, 41, 42], [40, 41, 42, 43]]))
    images = torch.randn(2, 1, 3, 32, 32) * torch.tensor([1.0, 0.0])[:, None, None, None, None]
    losses = []
    for _ in range(4):
        loss = model(images, ids, mask, torch.where(mask, ids, 0)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "adapter" in n}


def test_a_file_of_adapters_alone_is_enough():
    config = small()
    s = {k: v for k, v in published.state(config).items() if "adapter" in k}
    model: Any = models.build(config)
    before = copy.deepcopy(model.lm.embedding.weight)
    weights.load(model, s, source="lavin")
    assert torch.equal(model.lm.embedding.weight, before)
    torch.testing.assert_close(
        model.lm.blocks[1].adapter.up[1].double(),
        s["layers.1.adapter_attn.conv_D.weight"].squeeze(-1),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    del s["layers.1.adapter_attn.conv_D.bias"]
    with pytest.raises(ValueError, match=r"missing: layers\.1\.adapter_attn\.conv_D\.bias"):
        weights.load(model, s, source="lavin")


def test_rotary_pairs_become_halves_also_with_fewer_keys_than_queries():
    h, g, d, t, c = 4, 2, 6, 5, 7
    rows, x = torch.randn((h + 2 * g) * d, c, dtype=torch.float64), torch.randn(1, t, c, dtype=torch.float64)
    table = rotary_table(torch.arange(t)[None], d, 10_000.0, torch.float64)
    ours = (x @ halves(rows, h, g).T).unflatten(-1, (-1, d))
    theirs = (x @ rows.T).unflatten(-1, (-1, d))
    assert torch.equal(ours[:, :, h + g :], theirs[:, :, h + g :])
    a, b = rotate(ours[:, :, : h + g], table), published._turn(theirs[:, :, : h + g], 0)
    scores = [
        torch.einsum("bihd,bjhd->bhij", y[:, :, :h], y[:, :, h:].repeat_interleave(2, 2)) for y in (a, b)
    ]
    torch.testing.assert_close(*scores)

"""MoE-LLaVA: published sizes, its loss, its three stages, placements, its files' names, generation and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from published_moe_llava import published
from torch import nn

from mmkernels import models, weights
from mmkernels.layers import MLP, MoE
from mmkernels.models import language
from mmkernels.models.base import next_token_loss

IMAGE, PAD = 2, 0


def _tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    return models.build(replace(models.config("moe_llava-tiny"), **changes))


def _batch(model: Any, rows: int = 3) -> dict[str, Any]:
    torch.manual_seed(1)
    prompts = torch.randint(4, 500, (rows, 6))
    prompts[:, 1], prompts[0, 5:] = IMAGE, PAD
    ids, mask = model.expand(prompts)
    return {"images": torch.randn(rows, 1, 3, 32, 32), "input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize(
    ("name", "total", "activated", "experts"),
    [
        ("moe_llava-phi2-2.7bx4-top2", 5.3, 3.6, 16), ("moe_llava-stablelm-1.6bx4-top2", 2.9, 2.0, 12),
        ("moe_llava-qwen-1.8bx4-top2", 3.1, 2.2, 12),
    ],
)  # fmt: skip
def test_presets_have_the_published_sizes(name, total, activated, experts):
    model: Any = models.build(name, device="meta")
    found = model.parameters_of_lm()
    assert abs(found.total / 1e9 - total) < 0.065 and abs(found.activated / 1e9 - activated) < 0.065
    moes = [n for n, block in enumerate(model.lm.blocks) if isinstance(block.mlp, MoE)]
    assert moes == list(range(0, 2 * experts, 2)) and model.config.places == 576
    moe = model.lm.blocks[0].mlp
    assert moe.train().capacity(1000) == 750 and moe.eval().capacity(1000) == 1000
    assert [stage.name for stage in model.stages()] == ["projector", "instructions", "experts"]
    dense: Any = model
    dense.enter(model.stages()[0])
    assert dense.parameters_of_lm().total == dense.parameters_of_lm().activated < found.activated * 1e9


def test_the_loss_has_a_hundredth_of_every_layers_balance():
    model = _tiny(placement="dense")
    batch = _batch(model)
    output = model(**batch, labels=batch["input_ids"])
    assert len(output.routings) == 4 and output.aux_loss > 3
    plain = next_token_loss(output.logits, batch["input_ids"])
    torch.testing.assert_close(output.loss, plain + 0.01 * sum(r.aux_loss for r in output.routings))
    model.enter(model.stages()[0])
    output = model(**batch, labels=batch["input_ids"])
    assert output.aux_loss is None and torch.equal(
        output.loss, next_token_loss(output.logits, batch["input_ids"])
    )


@pytest.mark.parametrize(
    ("placement", "layers"),
    [
        ("sparse", [0, 2]),
        ("dense", [0, 1, 2, 3]),
        ("first_half", [0, 1]),
        ("second_half", [2, 3]),
        (3, [0, 3]),
        ((1,), [1]),
    ],
)
def test_experts_stand_where_they_are_placed(placement, layers):
    model = _tiny(placement=placement)
    assert [n for n, block in enumerate(model.lm.blocks) if isinstance(block.mlp, MoE)] == layers
    assert len(model(**_batch(model)).routings) == len(layers)


def test_every_stage_moves_what_it_trains_and_nothing_else():
    model = _tiny()
    batch = _batch(model)
    wanted = {
        "towers": lambda n: n.startswith("lm."),  # the tower learns from a loss of its own
        "projector": lambda n: n.startswith("projector."),
        "instructions": lambda n: n.startswith(("projector.", "lm.")),
        "experts": lambda n: n.startswith("lm.blocks.") and ".mlp." in n,
    }
    for stage in model.stages():
        model.enter(stage)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0
        )
        images = None if stage.name == "towers" else batch["images"]
        ids = (
            torch.where(batch["input_ids"] == IMAGE, 9, batch["input_ids"])
            if images is None
            else batch["input_ids"]
        )
        model(images, ids, batch["attention_mask"], ids).loss.backward()
        optimizer.step()
        model.zero_grad()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == {n for n in before if wanted[stage.name](n)}, stage.name


def test_the_last_stage_begins_with_copies_that_compute_the_same():
    model = _tiny().eval()
    model.enter(model.stages()[2])
    assert all(isinstance(block.mlp, MLP) for block in model.lm.blocks)
    batch = _batch(model)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**batch).logits
        model.enter(model.stages()[3])
        after = model(**batch).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    for layer in (0, 2):
        moe, mlp = model.lm.blocks[layer].mlp, dense.lm.blocks[layer].mlp
        assert (
            isinstance(moe, MoE)
            and not moe.training
            and moe.w_in.requires_grad
            and moe.gate.weight.requires_grad
        )
        assert all(torch.equal(moe.w_in[e], mlp.up.weight) for e in range(4))
    model.enter(model.stages()[3])  # it has its experts already
    assert torch.equal(model.lm.blocks[0].mlp.w_in[0], dense.lm.blocks[0].mlp.up.weight)


@torch.no_grad()
def test_generation_gives_each_row_what_it_would_give_alone():
    model = _tiny().eval()
    batch = _batch(model)
    together = model.generate(**batch, max_new_tokens=5, stop=())
    for row in range(3):
        mask = batch["attention_mask"][row : row + 1]
        ids = batch["input_ids"][row : row + 1][mask].unsqueeze(0)
        alone = model.generate(batch["images"][row : row + 1], ids, max_new_tokens=5, stop=())
        assert torch.equal(alone[0], together[row])
    other = model.generate(
        batch["images"].flip(0), batch["input_ids"], batch["attention_mask"], max_new_tokens=5, stop=()
    )
    assert not torch.equal(together, other)


def test_blocks_that_compute_again_have_the_same_gradients_of_the_balance_too():
    model = _tiny()
    batch, found = _batch(model), []
    for recompute in (False, True):
        model.recompute = recompute
        output = model(**batch, labels=batch["input_ids"])
        output.loss.backward()
        found.append([output.aux_loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert len(output.routings) == 2
        model.zero_grad()
    assert len(found[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_padding_is_zero_when_it_is_routed():
    model = _tiny()
    batch = _batch(model)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"], batch["input_ids"], 77)}
    a, b = model(**batch), model(**other)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.aux_loss, b.aux_loss)
    assert a.routings[0].experts.shape[0] == batch["input_ids"].numel()


def test_a_batch_without_pictures_reaches_what_learns():
    model = _tiny()
    model.enter(model.stages()[1])
    ids = torch.randint(4, 500, (2, 5))
    model(None, ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.projector.parameters())


@pytest.mark.parametrize("lm", [language.PHI_2, language.QWEN_1_8B], ids=["phi", "qwen"])
def test_released_files_load_by_their_names(lm):
    block = replace(lm.block, width=32, heads=4, hidden=48)
    config = replace(models.config("moe_llava-tiny"), lm=replace(lm, block=block, layers=3, vocab=512))
    torch.manual_seed(0)
    here: Any = models.build(config)
    for p in here.parameters():
        nn.init.normal_(p, std=0.1)
    state, batch = published(here), _batch(here)
    there: Any = models.build(config)
    there.vision.load_state_dict(here.vision.state_dict())
    weights.load(there, state, source="moe_llava")
    assert torch.equal(there.eval()(**batch).logits, here.eval()(**batch).logits)
    gate = next(key for key in state if "wg" in key)
    with pytest.raises(ValueError, match=r"missing: .*wg\.weight"):
        weights.load(there, {k: v for k, v in state.items() if k != gate}, source="moe_llava")
    with pytest.raises(ValueError, match=r"left over: .*extra"):
        weights.load(there, {**state, "extra": torch.ones(1)}, source="moe_llava")
    here.enter(here.stages()[2])
    there.enter(there.stages()[2])
    weights.load(there, published(here), source="moe_llava")  # a dense stage's file
    assert torch.equal(there(**batch).logits, here(**batch).logits)


def test_what_does_not_fit_is_refused():
    model = _tiny()
    batch = _batch(model)
    with pytest.raises(
        ValueError, match=r"got 48 places for visual tokens \(by row: 16, 16, 16\), expected 0"
    ):
        model(None, batch["input_ids"])
    with pytest.raises(ValueError, match="placement: got 'some'"):
        _tiny(placement="some")

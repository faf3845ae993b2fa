"""The Flamingo model: sizes, placement, what reaches what, the media-time rules of decoding, and what a step trains."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import CHUNK, END, PAD, pictures, text_ids

from mmkernels import models
from mmkernels.models.base import next_token_loss


def _clip_l() -> int:
    block = 4 * 1024**2 + 4 * 1024 + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    return 3 * 14 * 14 * 1024 + 1024 + 257 * 1024 + 2 * 1024 + 24 * block


def _connector(width: int, blocks: int) -> int:
    layer = 4 * 1024 + 512 * 1024 + 1024 * 1024 + 512 * 1024 + 2 * 1024 + 2 * 1024 * 4096
    block = 2 * width + 512 * width + 2 * 512 * 1024 + 512 * width + 2 * width + 8 * width**2 + 2
    return 64 * 1024 + 6 * layer + 2 * 1024 + blocks * block


def _mpt(width: int, layers: int, extra: int = 0) -> int:
    return 50_432 * width + layers * (12 * width**2 + 2 * width + extra) + width


def _gpt_neox(width: int, layers: int) -> int:
    return 2 * 50_432 * width + layers * (12 * width**2 + 9 * width + 4 * width) + 2 * width


PUBLISHED = {
    "flamingo-3b": _clip_l() + _connector(2048, 24) + _mpt(2048, 24, extra=2 * 2048),
    "flamingo-4b": _clip_l() + _connector(2560, 16) + _gpt_neox(2560, 32),
    "flamingo-9b": _clip_l() + _connector(4096, 8) + _mpt(4096, 32),
    "otter-9b": _clip_l() + _connector(4096, 8) + _mpt(4096, 32),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_size(name):
    model = models.build(name, device="meta", dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / PUBLISHED[name] - 1) < 1e-3
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())
    joints = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("resampler.", "cross.")))
    assert joints == _connector(model.config.lm.block.width, len(model.cross))


def test_names_that_do_not_exist_are_refused_with_a_hint():
    assert set(PUBLISHED) | {"flamingo-tiny"} <= set(models.list())
    with pytest.raises(ValueError, match="did you mean 'flamingo-9b'"):
        models.build("flamingo-9")


@pytest.mark.parametrize(
    ("placement", "every", "order"),
    [
        ("open_flamingo", 2, "0x1 2x3"),
        ("idefics", 2, "x0 1x2 3"),
        ("after", 2, "0x1 2x3"),
        ("open_flamingo", 3, "0 1x2 3"),
    ],
)
def test_blocks_stand_where_the_published_ones_do(placement, every, order):
    config = models.config("flamingo-tiny")
    model = models.build(replace(config, cross=replace(config.cross, placement=placement, every=every)))
    ran: list[str] = []
    for n, block in enumerate(model.lm.blocks):
        block.register_forward_hook(lambda *_, n=n: ran.append(str(n)))
    for block in model.cross:
        block.register_forward_hook(lambda *_: ran.append("x"))
    model(input_ids=text_ids("Iab"))
    assert "".join(ran) == order.replace(" ", "")


def test_text_sees_neither_later_text_nor_later_images(model):
    ids, images = text_ids("abIcdIef"), pictures(1, 2)
    with torch.no_grad():
        logits = model(images, ids).logits
        other = images.clone()
        other[:, 1] += 1
        changed = model(other, ids).logits
        assert torch.equal(changed[:, :5], logits[:, :5]) and not torch.equal(changed[:, 5], logits[:, 5])
        changed = model(images, text_ids("abIcdIeg")).logits
        assert torch.equal(changed[:, :7], logits[:, :7])


def test_samples_of_a_batch_do_not_meet(model):
    ids, images = text_ids("Iabcd", "aIbIc"), pictures(2, 2)
    with torch.no_grad():
        both = model(images, ids).logits
        for n in range(2):
            alone = model(images[n : n + 1], ids[n : n + 1]).logits
            torch.testing.assert_close(both[n : n + 1], alone, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_encoded_media_stand_for_their_images(model):
    ids, images = text_ids("IabIcd"), pictures(1, 2)
    assert torch.equal(model(images, ids).logits, model(input_ids=ids, media=model.encode(images)).logits)


def test_videos_are_frames_of_one_medium(model):
    ids, video = text_ids("Iab"), pictures(1, 1, 4)
    with torch.no_grad():
        still, moving = model(video[:, :, :1], ids).logits, model(video, ids).logits
        assert torch.equal(still, model(video[:, :, 0], ids).logits)
    assert moving.shape == still.shape and not torch.equal(moving, still)
    with pytest.raises(ValueError, match="max_frames = 8"):
        model(pictures(1, 1, 9), ids)


def test_labels():
    tokens = models.config("flamingo-tiny").tokens
    ids = text_ids("abIcdCeIfCE...", "...ICabIIcdCCx")
    want = text_ids("...cdC..fC....", "....C....cdC..")
    expect = torch.where(want == PAD, -100, want)
    assert torch.equal(models.flamingo_labels(ids, tokens), expect)
    mask = ids != PAD
    mask[0, 5] = False
    masked = models.flamingo_labels(ids, tokens, mask)
    assert masked[0, 5] == -100 and torch.equal(masked[1], expect[1])
    pairs = models.flamingo_labels(text_ids("IabCE.."), tokens, interleaved=False)
    assert pairs.tolist() == [[-100, ord("a"), ord("b"), CHUNK, END, -100, -100]]


def test_loss_is_the_mean_over_what_is_predicted(model):
    ids, images = text_ids("IabC", "IcC."), pictures(2, 1)
    labels = models.flamingo_labels(ids, model.tokens)
    out = model(images, ids, ids != PAD, labels)
    plain = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, plain)
    logits = out.logits.detach().requires_grad_()
    nothing = next_token_loss(logits, torch.full_like(labels, -100))
    nothing.backward()
    assert nothing == 0 and not logits.grad.any()


def test_a_step_trains_the_joints_and_the_special_rows_only(model):
    """Under AdamW with weight decay on everything, what is frozen stays as it is, bit for bit."""
    model = copy.deepcopy(model).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    stage = model.stages()[-1]
    stage.freeze(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(2):
        batches = {
            "pairs": {"images": pictures(2, 1), "input_ids": (ids := text_ids("IabCE", "IcCE.")),
                      "labels": models.flamingo_labels(ids, model.tokens, interleaved=False)},
            "interleaved": {"images": pictures(2, 2), "input_ids": (ids := text_ids("aIbCIcC", "IdefgCE")),
                            "labels": models.flamingo_labels(ids, model.tokens)},
        }  # fmt: skip
        optimizer.zero_grad()
        loss = model.loss(batches, stage)
        separate = {name: float(model(**batch).loss.detach()) for name, batch in batches.items()}
        assert float(loss.detach()) == pytest.approx(
            0.2 * separate["pairs"] + separate["interleaved"], rel=1e-5
        )
        loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        trained = name.startswith(("resampler.", "cross.")) or name == "lm.special_rows"
        assert (
            trained == (not torch.equal(parameter, before[name])) or name == "resampler.frame_embeddings"
        ), name
        assert trained == (parameter.grad is not None), name
    with pytest.raises(ValueError, match="batches: got"):
        model.loss({"pairs": {}}, stage)


def test_a_frozen_tower_records_no_gradient(model):
    recorded = []
    handle = model.vision.register_forward_hook(lambda m, i, out: recorded.append(out.requires_grad))
    model.encode(pictures(1, 1))
    model.vision.requires_grad_(True)
    model.encode(pictures(1, 1))
    model.vision.requires_grad_(False)
    handle.remove()
    assert recorded == [False, True]


@pytest.mark.parametrize("name", models.list())
def test_stages_name_parameters_that_exist(name):
    model = models.build(name, device="meta")
    if not isinstance(model, models.Flamingo):
        pytest.skip("another family's recipe")
    for stage in model.stages():
        stage.freeze(model)
        groups = stage.parameter_groups(model)
        assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in model.parameters())
        decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
        assert decayed <= {id(p) for p in model.cross.parameters()}
        assert set(stage.losses) == set(stage.mix)
    with pytest.raises(ValueError, match="nothing_like_it"):
        replace(stage, trainable=("nothing_like_it.*",)).freeze(model)


def test_text_alone(model):
    with torch.no_grad():
        plain, blind = model(input_ids=text_ids("abcd")), model(pictures(1, 1), text_ids("abcd"))
    torch.testing.assert_close(plain.logits, blind.logits)
    assert model.generate(None, text_ids("ab"), max_new_tokens=2, stop=()).shape == (1, 2)


def test_bad_input_is_refused_by_name(model):
    ids, images = text_ids("Iab"), pictures(1, 1)
    hole = torch.tensor([[True, False, True]])
    for error, match, call in (
        (ValueError, "input_ids: got None", lambda: model(images)),
        (ValueError, "input_ids: got shape", lambda: model(images, ids[0])),
        (ValueError, "input_ids: got ids 2 to 600", lambda: model(images, torch.tensor([[2, 600]]))),
        (TypeError, "input_ids: got torch.float32", lambda: model(images, ids.float())),
        (TypeError, "attention_mask: got torch.int64", lambda: model(images, ids, ids)),
        (ValueError, "attention_mask: got a row with a hole", lambda: model(images, ids, hole)),
        (ValueError, "labels: got shape", lambda: model(images, ids, labels=ids[:, 1:])),
        (ValueError, "images: got shape", lambda: model(images[0], ids)),
        (ValueError, "images: got shape", lambda: model(pictures(1, 1)[..., :16], ids)),
        (ValueError, "media: got shape", lambda: model(pictures(2, 1), ids)),
        (ValueError, "cache: got one while gradients", lambda: model(images, ids, cache=model.new_cache(1, 4))),
        (ValueError, "padding on the right", lambda: model.requires_grad_(False)(
            images, ids, torch.tensor([[True, True, False]]), cache=model.new_cache(1, 4))),
        (ValueError, "placement", lambda: models.build(replace(
            model.config, cross=replace(model.config.cross, placement="between")))),
        (ValueError, "every: got 9", lambda: models.build(replace(model.config, cross=replace(model.config.cross, every=9)))),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            call()
    model.config.stages[-1].freeze(model)


def test_the_whole_model_compiles_into_one_graph(model):
    ids, images = text_ids("IabCE", "aIbC."), pictures(2, 1)
    labels = models.flamingo_labels(ids, model.tokens)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)(images, ids, ids != PAD, labels)
    assert torch.equal(whole.logits, model(images, ids, ids != PAD, labels).logits)
    whole.loss.backward()
    assert model.cross[0].q.weight.grad.any()
    model.zero_grad()


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast", "narrow_towers"])
def test_lower_precisions_train_and_generate(model, how):
    """All parameters narrow; all wide under autocast; or, as one trains large models, frozen parts narrow, joints wide."""
    low, ids, images = copy.deepcopy(model).train(), text_ids("IabCIcC", "aIbCE.."), pictures(2, 2)
    dtype = torch.float16 if how == "float16" else torch.bfloat16
    if how in ("bfloat16", "float16"):
        low.to(dtype)
    if how == "narrow_towers":
        low.lm.to(dtype), low.vision.to(dtype)
    labels = models.flamingo_labels(ids, model.tokens)
    with torch.autocast("cpu", dtype, enabled=how in ("autocast", "narrow_towers")):
        loss = low(images, ids, ids != PAD, labels).loss
        assert low.generate(images, ids[:, :4], max_new_tokens=2, stop=()).shape == (2, 2)
    loss.backward()
    exact = model(images, ids, ids != PAD, labels).loss.detach()
    assert loss.dtype == torch.float32 and abs(float(loss.detach() - exact)) < 0.02 * float(exact)
    trained = [p for p in low.parameters() if p.requires_grad and p is not low.resampler.frame_embeddings]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)

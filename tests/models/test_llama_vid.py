"""LLaMA-VID: where visual tokens go, blocks of frames, long videos, decoding, and what a step trains."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tiny import text_ids

from mmkernels import models
from mmkernels.models.llama_vid import expand_images, pad_prompts, rotary_scaling


@pytest.fixture(scope="module")
def video_model() -> models.LlamaVid:
    torch.manual_seed(0)
    model = models.build("llama-vid-tiny")
    assert isinstance(model, models.LlamaVid)
    return model.eval()


def videos(batch: int, frames: int, images: int = 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(frames)
    return torch.randn(batch, images, frames, 3, 32, 32, generator=random)


def prompts(*rows: str) -> torch.Tensor:
    """One prompt a sample."""
    return text_ids(*rows).unsqueeze(1)


@torch.no_grad()
def test_visual_tokens_take_their_places_in_order(video_model: models.LlamaVid) -> None:
    """Two places a frame between words, as long videos are written, or in one run: row r of the media fills place r."""
    ids = text_ids("abIIcIId", "IIIIabcd")
    media = video_model.encode(videos(2, 2), prompts("what", "whoa"))
    assert media.shape == (2, 1, 4, 128)
    x = video_model.embed(ids, media)
    assert torch.equal(x[0, [2, 3, 5, 6]], media[0, 0]) and torch.equal(x[1, :4], media[1, 0])
    words = video_model.lm.embed(text_ids("ab", "cd"))
    assert torch.equal(x[0, :2], words[0]) and torch.equal(x[1, 6:], words[1])


@torch.no_grad()
def test_every_prompt_fills_its_own_run(video_model: models.LlamaVid) -> None:
    """Prompt j of a sample goes to its j-th place; two images are read by one prompt each."""
    both, asked = torch.stack([text_ids("what"), text_ids("whoa")], 1), videos(1, 3)
    media = video_model.encode(asked, both)
    assert media.shape == (1, 2, 6, 128)
    for j in range(2):
        assert torch.allclose(media[:, j : j + 1], video_model.encode(asked, both[:, j : j + 1]), atol=1e-5)
    expanded = expand_images(text_ids("IaIb"), video_model.tokens, 6)
    x = video_model.embed(expanded.ids, media)
    assert torch.equal(x[0, :6], media[0, 0]) and torch.equal(x[0, 7:13], media[0, 1])
    two = videos(1, 3, images=2)
    media = video_model.encode(two, both)
    assert torch.allclose(media[:, 1:], video_model.encode(two[:, 1:], both[:, 1:]), atol=1e-5)
    single = video_model.encode(asked[:, :, 0], both[:, :1])
    assert torch.allclose(single, video_model.encode(asked[:, :, :1], both[:, :1]))


@torch.no_grad()
def test_stored_features_stand_for_their_frames(video_model: models.LlamaVid) -> None:
    asked, prompt = videos(2, 5), prompts("what", "whoa")
    features = video_model.vision(asked.flatten(0, 2)).unflatten(0, (2, 1, 5))
    media = video_model.encode_features(features, prompt)
    assert torch.allclose(media, video_model.encode(asked, prompt), atol=1e-5)
    long = video_model.encode_features(features[..., 1:, :], prompt)  # stored without the class token
    assert long.shape == media.shape and not torch.allclose(long[..., ::2, :], media[..., ::2, :], atol=1e-5)
    assert torch.allclose(long[..., 1::2, :], media[..., 1::2, :], atol=1e-5)  # content never reads it


def test_blocks_of_frames_change_nothing(video_model: models.LlamaVid) -> None:
    asked, prompt = videos(2, 5), prompts("what", "whoa")
    whole = video_model.encode(asked, prompt)
    config = video_model.config
    small = models.build(replace(config, connector=replace(config.connector, block=3)))
    small.load_state_dict(video_model.state_dict())
    recorded: list[tuple[int, bool]] = []
    small.vision.register_forward_hook(lambda m, x, out: recorded.append((len(out), out.requires_grad)))  # type: ignore[union-attr]
    assert torch.allclose(small.eval().encode(asked, prompt), whole, atol=1e-5)  # type: ignore[call-arg]
    assert recorded == [
        (3, False),
        (3, False),
        (3, False),
        (1, False),
    ]  # a frozen tower keeps nothing for backward


def test_the_answer_depends_on_frames_order_and_prompt(video_model: models.LlamaVid) -> None:
    ids, asked, prompt = text_ids("IIIIab"), videos(1, 2), prompts("what")
    with torch.no_grad():
        logits = video_model(asked, ids, prompt_ids=prompt).logits[:, -1]
        for other, words in ((asked + 1, prompt), (asked.flip(2), prompt), (asked, prompts("whoa"))):
            assert not torch.allclose(
                video_model(other, ids, prompt_ids=words).logits[:, -1], logits, atol=1e-6
            )


@torch.no_grad()
def test_padding_of_prompts_changes_nothing(video_model: models.LlamaVid) -> None:
    asked = videos(2, 2)
    ids, mask = pad_prompts([[97, 98, 99], [97]])
    media = video_model.encode(asked, ids.unsqueeze(1), mask.unsqueeze(1))
    torch.testing.assert_close(media[1:], video_model.encode(asked[1:], ids[1:, :1].unsqueeze(1)))
    ids[1, 1:] = -100
    assert torch.equal(media, video_model.encode(asked, ids.unsqueeze(1), mask.unsqueeze(1)))


def test_long_prompts_lose_their_beginning() -> None:
    assert pad_prompts([[1, 2, 3, 4, 5]], limit=3)[0].tolist() == [[3, 4, 5]]
    assert pad_prompts([[1, 2, 3, 4, 5]], limit=3, first=1)[0].tolist() == [[1, 4, 5]]
    ids, mask = pad_prompts([[7, 8], [9]], pad=5, first=1, limit=3)
    assert ids.tolist() == [[7, 8], [9, 5]] and mask.tolist() == [[True, True], [True, False]]


@torch.no_grad()
def test_generation_goes_on_from_the_video(video_model: models.LlamaVid) -> None:
    """Cached decoding gives what whole passes give, for rows of unequal length and for text alone."""
    ids, asked, prompt = text_ids("IIIIab", "..IIII"), videos(2, 2), prompts("what", "whoa")
    mask = ids != video_model.tokens.pad
    answer = video_model.generate(asked, ids, mask, prompt_ids=prompt, max_new_tokens=3, stop=())
    for _ in range(3):
        logits = video_model(asked, ids, mask, prompt_ids=prompt).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.bool)], 1)
    assert torch.equal(ids[:, -3:], answer)
    assert video_model.generate(None, text_ids("ab"), max_new_tokens=2, stop=()).shape == (1, 2)


@torch.no_grad()
def test_the_published_placeholder_is_no_row_of_the_table(video_model: models.LlamaVid) -> None:
    config = replace(video_model.config, tokens=replace(video_model.tokens, image=-200))
    model = models.build(config).eval()
    model.load_state_dict(video_model.state_dict())
    ids = text_ids("IIIIab")
    asked, prompt = videos(1, 2), prompts("what")
    ours = model(asked, torch.where(ids == 2, -200, ids), prompt_ids=prompt).logits  # type: ignore[call-arg]
    assert torch.equal(ours, video_model(asked, ids, prompt_ids=prompt).logits)


@torch.no_grad()
def test_rotary_positions_are_stretched(video_model: models.LlamaVid) -> None:
    """Position 2 t of a text stretched by two turns as position t did."""
    config = video_model.config
    stretched = models.build(replace(config, lm=replace(config.lm, rotary_scaling=2.0)))
    positions = torch.arange(8).unsqueeze(0)
    plain = video_model.lm.visibility(None, positions, None).rotary
    wide = stretched.lm.visibility(None, 2 * positions, None).rotary
    assert plain is not None and wide is not None
    torch.testing.assert_close(wide, plain)


def _step(model: models.LlamaVid) -> dict[str, torch.Tensor]:
    ids = text_ids("IIIIabE", "IIIIcE.")
    labels = torch.where((ids == model.tokens.image) | (ids == model.tokens.pad), -100, ids)
    return {"images": videos(2, 2), "input_ids": ids, "attention_mask": ids != model.tokens.pad, "labels": labels,
            "prompt_ids": prompts("what", "whoa")}  # fmt: skip


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_trains_what_its_stage_names(video_model: models.LlamaVid, stage: int) -> None:
    """Under AdamW with weight decay on everything, what is frozen stays as it is, bit for bit."""
    model = copy.deepcopy(video_model).train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.stages()[stage].freeze(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**_step(model)).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
    parts = ("connector.query", "connector.key", "connector.value", "connector.content")
    parts = parts if stage == 1 else ("connector.", "lm.")
    unread = "connector.qformer.layers.1.text_"  # after the last layer nobody looks at the text
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert name.startswith(unread) or changed == (name.startswith(parts) and parameter.numel() > 0), name


def test_a_few_steps_learn_two_videos(video_model: models.LlamaVid) -> None:
    model = copy.deepcopy(video_model).train()
    model.stages()[-1].freeze(model)
    optimizer = torch.optim.AdamW(model.stages()[-1].parameter_groups(model), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(**_step(model)).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_the_whole_model_compiles_into_one_graph(video_model: models.LlamaVid) -> None:
    c, step = video_model.config, _step(video_model)
    one = replace(c, vision=replace(c.vision, layers=1), lm=replace(c.lm, layers=1))
    model = models.build(
        replace(one, connector=replace(c.connector, qformer=replace(c.connector.qformer, layers=1)))
    )
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)(**step)
    torch.testing.assert_close(whole.logits, model(**step).logits)


@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_lower_precisions(video_model: models.LlamaVid, how: str) -> None:
    low = copy.deepcopy(video_model)
    exact = video_model(**_step(low)).loss.detach()
    if how == "bfloat16":
        low.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = low(**_step(low)).loss
    assert loss is not None
    loss.backward()
    assert loss.dtype == torch.float32 and abs(float(loss.detach() - exact)) < 0.03 * float(exact)
    trained = [p for p in low.parameters() if p.requires_grad and p.numel()]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)


def test_bad_input_is_refused_by_name(video_model: models.LlamaVid) -> None:
    model, ids, asked, prompt = video_model, text_ids("IIIIab"), videos(1, 2), prompts("what")
    media = model.encode(asked, prompt)
    for match, call in (
        ("prompt_ids: got None", lambda: model(asked, ids)),
        ("images: got shape", lambda: model(asked[0, 0], ids, prompt_ids=prompt)),
        ("images: got shape", lambda: model(asked[..., :16], ids, prompt_ids=prompt)),
        ("features: got shape", lambda: model.encode_features(asked[..., :1], prompt)),
        ("prompt_ids: got shape", lambda: model.encode(asked, prompt[0])),
        ("prompt_ids: got 2 samples of 1 prompts for 1", lambda: model.encode(asked, prompt.repeat(2, 1, 1))),
        ("1 samples of 2 images", lambda: model.encode(videos(1, 2, 2), prompt.repeat(1, 3, 1))),
        ("prompt_ids: got 65 tokens", lambda: model.encode(asked, prompts("a" * 65))),
        ("input_ids: got 4 places .* expected 0", lambda: model(input_ids=ids)),
        ("input_ids: got 3 places .* expected 4", lambda: model(asked, ids[:, 1:], prompt_ids=prompt)),
        ("media: got shape", lambda: model(input_ids=ids, media=media[..., :5])),
        ("input_ids: got ids 0 to 600", lambda: model(asked, ids * 0 + 600 * (ids == 97), prompt_ids=prompt)),
        ("places: got 0", lambda: expand_images(ids, model.tokens, 0)),
        ("limit: got 0", lambda: pad_prompts([[1]], limit=0)),
        ("prompts: got 0", lambda: pad_prompts([])),
        ("context: got 0", lambda: rotary_scaling(1, 0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()

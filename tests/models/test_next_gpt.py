"""NExT-GPT as a whole: layout, losses, what stages train, files of both releases, and the loop from words to a sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mmkernels import models
from mmkernels.models.next_gpt import MODALITIES

TINY: Any = models.config("next_gpt-tiny")
IMAGE, VIDEO, AUDIO = (s.ids for s in TINY.signals)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    made = models.build("next_gpt-tiny").eval()
    with torch.no_grad():
        for n, p in made.named_parameters():
            if "lora_up" in n:
                p.normal_(std=0.05)
    return made


def inputs(rows: int, frames: int = 2) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(3)
    shapes = (1, 3, 32, 32), (1, frames, 3, 32, 32), (1, 1024)
    return tuple(torch.randn(rows, *s, generator=g) for s in shapes)


def text(model: Any, *rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = models.next_gpt.pad_rows([torch.tensor(r) for r in rows], 0)
    return model.expand(ids, mask)


def test_sizes_are_the_published_ones():
    """About 4 M in, 31 to 32 M a modality out, 33 M of LoRA in the first release; Vicuna with its new tokens."""
    first, second = (models.build(n, device="meta") for n in ("next_gpt-7b-v0", "next_gpt-7b"))

    def count(of: Any, has: str) -> int:
        return sum(p.numel() for n, p in of.named_parameters() if has in n)

    assert count(first, "project.") == 1024 * 4096 + 4096 and count(first, "lora_") == 32 * 4 * 2 * 4096 * 32
    assert [round(count(first, f"out.{n}.") / 1e6, 2) for n in MODALITIES] == [31.96, 32.09, 31.79]
    plain = 6_738_415_616  # LLaMA-7B
    assert count(first, "lm.") - count(first, "lora_") == plain + 2 * 38 * 4096
    assert count(second, "lm.") - count(second, "lora_") == plain + 2 * 36 * 4096
    assert [len(s.ids) for s in first.config.signals] == [4, 24, 8] and first.config.places == 1
    assert [s.span for s in second.config.signals] == [7, 47, 15] and second.config.places == 8
    assert not first.makers and count(first, "vision.") / 1e6 == pytest.approx(632, abs=1)
    assert [(s.name, s.learning_rate) for s in second.stages()] == [
        ("encoding", 1e-3), ("decoding", 2e-4), ("instructions", 2e-4),
    ]  # fmt: skip
    assert sorted({g["lr"] for g in _groups(second)}) == pytest.approx([2e-5, 2e-4])


def _groups(of: Any) -> list[dict[str, Any]]:
    of.stages()[-1].freeze(of)
    return of.stages()[-1].parameter_groups(of)


def test_inputs_stand_in_their_places(model):
    images, videos, audios = inputs(1)
    media = model.encode(images, videos, audios)
    assert all(t.shape == (1, 1, 8, 128) for t in media)
    ids, _ = text(model, [1, 494, 40, 493, 41, 2])
    x = model.embed(ids, media)[0]
    order = [media.audio[0, 0], media.video[0, 0], media.image[0, 0]]
    for start, tokens in zip((1, 10, 19), order, strict=True):
        assert torch.equal(x[start : start + 8], tokens)
    for wrong, match in (
        ((images, None, None), "places for videos, expected 0"),
        ((None, videos, audios), "for images"),
    ):
        with pytest.raises(ValueError, match=match):
            model.embed(ids, model.encode(*wrong))


def test_the_loss_is_cross_entropy_and_a_norm_at_the_signals(model):
    ids, mask = text(model, [1, 40, 41, *IMAGE, 42], [1, 40, 41, 42, 43], [1, *AUDIO, 44, *IMAGE, 45])
    labels = torch.where(mask, ids, -100)
    g = torch.Generator().manual_seed(1)
    target = torch.randn(3, 8, 64, generator=g)
    sound = torch.randn(3, 1, 32, generator=g)
    target[1], sound[:2] = torch.nan, torch.inf  # of rows that do not ask
    config = replace(TINY, signals=(TINY.signals[0], TINY.signals[1], replace(TINY.signals[2], scale=2.0)))
    scaled = models.build(config).eval()
    scaled.load_state_dict(model.state_dict())
    out = scaled(None, ids, mask, labels, targets={"image": target, "audio": sound})
    hidden, found = model.lm.norm(out.hidden), {"image": [], "audio": []}
    for name, row, start, count, want in (
        ("image", 0, 3, 4, target), ("image", 2, 5, 4, target), ("audio", 2, 1, 3, sound),
    ):  # fmt: skip
        at = slice(start, start + count)
        y = model.out[name](hidden[row : row + 1, at], model.lm.embedding(ids[row : row + 1, at]))
        found[name].append((y - want[row]).square().sum(-1).sqrt().mean())
    text_loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.text_loss, text_loss)
    for name, values in found.items():
        torch.testing.assert_close(out.alignment[name], torch.stack(values).mean())
    torch.testing.assert_close(out.loss, text_loss + out.alignment["image"] + 2 * out.alignment["audio"])
    out.loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in scaled.parameters())


def test_signals_two_apart_have_the_states_between_them(model):
    config = replace(TINY, signals=(replace(TINY.signals[0], stride=2), *TINY.signals[1:]))
    other = models.build(config).eval()
    other.load_state_dict(model.state_dict())
    ids = torch.tensor([[1, 40, 495, 50, 496, 50, 497, 50, 498, 41]])
    out = other(None, ids)
    y, asks = other.conditions(out, ids, "image")
    hidden = other.lm.norm(out.hidden)[:, 2:9]
    torch.testing.assert_close(y, other.out["image"](hidden, other.lm.embedding(ids[:, 2:9])))
    assert asks.tolist() == [True] and other.conditions(out, ids, "video")[1].tolist() == [False]


def test_signals_that_do_not_end_are_refused_and_ask_for_nothing(model):
    ids = torch.tensor([[1, 40, *IMAGE[:3]]])
    out = model(None, ids)
    assert not model.conditions(out, ids, "image")[1].any()
    with pytest.raises(ValueError, match="signal tokens of image begin and do not end"):
        model(None, ids, labels=ids, targets={"image": torch.zeros(1, 8, 64)})
    whole = torch.tensor([[1, 40, *IMAGE]])
    with pytest.raises(ValueError, match=r"targets\['image'\]: got shape"):
        model(None, whole, labels=whole, targets={"image": torch.zeros(1, 8, 63)})
    with pytest.raises(ValueError, match="modality: got 'smell'"):
        model.conditions(out, ids, "smell")


def test_each_stage_moves_its_own_and_leaves_the_rest_bit_for_bit():
    torch.manual_seed(0)
    model: Any = models.build("next_gpt-tiny").train()
    images, videos, audios = inputs(3)
    ids, mask = text(model, [1, 2, 40, *IMAGE, 41], [1, 493, 42, *VIDEO, 43], [1, 494, 44, *AUDIO, 45])
    targets = {n: torch.randn(3, s.queries, s.width) for n, s in zip(MODALITIES, TINY.signals, strict=True)}
    owners = {
        "encoding": ("project.",),
        "decoding": ("out.", "lm.embedding."),
        "instructions": ("lora_", "project.", "out."),
    }
    for stage in model.stages()[1:]:
        stage.freeze(model)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = torch.optim.AdamW(stage.parameter_groups(model))
        for _ in range(2):
            out = model(
                images, ids, mask, torch.where(mask, ids, -100), videos=videos, audios=audios, targets=targets
            )
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        moved |= {
            n for n in before if "stages.0.grouping.cross.q" in n and "project." in owners[stage.name]
        }  # one key: no choice
        assert moved == {
            n for n in before if any(n.startswith(p) or (p == "lora_" and p in n) for p in owners[stage.name])
        }, stage.name


def test_a_batch_that_needs_little_still_reaches_what_learns():
    model: Any = models.build("next_gpt-tiny").train()
    ids = torch.tensor([[1, 40, 41]])
    model(None, ids, labels=ids).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_rows_of_a_batch_answer_as_alone(model):
    images, videos, _ = inputs(2)
    ids, mask = text(model, [1, 2, 40, 41], [1, 493, 42])
    media = model.encode(images, videos)
    both = model.generate(None, ids, mask, media=media, max_new_tokens=4, stop=())
    for row in range(2):
        one = model.encode(images[row : row + 1], videos[row : row + 1])
        alone = model.generate(
            None, ids[row : row + 1][mask[row : row + 1]][None], media=one, max_new_tokens=4, stop=()
        )
        assert torch.equal(both[row : row + 1], alone)


def test_what_is_asked_for_is_made(model, monkeypatch):
    """From an answer's signal tokens to conditions as in training, and from these to a sample."""
    said = torch.tensor([[60, *IMAGE, 3, 0, 0], [61, 62, 3, 0, 0, 0, 0, 0]])
    monkeypatch.setattr(model, "generate", lambda *args, **options: said)
    ids, mask = (
        torch.tensor([[1, *AUDIO, 40], [1, 41, 0, 0, 0]]),
        torch.tensor([[True] * 5, [True, True, False, False, False]]),
    )
    response = model.respond(ids, mask, generator=torch.Generator().manual_seed(0), steps=2)
    assert [sorted(row) for row in response.conditions] == [
        ["image"],
        [],
    ]  # the prompt's own signals ask for nothing
    whole = torch.cat([ids[:1], said[:1]], 1)
    told, asks = model.conditions(model(None, whole), whole, "image")
    torch.testing.assert_close(response.conditions[0]["image"], told[0])
    expected = model.makers["image"].make(told, steps=2, generator=torch.Generator().manual_seed(0))
    assert asks.all() and response.made[0]["image"].shape == (3, 32, 32)
    torch.testing.assert_close(response.made[0]["image"], expected[0])


def test_new_tokens_start_as_the_mean_of_the_old_ones():
    model: Any = models.build("next_gpt-tiny")
    mean = model.lm.embedding.weight[:495].mean(0)
    model.start_new_tokens(495)
    torch.testing.assert_close(model.lm.embedding.weight[495:], mean.detach().expand(17, -1))

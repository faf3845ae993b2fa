"""BLIP-2, InstructBLIP and XComposer: sizes, stages, where pictures stand, labels, and candidates ranked by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from mmkernels import models
from mmkernels.models.qformer import Instruction, Stage1, Stage1Config, instruction_batch, rank_candidates

IMAGE, CHUNK, END, PAD = 2, 3, 1, 0
# the sums of parameters of transformers' models of the same configuration, built on meta
HUGGINGFACE = {
    "blip2-opt-2.7b": 3_744_679_936,
    "blip2-opt-6.7b": 7_752_738_304,
    "instructblip-vicuna-7b": 7_913_209_856,
    "instructblip-vicuna-13b": 14_191_448_064,
}


def pictures(batch: int, *more: int):
    return torch.randn(batch, *more, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["blip2-tiny", "xcomposer-tiny"])
def model(request):
    torch.manual_seed(0)
    return models.build(request.param).eval()


@pytest.fixture(scope="module")
def instructed():
    torch.manual_seed(0)
    return models.build("instructblip-tiny").eval()


@pytest.mark.parametrize("name", HUGGINGFACE)
def test_presets_have_the_published_size(name):
    model = models.build(name, device="meta", dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / HUGGINGFACE[name] - 1) < 1e-3


def test_the_q_former_has_its_published_size():
    with torch.device("meta"):
        stage1 = Stage1(Stage1Config())
    assert sum(p.numel() for p in stage1.qformer.parameters()) == pytest.approx(188e6, rel=0.01)
    model = models.build("xcomposer-7b", device="meta", dtype=torch.bfloat16)
    assert model.qformer.query_tokens.shape == (64, 768)
    assert model.config.image_tokens == 66
    assert all(block.attention.out.bias is not None for block in model.lm.blocks)
    internlm = 2 * 103_168 * 4096 + 32 * (4 * 4096**2 + 4 * 4096 + 3 * 4096 * 11_008 + 2 * 4096) + 4096
    updates = (
        32 * 256 * (2 * (4096 + 4096) + 3 * (4096 + 11_008))
    )  # of q and v, and of the feed-forward's three
    assert sum(p.numel() for p in model.lm.parameters()) == internlm + updates


def trained(model, stage):
    stage.freeze(model)
    return {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_stages_train_what_the_papers_train():
    model = models.build("blip2-opt-2.7b", device="meta")
    (stage,) = model.stages()
    assert trained(model, stage) == {"qformer", "ln_vision", "proj"}
    assert all(p.requires_grad for p in model.qformer.parameters())
    assert (stage.learning_rate, stage.floor, stage.betas, stage.warmup, stage.steps) == (
        1e-4, 5e-5, (0.9, 0.98), 2000, 80_000,
    )  # fmt: skip
    groups = {g["weight_decay"]: g["params"] for g in stage.parameter_groups(model)}
    assert set(groups) == {0.0, 0.05}
    assert {p.dim() for p in groups[0.0]} == {1}
    with torch.device("meta"):
        first = Stage1(Stage1Config())
    assert trained(first, first.stages()[0]) == {"qformer", "ln_vision", "heads"}
    tiny = models.build("blip2-tiny")
    assert [trained(tiny, s) for s in tiny.stages()] == [
        {"vision", "lm"}, {"qformer", "ln_vision", "heads"}, {"qformer", "ln_vision", "proj"},
    ]  # fmt: skip
    assert not any("text" in n or "lm_" in n for n, p in tiny.qformer.named_parameters() if p.requires_grad)
    instruct = models.build("instructblip-vicuna-7b", device="meta")
    assert trained(instruct, instruct.stages()[0]) == {"qformer", "ln_vision", "proj"}
    assert all(p.requires_grad for p in instruct.qformer.parameters())
    composer = models.build("xcomposer-7b", device="meta")
    assert [trained(composer, s) for s in composer.stages()] == [{"qformer", "proj", "lm"}] * 2


def test_pictures_stand_at_their_places(model):
    ids, mask = model.expand(
        torch.tensor([[IMAGE, 70, 71], [72, IMAGE, PAD]]), torch.tensor([[1, 1, 1], [1, 1, 0]]) > 0
    )
    n = model.config.image_tokens
    assert ids.shape == (2, n + 2) and mask.sum(1).tolist() == [n + 2, n + 1]
    images = pictures(2, 1)
    with torch.no_grad():
        media = model.encode(images)
        x = model.embed(ids, media)
        assert torch.equal(x[0, :n], media[0]) and torch.equal(x[1, 1 : n + 1], media[1])
        assert torch.equal(x[0, n:], model.lm.embed(ids)[0, n:])
        both = model(images, ids, mask).logits
        alone = model(images[1:], ids[1:, : n + 1]).logits
        torch.testing.assert_close(both[1:, : n + 1], alone, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(both, model(images.flip(0), ids, mask).logits)
    with pytest.raises(ValueError, match=rf"input_ids: got \[1\] places for media, expected {n}"):
        model(images[:1], torch.tensor([[IMAGE, 70]]))
    with pytest.raises(ValueError, match="or 0 for text alone"):
        model(images[:1], torch.tensor([[70, 71]]))


def test_flags_stand_around_the_queries():
    model = models.build("xcomposer-tiny")
    with torch.no_grad():
        model.flag_start.fill_(3.0)
        model.flag_end.fill_(-3.0)
    media = model.encode(pictures(1, 2))
    assert media.shape == (1, 28, 128)
    assert (media[:, [0, 14]] == 3).all() and (media[:, [13, 27]] == -3).all()
    assert not model.flag_start.requires_grad and not model.flag_end.requires_grad


def test_generation_continues_as_the_whole_would(model):
    images = pictures(2, 1)
    ids, mask = model.expand(
        torch.tensor([[IMAGE, 70, 71], [IMAGE, 72, PAD]]), torch.tensor([[1, 1, 1], [1, 1, 0]]) > 0
    )
    answer = model.generate(images, ids, mask, max_new_tokens=4, stop=())
    for row, length in ((0, ids.shape[1]), (1, ids.shape[1] - 1)):
        whole = torch.cat([ids[row : row + 1, :length], answer[row : row + 1]], 1)
        with torch.no_grad():
            logits = model(images[row : row + 1], whole).logits
        assert logits[0, length - 1 : -1].argmax(-1).tolist() == answer[row].tolist()


def test_queries_read_the_instruction_and_its_padding_is_not_seen(instructed):
    images, ids = pictures(2, 1), torch.randint(4, 500, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]) > 0
    with torch.no_grad():
        told = instructed.encode(images, Instruction(ids, mask))
        other = instructed.encode(images, Instruction(ids.roll(1, 0), mask))
        assert not torch.allclose(told, other)
        padded = ids.clone()
        padded[1, 3:] = 9
        assert torch.equal(told, instructed.encode(images, Instruction(padded, mask)))
        left = instructed.encode(images[1:], Instruction(ids[1:, :3]))
        torch.testing.assert_close(told[1:], left, rtol=1e-4, atol=1e-5)
        video = instructed.encode(pictures(2, 1, 4), Instruction(ids, mask))
        assert video.shape == (2, 4 * 8, 128)
        frame = instructed.encode(pictures(2, 1, 4)[:, :, 2], Instruction(ids, mask))
        torch.testing.assert_close(video[:, 16:24], frame, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="instruction: got None, expected ids"):
        instructed.encode(images)
    with pytest.raises(ValueError, match="instruction: got ids, expected None"):
        models.build("blip2-tiny").encode(images, Instruction(ids))


def test_instruction_batches():
    prompt, answer = torch.tensor([[5, 6, 7], [8, PAD, PAD]]), torch.tensor([[11, 12, END], [13, END, PAD]])
    ids, mask, labels = instruction_batch(prompt, prompt != PAD, answer, answer != PAD, PAD)
    assert ids.tolist() == [[5, 6, 7, 11, 12, 1], [8, 13, 1, 0, 0, 0]]
    assert mask.tolist() == [[True] * 6, [True] * 3 + [False] * 3]
    assert labels.tolist() == [[-100, -100, -100, 11, 12, 1], [-100, 13, 1, -100, -100, -100]]
    left = instruction_batch(prompt.flip(1), prompt.flip(1) != PAD, answer, answer != PAD, PAD)
    assert left[0].tolist()[1] == [8, 13, 1, 0, 0, 0]


class _Bigram:
    """A model whose next token has fixed odds, whatever stood before: losses can be summed by hand."""

    lm, tokens = object(), SimpleNamespace(pad=PAD, end_of_text=END)
    odds = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.25, 0.125, 0.125])

    def __call__(self, input_ids, attention_mask, media):
        logits = self.odds.clamp(min=1e-9).log().expand(*input_ids.shape, 8)
        return SimpleNamespace(logits=logits)


def test_ranking_by_hand():
    """Sums in bits: [6] 3, [4, 4] 2, [4, 4, 4, 4] 4, [5] 2. In one segment the padded length is 2 + 4, the divisor 5."""
    prompt = torch.tensor([[7, 7]])
    candidates = [[6], [4, 4], [4, 4, 4, 4], [5]]
    found = rank_candidates(_Bigram(), None, prompt, candidates)
    torch.testing.assert_close(found.losses, torch.tensor([[3.0, 2.0, 4.0, 2.0]]) * math.log(2) / 5)
    assert found.order.tolist() == [[1, 3, 0, 2]]
    # two segments: lengths 2 + 2 and 2 + 4, divisors 3 and 5: the third overtakes the first (4 / 5 < 3 / 3)
    found = rank_candidates(_Bigram(), None, prompt, candidates, n_segments=2)
    expected = torch.tensor([[3 / 3, 2 / 3, 4 / 5, 2 / 5]]) * math.log(2)
    torch.testing.assert_close(found.losses, expected)
    assert found.order.tolist() == [[3, 1, 2, 0]]
    # three: sizes 1, 1 and the remaining 2
    found = rank_candidates(_Bigram(), None, prompt, candidates, n_segments=3)
    torch.testing.assert_close(found.losses, torch.tensor([[3 / 2, 2 / 3, 4 / 5, 2 / 5]]) * math.log(2))
    with pytest.raises(ValueError, match="n_segments: got 5, expected 1 to 4"):
        rank_candidates(_Bigram(), None, prompt, candidates, n_segments=5)
    with pytest.raises(ValueError, match="candidates: got 2"):
        rank_candidates(_Bigram(), None, prompt, [[4], []])


@torch.no_grad()
def test_ranking_is_the_loss_of_each_answer_alone(instructed):
    images, told = pictures(2, 1), Instruction(torch.tensor([[5, 6], [7, 8]]))
    prompt, mask = instructed.expand(
        torch.tensor([[IMAGE, 70, 71], [IMAGE, 72, PAD]]), torch.tensor([[1, 1, 1], [1, 1, 0]]) > 0
    )
    candidates = [[80, 81, 82], [83], [84, 85]]
    found = rank_candidates(instructed, images, prompt, candidates, prompt_mask=mask, instruction=told)
    for row in range(2):
        own = prompt[row][mask[row]]
        for n, candidate in enumerate(candidates):
            ids = torch.cat([own, torch.tensor(candidate)]).unsqueeze(0)
            labels = torch.where(torch.arange(ids.shape[1]) < len(own), -100, ids)
            media = instructed.encode(images[row : row + 1], Instruction(told.ids[row : row + 1]))
            loss = instructed(input_ids=ids, labels=labels, media=media).loss * len(candidate)
            torch.testing.assert_close(
                found.losses[row, n], loss / (prompt.shape[1] + 3 - 1), rtol=1e-4, atol=1e-5
            )


def test_configs_that_do_not_fit_are_refused():
    config = models.config("instructblip-tiny")
    with pytest.raises(ValueError, match="image_width: got 64, expected the tower's 128"):
        models.build(replace(config, qformer=replace(config.qformer, image_width=64)))
    with pytest.raises(ValueError, match="vocab: got 0"):
        models.build(replace(config, qformer=replace(config.qformer, vocab=0)))
    with pytest.raises(ValueError, match="heads: got None"):
        models.build(config).stage1(pictures(2), torch.ones(2, 3, dtype=torch.int64))

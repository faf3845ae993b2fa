"""Videos: batches are numbered, frames of a shot belong together, and the question decides which shot is the answer."""

from __future__ import annotations

import pytest
import torch

from mmkernels import data
from mmkernels.data.videos import QUESTIONS


@pytest.fixture(scope="module")
def videos(digits):
    return data.Videos(digits, data.Tokenizer.train((*digits.captions, *QUESTIONS), 512), 32)


def test_batches_are_numbered(videos):
    one, again, other = videos.batch(3, 4), videos.batch(3, 4), videos.batch(4, 4)
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(again, name)), name
    assert not torch.equal(one.images, other.images)
    assert not torch.equal(one.images, videos.batch(3, 4, held_out=True).images)
    assert one.images.shape == (4, 1, 6, 3, 32, 32) and one.prompt_ids.shape[:2] == (4, 1)


def test_the_text_is_places_question_answer(videos, digits):
    batch, t = videos.batch(0, 16), videos.tokenizer
    for b in range(16):
        ids, (start, end) = batch.input_ids[b].tolist(), batch.answers[b].tolist()
        prompt = batch.prompt_ids[b, 0][batch.prompt_mask[b, 0]].tolist()
        assert ids[:12] == [t.image] * 12 and ids[12:start] == prompt and t.decode(prompt) in QUESTIONS
        assert t.decode(ids[start:end]).strip() == digits.captions[batch.captions[b]]
        assert ids[end - 1] == t.end_of_text and not batch.attention_mask[b, end:].any()
        labelled = batch.labels[b] != -100
        assert labelled.nonzero().flatten().tolist() == list(range(start, end))
        assert torch.equal(batch.labels[b][labelled], batch.input_ids[b][labelled])


def test_the_question_and_the_order_of_frames_decide_the_answer(videos):
    """The two shots differ, both questions are asked, and what a question names is where it says."""
    batch, asked = videos.batch(1, 64), []
    assert (batch.captions != batch.others).all()
    for b in range(64):
        text = videos.tokenizer.decode(batch.prompt_ids[b, 0][batch.prompt_mask[b, 0]].tolist())
        asked.append(QUESTIONS.index(text))
    assert 16 < sum(asked) < 48
    frames = batch.images[:, 0].flatten(2)
    within = (frames[:, 0] - frames[:, 1]).square().mean(1)
    across = (frames[:, 2] - frames[:, 3]).square().mean(1)
    assert (within < across).float().mean() > 0.95 and (within > 0).all()


def test_an_answer_s_shot_is_the_asked_half(videos, monkeypatch):
    """With shots painted in the number of their caption, the asked half has the answer's colour."""
    painted = lambda rng, caption, held_out: torch.full((3, 32, 32, 3), caption, dtype=torch.uint8).numpy()  # noqa: E731
    monkeypatch.setattr(videos, "_shot", painted)
    monkeypatch.setattr(data.videos.images, "normalise", torch.from_numpy)
    batch = videos.batch(2, 32)
    for b in range(32):
        text = videos.tokenizer.decode(batch.prompt_ids[b, 0][batch.prompt_mask[b, 0]].tolist())
        half = batch.images[b, 0, :3] if text == QUESTIONS[0] else batch.images[b, 0, 3:]
        assert (half == batch.captions[b]).all()


def test_bad_sizes_are_refused(digits, tokenizer):
    for frames in (0, 3):
        with pytest.raises(ValueError, match=f"frames: got {frames}, expected an even number"):
            data.Videos(digits, tokenizer, 32, frames=frames)

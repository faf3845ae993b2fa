"""The score means what it says: right is what greedy decoding would write, and shuffled pictures are others."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmkernels import data, models
from mmkernels.train.evaluate import Score, last_image, right, shuffle


@pytest.fixture(scope="module")
def sequences():
    digits = data.build("digits")
    return data.Sequences(digits, data.Tokenizer.train(digits.captions, 512), 32)


def test_right_is_what_greedy_decoding_writes(sequences):
    """The model's own greedy answers, put where the captions were, are right; with one token changed they are wrong."""
    torch.manual_seed(0)
    model, batch, length = models.build("flamingo-tiny").eval(), sequences.held_out(0, 8), 5
    starts = batch.answers[:, 0]
    ids = torch.zeros(8, int(starts.max()) + length, dtype=torch.long)
    for row, start in enumerate(starts.tolist()):
        prompt = batch.input_ids[row : row + 1, :start]
        answer = model.generate(batch.images[row : row + 1], prompt, max_new_tokens=length, stop=())
        ids[row, : start + length] = torch.cat([prompt, answer], 1)
    mask = torch.arange(ids.shape[1]) < (starts + length).unsqueeze(1)
    own = dataclasses.replace(
        batch, input_ids=ids, attention_mask=mask, answers=torch.stack([starts, starts + length], 1)
    )
    with torch.no_grad():
        logits = model(own.images, ids, mask).logits
    assert right(logits, own).all()
    for offset in range(length):
        wrong = ids.clone()
        wrong[torch.arange(8), starts + offset] ^= 1
        assert not right(logits, dataclasses.replace(own, input_ids=wrong)).any(), offset
    before = ids.clone()
    before[:, 0] ^= 1  # only the answer counts
    assert right(logits, dataclasses.replace(own, input_ids=before)).all()


def test_shuffling_moves_every_picture_and_keeps_empty_places(sequences):
    batch = sequences.held_out(1, 16)
    shuffled = shuffle(batch)
    filled = batch.images.flatten(2).any(-1)
    assert torch.equal(shuffled.flatten(2).any(-1), filled)
    assert not (shuffled == batch.images).flatten(2).all(-1)[filled].any()

    def sorted_pictures(images):
        return sorted(image.numpy().tobytes() for image in images[filled])

    assert sorted_pictures(shuffled) == sorted_pictures(batch.images)


def test_a_model_that_reads_the_pictures_scores_and_falls_to_chance(sequences):
    """An oracle that tells a caption from the pixels of the last picture stands in for a trained model."""
    known = {}
    for number in range(4):
        batch = sequences.held_out(number, 64 if number < 3 else 8)
        for row, caption in enumerate(batch.captions.tolist()):
            count = int(batch.images[row].flatten(1).any(1).sum())
            known[batch.images[row, count - 1].numpy().tobytes()] = caption

    class Oracle(torch.nn.Linear):
        def forward(self, images, ids, mask):
            logits = torch.nn.functional.one_hot(ids.roll(-1, 1), 512).float()
            for row in range(len(ids)):
                count = int((ids[row] == 2).sum())
                start = int((ids[row] == 2).nonzero().max())
                guess = known.get(images[row, count - 1].numpy().tobytes())
                text = sequences.dataset.captions[guess] if guess is not None else ""
                for offset, token in enumerate([*sequences.tokenizer.encode(text), 3]):
                    if start + offset < ids.shape[1]:
                        logits[row, start + offset] = torch.nn.functional.one_hot(torch.tensor(token), 512)
            return models.Output(logits)

    oracle = Oracle(1, 1)
    honest, fooled = (last_image(oracle, sequences, 200, shuffled=s) for s in (False, True))
    assert honest.total == fooled.total == 200
    assert honest.accuracy == 1.0
    assert fooled.accuracy < 0.15
    assert sum(total for _, total in honest.captions.values()) == 200


def test_scores_add_up():
    score = Score()
    for hit in (True, False, True):
        score.add("a cat", hit)
    score.add("a dog", False)
    assert score.accuracy == 0.5
    assert score.captions == {"a cat": (2, 3), "a dog": (0, 1)}

"""LaVIN's data and its run: questions with a picture and without one in a batch, what is measured, and answers by name."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learning import losses_of
from PIL import Image

from mmkernels import data, models
from mmkernels.infer import Captioner
from mmkernels.train import Run, Trainer, lavin, train, trainer
from mmkernels.train.lavin import LavinObjectives, answers, mixtures


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def setting() -> tuple[Any, data.Mixtures]:
    torch.manual_seed(0)
    dataset, model = data.build("digits"), models.build("lavin-tiny")
    config: Any = model.config
    return model, mixtures(dataset, data.Tokenizer.train(dataset.captions, 512), config, 0)


def test_batches_are_what_the_model_reads(setting):
    model, drawn = setting
    image, marks, decode = model.tokens.image, model.marks, drawn.tokenizer.decode
    captions = drawn.dataset.captions
    for batch, pictures in (
        (drawn.mixture(0, 4), [4, 0, 4, 0]), (drawn.held_out(0, 3), [4] * 3), (drawn.texts(0, 3), [0] * 3),
        (drawn.texts(0, 3, held_out=True), [0] * 3),
    ):  # fmt: skip
        ids = batch.input_ids
        assert (ids == image).sum(1).tolist() == pictures
        assert (ids[:, 0] == marks.modality).all() and (ids[:, 1] == marks.bos).all()
        assert [bool(view.any()) for view in batch.images] == [n > 0 for n in pictures]
        model(batch.images if any(pictures) else None, ids, batch.attention_mask)  # refuses other layouts
        for row, (start, end), caption, n in zip(
            ids.tolist(), batch.answers.tolist(), batch.captions.tolist(), pictures, strict=True
        ):
            assert (
                decode(row[start:end]) == captions[caption] and row[end - 1] == drawn.tokenizer.end_of_chunk
            )
            if not n:
                told = decode(row[4:start])
                assert told.startswith(captions[caption]) == told.endswith("what is first?")
    echo = drawn.echoes(0, 4)
    assert echo.images.shape == (4, 0, 3, 32, 32) and not (echo.input_ids == image).any()
    assert torch.equal(drawn.mixture(3, 2).input_ids, drawn.mixture(3, 2).input_ids)
    assert not torch.equal(drawn.mixture(3, 2).images, drawn.mixture(4, 2).images)


def test_held_out_texts_are_pairs_that_training_never_asks_about(setting):
    _, drawn = setting

    def pairs(held_out: bool) -> set[str]:
        found = set()
        for number in range(6):
            batch = drawn.texts(number, 40, held_out=held_out)
            for row, start in zip(batch.input_ids.tolist(), batch.answers[:, 0].tolist(), strict=True):
                found.add(drawn.tokenizer.decode(row[4:start]).rsplit(".", 1)[0])
        return found

    seen, unseen = pairs(False), pairs(True)
    assert seen and unseen and not seen & unseen


@pytest.mark.parametrize("name", ["pictures", "echoes", "text", "mixture"])
def test_every_loss_learns_its_batch(setting, name):
    model, drawn = setting
    stage = model.stages()[1 if name == "mixture" else 0]
    losses = losses_of(
        lambda: LavinObjectives(model, drawn, 4, "cpu"), model, stage, name, rate=5e-3, steps=10
    )
    assert losses[-1] < 0.8 * losses[0]


def test_only_answers_are_predicted_in_a_mixture(setting):
    model, drawn = setting
    stage, seen = model.stages()[1], []
    handle = model.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)
    LavinObjectives(model, drawn, 4, "cpu").loss("mixture", 2, stage)
    handle.remove()
    batch, labels = drawn.mixture(2, 4), seen[0]["labels"]
    for label, row, (start, end) in zip(labels, batch.input_ids, batch.answers.tolist(), strict=True):
        assert not label[:start].any() and torch.equal(label[start : end + 1], row[start : end + 1])
        assert not label[end + 1 :].any()


def test_what_a_stage_may_not_name_and_too_many_captions_are_refused(setting):
    model, drawn = setting
    objectives = LavinObjectives(model, drawn, 4, "cpu")
    assert {name for stage in model.stages() for name in stage.losses} == set(objectives.names())
    with pytest.raises(
        ValueError, match="loss 'pairs' is unknown, expected one of pictures, echoes, text, mixture"
    ):
        objectives.loss("pairs", 0, replace(model.stages()[0], mix={"pairs": 1.0}))
    tokenizer = data.Tokenizer.train(["".join(map(chr, range(300, 900)))] * 2, 600)
    with pytest.raises(ValueError, match=r"data: its captions have \d+ tokens, expected at most 508"):
        mixtures(data.build("digits"), tokenizer, model.config, 0)


def test_what_is_measured(setting, monkeypatch):
    """A model that always writes the truth is right everywhere but where the picture is another one's."""
    _, drawn = setting
    seen = {}
    for batch in (drawn.held_out(0, 8), drawn.texts(0, 8, held_out=True)):
        seen[batch.input_ids.shape] = batch

    class Knows(torch.nn.Linear):
        tokens = models.config("lavin-tiny").tokens

        def forward(self, images: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            true = images is None or torch.equal(images, drawn.held_out(0, 8).images)
            logits = torch.nn.functional.one_hot(input_ids.roll(-1, 1), 512).float()
            return SimpleNamespace(logits=logits if true else -logits)

    found = answers(Knows(1, 1), drawn, 8)
    assert found == {"with a picture": 1.0, "with another picture": 0.0, "without a picture": 1.0}


def test_a_run_from_its_first_stage_to_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(lavin, "HELD_OUT", 4)
    monkeypatch.setattr(trainer, "HELD_OUT", 8)
    monkeypatch.setattr(Run, "stages", lambda run: [(s, 1) for s in models.config(run.model).stages])
    before = Trainer(Run(model="lavin-tiny", steps=2, batch=2), tmp_path / "other")
    before.take_step()
    frozen = {n: p.clone() for n, p in before.model.named_parameters() if "adapter" not in n}
    result = train(Run(model="lavin-tiny", steps=2, batch=2), tmp_path / "run")
    assert list(result.held_out) == ["towers", "mixture"] and result.documents == 8
    captioner, picture = Captioner.from_checkpoint(tmp_path / "run"), Image.new("RGB", (40, 50), "navy")
    after = dict(captioner.model.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in frozen.items())  # the second stage moved adapters alone
    for pictures, prompt in (([picture], ""), ([picture], "what is shown?"), ([], "a cat. what is first?")):
        assert isinstance(captioner.caption(pictures, prompt, max_new_tokens=2), str)
    for match, pictures, prompt in (
        ("prompt: got none, expected words", [], " "), ("pictures: got 2, expected 0 to 1", [picture] * 2, ""),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            captioner.caption(pictures, prompt)

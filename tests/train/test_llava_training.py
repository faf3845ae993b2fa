"""Training of the LLaVA family: each loss learns, published stages freeze what they freeze, a run ends in answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from learning import losses_of
from PIL import Image

from mmkernels import data, models
from mmkernels.data import pages
from mmkernels.infer import Captioner
from mmkernels.models.llava_text import ask
from mmkernels.train import Run, llava, train, trainer
from mmkernels.train.llava import LlavaObjectives

TINY = ("llava-tiny", "llava-1.5-tiny", "llava-next-tiny", "yi-vl-tiny")


@pytest.fixture(scope="module", params=TINY)
def setting(request):
    torch.manual_seed(0)
    dataset, model = data.build("digits"), models.build(request.param)
    tokenizer = data.Tokenizer.train(llava.texts(dataset, model.config), 512)
    return model, llava.readings(dataset, tokenizer, model.config, 0)


@pytest.mark.parametrize("name", ["patches", "echoes", "pairs", "instructions"])
def test_every_loss_learns_its_batch(setting, name):
    model, readings = setting
    stage = next(s for s in reversed(model.stages()) if name in s.losses)
    losses = losses_of(lambda: LlavaObjectives(model, readings, 4, "cpu"), model, stage, name)
    assert losses[-1] < 0.9 * losses[0]


def test_the_stages_are_the_published_ones_behind_one_for_the_towers(setting):
    model, readings = setting
    big = {
        "llava": "llava-7b",
        "llava-1.5": "llava-1.5-7b",
        "llava-next": "llava-next-vicuna-7b",
        "yi-vl": "yi-vl-6b",
    }
    name = next(n for n in models.list() if models.config(n) is model.config)
    published, ours = models.config(big[name.removesuffix("-tiny")]), model.config
    assert (ours.projector, ours.aspect) == (published.projector, published.aspect)
    assert [s.name for s in ours.stages] == ["towers", *(s.name for s in published.stages)]
    assert {loss for stage in ours.stages for loss in stage.losses} == set(
        LlavaObjectives(model, readings, 4, "cpu").names()
    )
    for small, large in zip(ours.stages[1:], published.stages, strict=True):
        parts = [{p.split(".")[0] for p in stage.trainable} for stage in (small, large)]
        assert parts[0] == parts[1] and small.rates == large.rates and small.clip == large.clip
        assert (small.image_size is None) == (large.image_size is None)
        small.freeze(model)
        read = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("vision.")}
        assert not any(n.startswith("vision.blocks.3.") for n in read)  # never read, never trained


def test_a_loss_that_is_unknown_is_refused(setting):
    model, readings = setting
    objectives = LlavaObjectives(model, readings, 4, "cpu")
    stage = replace(model.stages()[0], losses={"text": 1.0}, mix={"text": 1.0})
    with pytest.raises(ValueError, match="loss 'text' is unknown, expected one of patches, echoes"):
        objectives.loss("text", 0, stage)


@pytest.mark.parametrize("name", ["llava-next-tiny", "yi-vl-tiny"])
def test_a_run_from_its_first_stage_to_an_answer(tmp_path, monkeypatch, name):
    """A step a stage; killed in the middle and started again, it ends with the same bits."""
    monkeypatch.setattr(llava, "HELD_OUT", 4)
    monkeypatch.setattr(trainer, "HELD_OUT", 4)
    monkeypatch.setattr(Run, "stages", lambda run: [(s, 1) for s in models.config(run.model).stages])
    steps = len(models.config(name).stages)
    run = Run(model=name, steps=steps, batch=2)
    result = train(run, tmp_path / "run", save_every=1)
    assert list(result.held_out)[-1] == "instruct" and "towers" not in result.held_out
    assert (
        set(result.held_out["instruct"]) == {"pages read", "pages read, shuffled"} and result.documents == 4
    )

    class Killed(Exception):
        pass

    def stop(record):
        if record["step"] == 2:
            raise Killed

    with pytest.raises(Killed):
        train(run, tmp_path / "again", save_every=1, observe=stop)
    again = train(run, tmp_path / "again", save_every=1)
    assert again.loss == result.loss
    captioner = Captioner.from_checkpoint(tmp_path / "run", model=name)
    page = pages.page(np.random.default_rng(0), size=(64, 40))
    picture = Image.fromarray(page.pixels)
    assert isinstance(captioner.caption([picture], pages.QUESTION, max_new_tokens=2), str)
    assert isinstance(captioner.caption([picture, picture], max_new_tokens=2), str)
    with pytest.raises(ValueError, match="video: got one for a model of pictures"):
        captioner.caption([picture], video=True)


@torch.no_grad()
def test_what_is_answered_is_what_training_asks(tmp_path):
    """The same views, prompt and places reach the model from a picture on its own as from a batch of held-out pages."""
    dataset, config = data.build("digits"), models.config("llava-next-tiny")
    torch.manual_seed(0)
    model = models.build(config).eval()
    tokenizer = data.Tokenizer.train(llava.texts(dataset, config), 512)
    readings = llava.readings(dataset, tokenizer, config, 0)
    batch = readings.held_out_pages(0, 1, (60, 60))
    rng = readings._rng(65, 0)
    page = pages.page(rng, size=(60, 60))
    asked = batch.input_ids[:, : int(batch.answers[0, 0])]
    wanted = model.generate(batch.images, asked, plans=batch.plans, max_new_tokens=4)
    said = Captioner(model, tokenizer, 32).caption(
        [Image.fromarray(page.pixels)], pages.QUESTION, max_new_tokens=4
    )
    assert said == tokenizer.decode(wanted[0].tolist()).strip()
    assert ask("short", "why?", 2) == "USER: <image>\n<image>\nwhy? ASSISTANT:"
    assert ask("v1", "see <image> here").endswith(" USER: see <image> here ASSISTANT:")


def test_what_is_measured(setting, monkeypatch):
    model, readings = setting
    monkeypatch.setattr(llava, "HELD_OUT", 6)
    monkeypatch.setattr(llava, "_BATCH", 3)

    class Oracle(torch.nn.Module):
        """Reads what the batches say, if it is shown their own pictures."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.batches = [readings.held_out_pages(n, 3) for n in range(2)]

        def forward(self, images, ids, mask, *, plans):
            logits = torch.zeros(*ids.shape, 512)
            if any(torch.equal(images, batch.images) for batch in self.batches):
                logits.scatter_(2, ids.roll(-1, 1).unsqueeze(-1), 1.0)
            return models.Output(logits)

    assert llava.measure(Oracle(), readings, model.stages()[-1]) == {
        "pages read": 1.0,
        "pages read, shuffled": 0.0,
    }
    assert llava.measure(model, readings, model.stages()[0]) == {}

"""A run of BLIP-2: stages, three losses from one pass, what is measured where a stage ends, and going on after a stop."""

from __future__ import annotations

import pytest
import torch

from mmkernels import data
from mmkernels.data import Pairs, Tokenizer
from mmkernels.train import Run, Trainer, qformer, train, trainer
from mmkernels.train.log import read

STEPS = 6
RUN = Run(model="blip2-tiny", steps=STEPS, batch=2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of a few steps that was stopped in stage 1 and went on, beside one that was not."""
    out = tmp_path_factory.mktemp("runs")

    def stop(record):
        if record["step"] == 4:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "HELD_OUT", 2)
        patch.setattr(qformer, "PICTURES", 8)
        patch.setattr(qformer, "TOP", 2)
        patch.setattr(qformer, "SHOWN", 1)
        whole = train(RUN, out / "whole", save_every=3)
        with pytest.raises(KeyboardInterrupt):
            train(RUN, out / "stopped", save_every=3, observe=stop)
        train(RUN, out / "stopped", save_every=3)
    return out, whole


def test_a_stopped_run_goes_on_bit_for_bit(finished):
    out, _ = finished
    both = [
        [{k: v for k, v in record.items() if k not in ("seconds", "speed")} for record in read(out / name)]
        for name in ("whole", "stopped")
    ]
    assert both[0] == both[1]
    assert len(both[0]) == STEPS
    assert [record["stage"] for record in both[0]] == ["towers"] * 2 + ["stage1"] * 2 + ["stage2"] * 2
    assert set(both[0][2]["losses"]) == {"itc", "itm", "lm"}


def test_recall_and_captions_are_measured_where_stages_end(finished):
    out, result = finished
    records = read(out / "whole")
    assert ["held_out" in record for record in records] == [False] * 3 + [True, False, True]
    figures = result.held_out["stage1"]
    assert set(figures) == {
        f"{by} {way} recall@{k}"
        for by in ("itc", "itm")
        for way in ("image->caption", "caption->image")
        for k in (1, 5)
    }
    assert all(0 <= figure <= 1 for figure in figures.values())
    ((true, written),) = result.held_out["stage2"]["captions"]
    assert true in data.build("digits").captions and isinstance(written, str)


def test_each_stage_trains_its_own_parameters(tmp_path):
    run = Trainer(RUN, tmp_path / "run")
    for owners in ({"vision", "lm"}, {"qformer", "ln_vision", "heads"}, {"qformer", "ln_vision", "proj"}):
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        for _ in range(2):
            run.take_step()
        changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
        assert {name.split(".")[0] for name in changed} == owners


@pytest.mark.parametrize(("name", "stages"), [("instructblip-tiny", 2), ("xcomposer-tiny", 3)])
def test_the_others_take_steps_too(tmp_path, name, stages):
    run = Trainer(Run(model=name, steps=9, batch=2), tmp_path / "run")
    records = [run.take_step() for _ in range(9)]
    assert len({record["stage"] for record in records}) == stages
    assert run.score(2).total == 2


def test_pairs_place_pictures_questions_and_captions():
    digits = data.build("digits")
    tokenizer = Tokenizer.train(digits.captions, 512)
    pairs = Pairs(digits, tokenizer, 32, places=8, asks=True)
    for batch in (pairs.captions(3, 5), pairs.held_out(3, 5)):
        ids, mask = pairs.question(batch)
        for row, (start, end) in enumerate(batch.answers.tolist()):
            text = batch.input_ids[row]
            assert text[:8].tolist() == [tokenizer.image] * 8
            assert (
                tokenizer.decode(text[start:end].tolist()).strip()
                == digits.captions[int(batch.captions[row])]
            )
            asked = ids[row][mask[row]].tolist()
            assert asked == text[8:start].tolist() and tokenizer.decode(asked) in data.pairs.INSTRUCTIONS
    echoes = pairs.echoes(3, 5)
    for row, caption in enumerate(echoes.captions.tolist()):
        words = [i for i in echoes.input_ids[row, :8].tolist() if i != tokenizer.image]
        assert tokenizer.decode(words).strip() == digits.captions[caption]
    ids, mask = pairs.texts()
    assert [
        tokenizer.decode(row[valid].tolist()).strip() for row, valid in zip(ids, mask, strict=True)
    ] == list(digits.captions)

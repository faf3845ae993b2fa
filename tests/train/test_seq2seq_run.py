"""BLIP-2 before an encoder-decoder: what it asks and answers, a run by command line, and its captions."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from mmkernels import data
from mmkernels.cli.main import main
from mmkernels.data import Pairs, Tokenizer
from mmkernels.train import Run, Trainer, qformer, trainer
from mmkernels.train.seq2seq import asked

RUN = Run(model="blip2-t5-tiny", steps=6, batch=2)


def test_prompts_and_answers_come_apart():
    digits = data.build("digits")
    tokenizer = Tokenizer.train(digits.captions, 512)
    batch = Pairs(digits, tokenizer, 32, places=8, asks=True).captions(1, 6)
    found = asked(batch, tokenizer.pad)
    assert torch.equal(found.mask, torch.arange(found.ids.shape[1]) < batch.answers[:, :1])
    for row, caption in enumerate(batch.captions.tolist()):
        written = found.labels[row][found.labels[row] != -100].tolist()
        assert written[-1] == tokenizer.end_of_chunk
        assert tokenizer.decode(written).strip() == digits.captions[caption]
        assert found.ids[row, :8].tolist() == [tokenizer.image] * 8


def test_each_stage_trains_its_own_parameters(tmp_path):
    run = Trainer(RUN, tmp_path / "run")
    for owners in ({"vision", "lm"}, {"qformer", "ln_vision", "heads"}, {"qformer", "ln_vision", "proj"}):
        before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        for _ in range(2):
            run.take_step()
        changed = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
        assert {name.split(".")[0] for name in changed} == owners


@torch.no_grad()
def test_a_hit_is_what_decoding_would_write(tmp_path):
    run = Trainer(RUN, tmp_path / "run")
    run.model.eval()
    batch = run.sequences.held_out(0, 3)
    prompt = asked(batch, 0)
    answers = run.model.generate(batch.images, prompt.ids, prompt.mask, max_new_tokens=4, stop=())
    made = asked(batch, 0)._replace(labels=answers)
    logits = run.model(batch.images, made.ids, made.mask, made.labels).logits
    assert torch.equal(logits.argmax(-1), answers)
    assert run.objectives.hits(run.model, batch, batch.images).tolist() == [False] * 3


def test_training_and_captions_by_command_line(tmp_path, monkeypatch, capsys):
    for module, name, value in (
        (trainer, "HELD_OUT", 2), (qformer, "PICTURES", 6), (qformer, "TOP", 2), (qformer, "SHOWN", 1),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    out = tmp_path / "run"
    words = ("train", "--model", "blip2-t5-tiny", "--out", out, "--steps", 3, "--batch", 2, "--json")
    assert main([str(word) for word in words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"stage1", "stage2"} == set(result["held_out"])
    assert "itm image->caption recall@1" in result["held_out"]["stage1"]
    picture = Path(tmp_path / "a.png")
    Image.new("RGB", (40, 50), "teal").save(picture)
    words = ("generate", "--model", "blip2-t5-tiny", "--checkpoint", out, "--image", picture, "--json")
    assert main([str(word) for word in words]) == 0
    assert isinstance(json.loads(capsys.readouterr().out)["caption"], str)

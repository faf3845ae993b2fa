"""NExT-GPT's data and its run: modalities switch as written, every loss learns, and from a checkpoint to a made picture."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from learning import losses_of
from PIL import Image

from mmkernels import data, models
from mmkernels.cli.main import main
from mmkernels.data import images, sounds
from mmkernels.data.switching import KINDS
from mmkernels.infer import AnyToAny
from mmkernels.infer.any_to_any import save
from mmkernels.models.next_gpt import MODALITIES
from mmkernels.train import Run, next_gpt, train, trainer
from mmkernels.train.next_gpt import NextGptObjectives, made, switching, texts, words


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def setting() -> tuple[Any, Any]:
    torch.manual_seed(0)
    dataset, model = data.build("digits"), models.build("next_gpt-tiny")
    config: Any = model.config
    tokenizer = data.Tokenizer.train(texts(dataset, config), words(config))
    return model, switching(dataset, tokenizer, config, 0)


def test_samples_are_written_as_published_and_labels_are_the_answers(setting):
    model, drawn = setting
    decode, signals = drawn.tokenizer.decode, [list(s.ids) for s in model.config.signals]
    for batch in (
        drawn.encoding(0, 6),
        drawn.decoding(0, 6),
        drawn.instructions(0, 40),
        drawn.encoding(0, 3, held_out=True),
    ):
        for ids, labels, (start, end), caption, asked in zip(
            batch.input_ids.tolist(), batch.labels.tolist(), batch.answers.tolist(), batch.captions.tolist(),
            batch.asked.tolist(), strict=True,
        ):  # fmt: skip
            assert (
                labels[:start] == [-100] * start
                and labels[start:end] == ids[start:end]
                and set(labels[end:]) <= {-100}
            )
            assert decode([i for i in ids[1:start] if i not in (2, 493, 494)]).startswith("### Human: ")
            assert decode(ids[1:start]).endswith("\n### Assistant: ")
            told = [i for i in ids[start:end] if i < 495]
            assert (
                decode(told) == drawn.captions[caption] + "\n"
                and ids[end - 1] == drawn.tokenizer.end_of_chunk
            )
            assert [i for i in ids[start:end] if i >= 495] == ([] if asked == 3 else signals[asked])


def test_inputs_are_there_where_their_places_are_and_nowhere_else(setting):
    model, drawn = setting
    batch, comes = drawn.instructions(1, 40), []
    for name, place in zip(("images", "videos", "audios"), (2, 493, 494), strict=True):
        places = (batch.input_ids == place).sum(1)
        comes.append(places > 0)
        assert set(places.tolist()) == {0, model.config.places}
        assert [bool(x.any()) for x in getattr(batch, name)] == (places > 0).tolist()
    kinds = {(next((m for m in range(3) if comes[m][n]), None), int(batch.asked[n])) for n in range(40)}
    assert kinds == set(KINDS)
    assert all(c >= 20 for c, m in zip(batch.captions.tolist(), comes[2].tolist(), strict=True) if m)
    again = drawn.instructions(1, 40)
    assert torch.equal(again.videos, batch.videos) and not torch.equal(
        drawn.instructions(2, 40).videos, batch.videos
    )
    echo = drawn.echoes(0, 6)
    assert not any(x.any() for x in (echo.images, echo.videos, echo.audios))
    assert not torch.isin(echo.input_ids, torch.tensor([2, 493, 494])).any()


@pytest.mark.parametrize("name", ["inputs", "echoes", "makers", "encoding", "decoding", "instructions"])
def test_every_loss_learns_its_batch(setting, name):
    model, drawn = setting
    stage = next(stage for stage in model.stages() if name in stage.losses)
    make = lambda: NextGptObjectives(model, drawn, 6, "cpu")  # noqa: E731
    losses = losses_of(make, model, stage, name, rate=5e-3, steps=7)
    assert losses[-1] < 0.9 * losses[0]


def test_what_a_stage_may_not_name_and_too_many_texts_are_refused(setting):
    model, drawn = setting
    objectives = NextGptObjectives(model, drawn, 4, "cpu")
    assert {name for stage in model.stages() for name in stage.losses} == set(objectives.names())
    with pytest.raises(
        ValueError, match="loss 'pairs' is unknown, expected one of inputs, echoes, makers, encoding"
    ):
        objectives.loss("pairs", 0, replace(model.stages()[0], mix={"pairs": 1.0}))
    tokenizer = data.Tokenizer.train(["".join(map(chr, range(300, 900)))] * 2, 600)
    with pytest.raises(ValueError, match=r"data: its texts have \d+ tokens, expected at most 493"):
        switching(data.build("digits"), tokenizer, model.config, 0)


def test_what_is_made_is_judged_by_the_encoder(setting, monkeypatch):
    """Real inputs in the makers' place are recognised, by encoders that have hardly learned, above chance (0.05, 0.2)."""
    model, drawn = setting
    calls = []

    def respond(ids, mask, **options):
        m = len(calls)
        calls.append(m)
        captions = torch.arange(20) if m < 2 else torch.arange(20, 25)
        real = drawn.inputs(0, len(captions), m, captions=captions)[0][:, 0]
        name = MODALITIES[m]
        return models.next_gpt.Response(ids, [{name: ids}] * len(ids), [{name: x} for x in real])

    monkeypatch.setattr(model, "respond", respond)
    figures = made(model, drawn)
    for name in MODALITIES:
        assert figures[f"{name}s asked for"] == 1.0
        assert figures[f"{name}s made, recognised"] > 0.3


def test_sounds_are_kept_and_refused(tmp_path):
    rng = np.random.default_rng(0)
    sound = torch.from_numpy(sounds.draw(rng, 2))
    sounds.save(tmp_path / "a.wav", sound)
    torch.testing.assert_close(sounds.load(tmp_path / "a.wav"), sound, atol=1e-4, rtol=0)
    sounds.save(tmp_path / "short.wav", sound[:100])
    assert not sounds.load(tmp_path / "short.wav")[100:].any()
    (tmp_path / "b.wav").write_bytes(b"RIFF and nothing")
    sounds.save(tmp_path / "long.wav", torch.zeros(40_000))
    for name, match in (("b.wav", "not a WAV"), ("long.wav", "40000 samples; expected")):
        with pytest.raises(ValueError, match=match):
            sounds.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such sound"):
        sounds.load(tmp_path / "none.wav")


def test_pixels_come_back():
    pixels = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert np.array_equal(images.denormalise(images.normalise(pixels)), pixels)


def test_a_run_from_its_first_stage_to_a_made_picture(tmp_path, monkeypatch, capsys):
    for name, value in (("_BATCH", 6), ("_KNOWN", 1), ("_LONGEST", 2)):
        monkeypatch.setattr(next_gpt, name, value)
    monkeypatch.setattr(next_gpt, "HELD_OUT", 6)
    monkeypatch.setattr(trainer, "HELD_OUT", 4)
    monkeypatch.setattr(Run, "stages", lambda run: [(s, 1) for s in models.config(run.model).stages])
    run = tmp_path / "run"
    result = train(Run(model="next_gpt-tiny", steps=4, batch=3), run)
    assert list(result.held_out) == ["encoding", "decoding", "instructions"]
    assert set(result.held_out["instructions"]) > {
        "images described",
        "videos made, recognised",
        "audios asked for",
    }
    Image.new("RGB", (40, 50), "navy").save(tmp_path / "a.png")
    sounds.save(tmp_path / "a.wav", torch.from_numpy(sounds.draw(np.random.default_rng(0), 1)))
    command = ["generate", "--checkpoint", str(run), "--image", str(tmp_path / "a.png"), "--audio", str(tmp_path / "a.wav"),
               "--prompt", "film this", "--max-new-tokens", "3", "--json"]  # fmt: skip
    assert main(command) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"prompt", "answer", "asked", "made"}
    with pytest.raises(ValueError, match="prompt: got none"):
        AnyToAny.from_checkpoint(run).answer(" ")


def test_what_is_made_is_written(setting, tmp_path, monkeypatch):
    model, drawn = setting
    signals = [i for s in model.config.signals for i in s.ids]
    monkeypatch.setattr(model, "generate", lambda *args, **options: torch.tensor([[300, *signals, 3]]))
    answer = AnyToAny(model, drawn.tokenizer, 32).answer("draw a cat")
    assert answer.asked == MODALITIES and answer.text == drawn.tokenizer.decode([300]).strip()
    paths = save(answer, tmp_path / "out")
    assert np.asarray(Image.open(paths["image"])).shape == (32, 32, 3) and sounds.load(
        paths["audio"]
    ).shape == (1024,)
    with Image.open(paths["video"]) as video:
        assert (getattr(video, "n_frames", 1), video.size) == (4, (16, 16))

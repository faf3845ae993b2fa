"""LLaMA-VID watches real frame sequences: two tokens a frame, longer than a block, by command line too."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from mmkernels import models
from mmkernels.cli.main import main
from mmkernels.data import Tokenizer, build, frames
from mmkernels.infer import Captioner
from mmkernels.train import Run, Trainer


def watcher(name: str) -> Captioner:
    torch.manual_seed(0)
    return Captioner(models.build(name), Tokenizer.train(build("digits").captions, 500), 32)


@pytest.fixture
def timelapse(tmp_path):
    """70 frames that brighten, more than a block of 64."""
    made = [Image.new("RGB", (40, 30), (3 * i, 200 - 2 * i, 90)) for i in range(70)]
    made[0].save(tmp_path / "a.gif", save_all=True, append_images=made[1:])
    return tmp_path / "a.gif"


def test_a_video_takes_two_places_a_frame(timelapse, monkeypatch):
    captioner, given = watcher("llama-vid-tiny"), {}

    def generate(pixels, ids, mask, *, prompt_ids, max_new_tokens):
        given.update(pixels=pixels, ids=ids, prompt=prompt_ids)
        return torch.tensor([[3]])

    monkeypatch.setattr(captioner.model, "generate", generate)
    captioner.caption(frames.load(timelapse), "what is at last?", video=True)
    asked = captioner.tokenizer.encode("what is at last?")
    assert given["pixels"].shape == (1, 1, 70, 3, 32, 32)
    assert given["ids"].tolist() == [[*[2] * 140, *asked]] and given["prompt"].tolist() == [[asked]]


def test_blocks_of_a_long_video_change_nothing(timelapse):
    captioner, said = watcher("llama-vid-tiny"), []
    video = frames.load(timelapse)
    for block in (64, 7, 70):
        captioner.model.connector.block = block  # type: ignore[union-attr]
        said.append(captioner.caption(video, "what is at first?", video=True, max_new_tokens=4))
    assert len(set(said)) == 1


@pytest.mark.parametrize("name", ["blip2-tiny", "flamingo-tiny", "instructblip-tiny"])
def test_other_families_watch_a_few_frames(name, timelapse):
    captioner = watcher(name)
    assert isinstance(captioner.caption(frames.load(timelapse, 3), "", video=True, max_new_tokens=2), str)


def test_who_cannot_watch_says_so(timelapse):
    with pytest.raises(ValueError, match="video: got one for a model of pictures"):
        watcher("qwen_vl-tiny").caption(frames.load(timelapse, 2), video=True)
    with pytest.raises(ValueError, match="video: got 0 frames, expected 1 to 3600"):
        watcher("llama-vid-tiny").caption([], video=True)
    with pytest.raises(ValueError, match="frames: got 2, expected 1"):
        models.build("qwen_vl-tiny").expand(torch.tensor([[2]]), frames=2)


def test_by_command_line(tmp_path, capsys, timelapse):
    skimage_data = pytest.importorskip("skimage.data")
    run = Trainer(Run(model="llama-vid-tiny", steps=1, batch=1), tmp_path / "run")
    run.take_step()
    run.save()

    def generate(*words: object) -> tuple[int, str, str]:
        status = main(["generate", "--checkpoint", str(run.out), *map(str, words)])
        return status, *capsys.readouterr()

    video = f"{skimage_data.data_dir}/multipage.tif"
    status, out, _ = generate("--video", video, "--prompt", "what is at last?", "--json")
    found = json.loads(out)
    assert status == 0 and (found["video"], found["frames"]) == (video, 2)
    assert json.loads(generate("--video", timelapse, "--frames", 5, "--json")[1])["frames"] == 5
    for words, why in (
        ((), "pictures: got 0, expected 1 to"),
        (("--video", video, "--image", video), "image, video: got both"),
        (("--image", video, "--frames", 3), "frames: got 3 without a video"),
        (("--video", tmp_path / "none.gif"), "none.gif: no such video"),
    ):
        status, out, err = generate(*words)
        assert status != 0 and out == "" and why in err

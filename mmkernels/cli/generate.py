"""`mmkernels generate`: captions from a checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from mmkernels.data import frames
from mmkernels.infer import AnyToAny, Captioner, Meter
from mmkernels.infer.any_to_any import save
from mmkernels.models import NextGpt


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="caption pictures or a video with a trained checkpoint",
        description="Continues a prompt about one or several pictures, or about the frames of a video; without <image> in the "
        "prompt all pictures stand before it, and what is written is about the last one.",
        epilog="example: mmkernels generate --checkpoint runs/tiny --image a.png --image b.png --prompt 'a photograph of'",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run's folder, or one of its checkpoints"
    )
    parser.add_argument("--model", help="the model that the checkpoint must be of (default: whatever it is)")
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        help="a picture; may be repeated; lavin and next_gpt can do without",
    )
    parser.add_argument(
        "--video", type=Path, help="instead: a multi-page TIFF, an animation, or a folder of stills, in order"
    )
    parser.add_argument(
        "--frames", type=int, help="how many of the video's frames, evenly spaced (default: all)"
    )
    parser.add_argument("--audio", type=Path, help="next_gpt: a sound, WAV of 16 bits, one channel, 4 kHz")
    parser.add_argument("--make", type=Path, help="next_gpt: the folder for what the answer asks for")
    parser.add_argument(
        "--seed", type=int, default=0, help="of draws, and of what next_gpt makes (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt", default="", help="words to continue; <image> says where each picture stands"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, help="longest answer (default: %(default)s)"
    )
    _add_decoding(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object, with the rate of tokens")
    parser.set_defaults(run=run)


def _add_decoding(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen, and whether they are shown at once."""
    parser.add_argument(
        "--beams", type=int, default=1, help="search with so many (default: %(default)s, greedy)"
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        help="of beams; above 1 favours long answers (default: 1)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="above 0: draw tokens (default: greedy)"
    )
    parser.add_argument("--top-p", type=float, help="draw from the fewest tokens of this probability")
    parser.add_argument("--stream", action="store_true", help="print words as they are written")


def run(options: argparse.Namespace) -> int:
    if options.frames is not None and options.video is None:
        raise ValueError(f"frames: got {options.frames} without a video, expected it with one")
    if options.stream and (options.json or options.beams > 1):
        raise ValueError(f"stream: got it beside {'json' if options.json else 'beams'}, expected it alone")
    captioner = Captioner.from_checkpoint(options.checkpoint, model=options.model)
    if isinstance(captioner.model, NextGpt):
        return _any_to_any(AnyToAny(captioner.model, captioner.tokenizer, captioner.size), options)
    if options.image and options.video is not None:
        raise ValueError("image, video: got both, expected one of them")
    for name in ("audio", "make"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"{name}: got {getattr(options, name)} for a model of pictures, expected it with a next_gpt"
            )
    video = options.video is not None
    pictures = options.image if options.video is None else frames.load(options.video, options.frames)
    meter = Meter(captioner.tokenizer, _print_piece if options.stream else None)
    caption = captioner.caption(
        pictures, options.prompt, video=video, max_new_tokens=options.max_new_tokens, beams=options.beams,
        length_penalty=options.length_penalty, temperature=options.temperature, top_p=options.top_p,
        generator=torch.Generator().manual_seed(options.seed), on_token=meter if options.beams == 1 else None,
    )  # fmt: skip
    if options.json:
        seen = (
            {"video": str(options.video), "frames": len(pictures)}
            if video
            else {"images": [*map(str, pictures)]}
        )
        told = {**seen, "prompt": options.prompt, "caption": caption, **meter.rates()}
        print(json.dumps(told, ensure_ascii=False))
    else:
        print("" if options.stream else caption)
    return 0


def _print_piece(piece: str) -> None:
    print(piece, end="", flush=True)


def _any_to_any(model: AnyToAny, options: argparse.Namespace) -> int:
    video = [] if options.video is None else frames.load(options.video, options.frames)
    answer = model.answer(
        options.prompt, options.image, video=video, audio=options.audio, seed=options.seed,
        max_new_tokens=options.max_new_tokens,
    )  # fmt: skip
    paths = {} if options.make is None else save(answer, options.make)
    if options.json:
        shown = {"prompt": options.prompt, "answer": answer.text, "asked": list(answer.asked), "made": paths}
        print(json.dumps(shown, ensure_ascii=False))
        return 0
    print(answer.text)
    for name in answer.asked:
        print(f"asks for {name}" + (f": {paths[name]}" if name in paths else "; --make FOLDER keeps it"))
    return 0

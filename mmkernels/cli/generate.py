"""`mmkernels generate`: captions from a checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mmkernels.infer import Captioner


def add(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="caption pictures with a trained checkpoint",
        description="Continues a prompt about one or several pictures; without <image> in the prompt all pictures stand "
        "before it, and what is written is about the last one.",
        epilog="example: mmkernels generate --checkpoint runs/tiny --image a.png --image b.png --prompt 'a photograph of'",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="a run's folder, or one of its checkpoints"
    )
    parser.add_argument("--model", help="the model that the checkpoint must be of (default: whatever it is)")
    parser.add_argument(
        "--image", type=Path, action="append", required=True, help="a picture; may be repeated"
    )
    parser.add_argument(
        "--prompt", default="", help="words to continue; <image> says where each picture stands"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, help="longest answer (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    captioner = Captioner.from_checkpoint(options.checkpoint, model=options.model)
    caption = captioner.caption(options.image, options.prompt, max_new_tokens=options.max_new_tokens)
    if options.json:
        images = [str(path) for path in options.image]
        print(
            json.dumps({"images": images, "prompt": options.prompt, "caption": caption}, ensure_ascii=False)
        )
    else:
        print(caption)
    return 0

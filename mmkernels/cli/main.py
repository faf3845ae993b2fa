"""The command line: `mmkernels <command>`. It parses and prints; the work is done on the floors below."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a model on images with captions, in its published stages",
    "generate": "caption pictures with a trained checkpoint",
    "models": "list the models and presets",
    "convert": "turn an authors' .pt or .bin file into safetensors",
    "plan": "predict step time, tokens a second, memory and traffic of training",
    "bench": "time every op against what users can write today",
    "doctor": "what this installation can do, and why not more",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status. Bad input is one sentence on stderr and status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="mmkernels", description="Fused kernels for multimodal language models."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    chosen = next((word for word in words if not word.startswith("-")), "")
    for name, summary in COMMANDS.items():
        if name == chosen:  # the others' imports would make every command wait
            importlib.import_module(f"mmkernels.cli.{name}").add(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    options = parser.parse_args(words)
    try:
        return int(options.run(options) or 0)
    except KeyboardInterrupt:
        print("mmkernels: stopped", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"mmkernels {options.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

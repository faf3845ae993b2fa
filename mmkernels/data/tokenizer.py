"""Byte-level BPE: every text has tokens, and the words of the captions have short ones. Needs the `tokenizers` package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PAD, END_OF_TEXT, IMAGE, END_OF_CHUNK = "<pad>", "<|endoftext|>", "<image>", "<|endofchunk|>"
SPECIAL = (PAD, END_OF_TEXT, IMAGE, END_OF_CHUNK)  # their ids are 0, 1, 2, 3


class Tokenizer:
    """Text to ids and back; the four special tokens are one id each wherever they stand in a text."""

    pad, end_of_text, image, end_of_chunk = range(len(SPECIAL))

    def __init__(self, core: Any) -> None:
        self._core = core

    @classmethod
    def train(cls, captions: Iterable[str], size: int) -> Tokenizer:
        """Learns at most `size` tokens from captions: the special ones, 256 bytes, then merges by frequency."""
        tokenizers = _library()
        pre = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        core = tokenizers.Tokenizer(tokenizers.models.BPE())
        core.pre_tokenizer, core.decoder = pre, tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre.alphabet()),
            show_progress=False,
        )
        core.train_from_iterator(sorted(captions), trainer)
        return cls(core)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Reads what `text()` gave. **Raises** ValueError for anything else; FileNotFoundError."""
        raw = Path(path).read_bytes()
        try:
            self = cls(_library().Tokenizer.from_str(raw.decode()))
        except Exception as error:  # the tokenizers package raises plain Exception
            raise ValueError(f"{path}: not a tokenizer ({str(error).splitlines()[0]})") from None
        if [self._core.token_to_id(token) for token in SPECIAL] != list(range(len(SPECIAL))):
            raise ValueError(f"{path}: a tokenizer whose first ids are not {', '.join(SPECIAL)}")
        return self

    def text(self) -> str:
        """The tokenizer as JSON, the same letters for the same captions."""
        return json.dumps(json.loads(self._core.to_str()), indent=1, ensure_ascii=False)

    def __len__(self) -> int:
        return self._core.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Special tokens are left out."""
        return self._core.decode(list(ids), skip_special_tokens=True)


def _library() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ImportError('captions need the tokenizers package: pip install "mmkernels[train]"') from error
    return tokenizers

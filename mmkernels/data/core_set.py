"""SVIT's core set: the samples that hold most of the wanted concepts, with as many "no" as "yes" as one asks for.

No code and no thresholds were published: what is counted as a concept, how rare is too rare and the wanted proportion are
parameters here, and our choice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def frequent(texts: Sequence[str], keywords: Sequence[str], least: int = 1) -> list[str]:
    """The keywords, lower-cased and each once, that occur as whole words in `least` texts or more."""
    counts = dict.fromkeys((keyword.lower() for keyword in keywords), 0)
    for words in map(_words, texts):
        for keyword in counts:
            counts[keyword] += _holds(words, keyword)
    return [keyword for keyword, count in counts.items() if count >= least]


def overlap(texts: Sequence[str], keywords: Sequence[str]) -> list[int]:
    """How many of the keywords occur in each text, as whole words; how often one does is not counted."""
    wanted = list(dict.fromkeys(keyword.lower() for keyword in keywords))
    return [sum(_holds(words, keyword) for keyword in wanted) for words in map(_words, texts)]


def select(
    texts: Sequence[str],
    answers: Sequence[str],
    keywords: Sequence[str],
    size: int,
    *,
    least: int = 1,
    yes_share: float | None = 0.5,
) -> list[int]:
    """Indices of at most `size` samples, the best first: by concept overlap, then balanced between yes and no.

    Samples are sorted by (-overlap, index), the first `size` are kept; then the worst of those that say yes (or no) more often
    than `yes_share` of all yes and no answers go, and nothing takes their place. None balances nothing.
    **Edge** if only one of the two is ever said nothing goes. **Raises** ValueError for sizes below 1, shares that are not
    between 0 and 1, and other counts of answers. **Source** SVIT (arXiv 2307.04087).
    """
    if size < 1:
        raise ValueError(f"size: got {size}, expected 1 or more")
    if yes_share is not None and not 0 < yes_share < 1:
        raise ValueError(f"yes_share: got {yes_share}, expected a number between 0 and 1")
    if len(texts) != len(answers):
        raise ValueError(f"answers: got {len(answers)}, expected {len(texts)}, one a text")
    scores = overlap(texts, frequent(texts, keywords, least))
    kept = sorted(range(len(texts)), key=lambda i: (-scores[i], i))[:size]
    return kept if yes_share is None else _balanced(kept, answers, yes_share)


def _balanced(ranked: list[int], answers: Sequence[str], yes_share: float) -> list[int]:
    kinds = {i: _words(answers[i])[:1] for i in ranked}
    yes, no = ([i for i in ranked if kinds[i] == [word]] for word in ("yes", "no"))
    if not yes or not no:
        return ranked
    most_yes, most_no = (
        round(len(no) * yes_share / (1 - yes_share)),
        round(len(yes) * (1 - yes_share) / yes_share),
    )
    surplus = {*yes[max(1, most_yes) :], *no[max(1, most_no) :]}
    return [i for i in ranked if i not in surplus]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _holds(words: list[str], keyword: str) -> bool:
    """Whether a keyword, of one word or of several in a row, stands in a text."""
    wanted = _words(keyword)
    return bool(wanted) and any(
        words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1)
    )

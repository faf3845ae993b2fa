"""How LLaVA-1.5 asks for short answers: each kind of academic question says in which form it is to be answered."""

from __future__ import annotations

from collections.abc import Sequence

FORMATS = {
    "word": "Answer the question using a single word or phrase.",  # VQAv2, GQA, OKVQA, OCR-VQA
    "letter": "Answer with the option's letter from the given choices directly.",  # A-OKVQA
    "caption": "Provide a one-sentence caption for the provided image.",  # TextCaps
    "region": "Provide a short description for this region.",  # Visual Genome, RefCOCO
    "box": "Provide the bounding box coordinate of the region this sentence describes.",
    "unanswerable": "When the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",  # VizWiz, in evaluation
    "plain": "",
}


def ask(
    question: str, form: str = "plain", *, choices: Sequence[str] = (), tokens: Sequence[str] = ()
) -> str:
    """A question with its form behind it: `question`, the lettered choices, words read in the picture, and the form.

    **Raises** ValueError for unknown forms, for "letter" without choices and for choices without it, and for more than 26.
    """
    if form not in FORMATS:
        raise ValueError(f"form: got {form!r}, expected one of {', '.join(FORMATS)}")
    if (form == "letter") != bool(choices) or len(choices) > 26:
        raise ValueError(
            f"choices: got {len(choices)} for {form!r}, expected 1 to 26 for 'letter' and none elsewhere"
        )
    lines = [question.strip()] if question.strip() else []
    lines += [f"{chr(65 + n)}. {choice}" for n, choice in enumerate(choices)]
    lines += [FORMATS[form]] if FORMATS[form] else []
    lines += [f"Reference OCR token: {', '.join(tokens)}"] if tokens else []
    return "\n".join(lines)

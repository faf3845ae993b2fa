"""Systems that cut large pictures into slices or read them at any size: LLaVA-UHD, Monkey, OtterHD, SliME."""

from mmkernels.train.recipes.recipe import Mix, Recipe

_V1 = "system. USER: <image>\\n{question} ASSISTANT: {answer}</s>"
_ANSWERS = "the assistant's words and the end of its turn"

SLICED = {
    "llava_uhd": Recipe(
        "LLaVA-UHD",
        "2403.11703",
        "llava-uhd-13b",
        "llava_uhd-tiny",
        "one shared resampler, 64 queries a slice",
        data={"align": Mix({"blip_558k": 558e3}), "instruct": Mix({"mix_665k": 665e3})},
        prompt=_V1,
        labels=_ANSWERS,
        apart='slices of any grid, "," between them and a newline a row; the first stage sees whole pictures',
        parity="tests/parity/test_uhd_adapters.py",
    ),
    "monkey": Recipe(
        "Monkey",
        "2311.06607",
        "monkey-7b",
        "monkey-tiny",
        "Qwen-VL's resampler, shared by windows and the whole view",
        data={"instructions": Mix({"mixture": 1.44e6})},
        prompt="<img>places</img> {question} Answer: {answer}",
        labels="the answer",
        apart="a LoRA a window on one ViT; one stage on top of Qwen-VL",
        parity="tests/parity/test_monkey_published.py",
    ),
    "otterhd": Recipe(
        "OtterHD",
        "2311.04219",
        "otterhd-8b",
        "fuyu-tiny",
        "none: patches of any size enter by one linear",
        data={"instructions": Mix({"llava": 1, "textvqa_ocr": 1, "gqa_vg": 1})},
        prompt="patches, newlines, {question}\\x04 {answer}",
        labels="what stands behind the first \\x04 up to the second",
        apart="no tower; a batch's side is drawn from 448, 512 and 768; everything learns",
        parity="tests/parity/test_fuyu_hf.py",
        notes="No ratio of the sets was published; 1 each stands for it.",
    ),
    "slime": Recipe(
        "SliME",
        "2406.08487",
        "slime-7b",
        "slime-tiny",
        "whole view by MLP and queries, softly mixed; local tokens compressed",
        data={"whole": Mix({"pairs": 558e3}), "instruct": Mix({"sft": 695e3})},
        prompt=_V1,
        labels=_ANSWERS,
        apart="stages take turns between whole view and tiles; a router keeps the local tokens that the question asks for",
        parity="tests/parity/test_uhd_adapters.py",
    ),
}

"""Systems that change the language model itself, or what comes out of it: CogVLM, LaVIN, NExT-GPT."""

from mmkernels.train.recipes.recipe import Mix, Recipe

ADAPTED = {
    "cogvlm": Recipe(
        "CogVLM",
        "2311.03079",
        "cogvlm-17b",
        "cogvlm-tiny",
        "a gated MLP; in every layer picture tokens have weights of their own",
        data={"captioning": Mix({"pairs": 1.5e9}), "referring": Mix({"captions": 1.0, "boxes": 1.0})},
        prompt="boi places eoi Question: {question} Answer: {answer}",
        labels="the answer",
        apart="all of a picture has one position; vision experts start as copies; the text's weights stay as they are",
        parity="tests/models/test_cogvlm.py",
    ),
    "lavin": Recipe(
        "LaVIN",
        "2305.15023",
        "lavin-7b",
        "lavin-tiny",
        "6 class tokens by a small MLP; adapters in every layer of both",
        data={"mixture": Mix({"scienceqa": 1.0}, by="shares")},
        prompt="[modality] <s> Image: places (or N/A) {question}, {answer}",
        labels="the answer; 0 is not predicted",
        apart="rows with and without a picture in one batch; a modality token steers which adapter counts; 3.8 M numbers learn",
        parity="tests/models/test_lavin.py",
    ),
    "next_gpt": Recipe(
        "NExT-GPT",
        "2309.05519",
        "next_gpt-7b",
        "next_gpt-tiny",
        "in: a GroupViT, 8 tokens an input; out: signal tokens through a transformer to a diffusion model's conditions",
        data={
            "encoding": Mix({"cc3m": 3e6, "webvid": 10e6, "audiocaps": 46e3}),
            "decoding": Mix({"cc3m": 3e6, "webvid": 10e6, "audiocaps": 46e3}),
            "instructions": Mix(
                {"llava": 150e3, "alpaca": 52e3, "videochat": 11e3, "text_to_x": 15e3, "mosit": 5e3}
            ),
        },
        prompt="### Human: <Img>input</Img> {instruction}\\n### Assistant: {answer} signals\\n###",
        labels="the answer, its signal tokens and the turn's end",
        apart="three kinds of inputs; cross-entropy and the distance to the conditions of the caption; LoRA in the last stage",
        parity="tests/layers/test_next_gpt_layers.py",
        notes="Sizes as far as the paper states them; a batch is of one kind there.",
    ),
}

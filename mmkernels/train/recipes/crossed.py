"""Systems whose language model cross-attends to media: Flamingo, and MIMIC-IT's Otter."""

from mmkernels.train.recipes.recipe import Mix, Recipe

CROSSED = {
    "flamingo": Recipe(
        "Flamingo",
        "2204.14198",
        "flamingo-3b",
        "flamingo-tiny",
        connector="Perceiver resampler (64 latents a picture or video), gated cross-attention every N layers",
        data={"joints": Mix({"m3w": 1.0, "align": 0.2, "ltip": 0.2, "vtp": 0.03}, by="losses")},
        prompt="<image>caption<|endofchunk|>, interleaved; a text attends to its last picture",
        labels="all text but padding, <image>, what stands before the first picture, and between a chunk's end and the next",
        apart="each step goes backward once a set and steps once; the stage's two losses are OpenFlamingo's (0.2 pairs, 1.0 "
        "interleaved); only resampler, gated blocks and the rows of two tokens learn",
        parity="tests/parity/test_flamingo_pytorch.py",
    ),
    "otter": Recipe(
        "MIMIC-IT / Otter",
        "2306.05425",
        "otter-9b",
        "otter-tiny",
        connector="Flamingo's",
        data={
            "instructions": Mix(
                {"image_text": 1, "text_only": 1, "video_text": 1, "image_text_in_context": 1}
            )
        },
        prompt="<image>User:{instruction} GPT:<answer>{answer}<|endofchunk|>, examples before it (data.in_context)",
        labels="what stands behind <answer> up to its <|endofchunk|>, and the end",
        apart="input embeddings learn too; several pictures, videos as one <image>, examples in context",
        parity="tests/models/test_weights.py",
        notes="A group is drawn in proportion to its records; how many those are depends on the release, 1 each stands for it.",
    ),
}

"""How BLIP-2 and InstructBLIP are trained, stage by stage."""

from __future__ import annotations

from dataclasses import replace

from mmkernels.models.stages import Stage

# what stage 2 keeps of a Q-Former: everything but what only text goes through
QUERY_SIDE = (
    "qformer.query_tokens", "qformer.norm.*", "qformer.image_kv.*", "qformer.layers.*.attention*",
    "qformer.layers.*.cross*", "qformer.layers.*.query_*",
)  # fmt: skip
STAGE1 = Stage(
    "stage1",
    trainable=("qformer.*", "ln_vision.*", "heads.*"),
    losses={"itc": 1.0, "itm": 1.0, "lm": 1.0},
    mix={"itc": 1.0, "itm": 1.0, "lm": 1.0},  # the three read one batch
    learning_rate=1e-4,
    weight_decay={"*": 0.05},
    decay_vectors=False,
    betas=(0.9, 0.98),
    schedule="cosine",
    warmup=2000,
    steps=250_000,
)

# retrieval on COCO: the tower learns too, its deeper layers faster, at 364 pixels
RETRIEVAL = replace(
    STAGE1,
    name="retrieval",
    trainable=(*STAGE1.trainable, "vision.*"),
    learning_rate=1e-5,
    betas=(0.9, 0.999),
    warmup=1000,
    steps=None,
    layer_decay=0.95,
    image_size=364,
)

STAGE2 = Stage(
    "stage2",
    trainable=(*QUERY_SIDE, "ln_vision.*", "proj.*"),
    losses={"captions": 1.0},
    mix={"captions": 1.0},
    learning_rate=1e-4,
    weight_decay={"*": 0.05},
    decay_vectors=False,
    betas=(0.9, 0.98),
    schedule="cosine",
    floor=5e-5,
    warmup=2000,
    steps=80_000,
)
INSTRUCT = replace(
    STAGE2,
    name="instructions",
    trainable=(
        *QUERY_SIDE, "qformer.embedding.*", "qformer.position_embedding.*", "qformer.layers.*.text_*", "ln_vision.*", "proj.*"
    ),
    losses={"instructions": 1.0},
    mix={"instructions": 1.0},  # over the held-in sets by data.mixing.square_root
    learning_rate=1e-5,
    betas=(0.9, 0.999),
    floor=0.0,
    warmup=1000,
    steps=60_000,
)  # fmt: skip
# finetuning on COCO, with the tower, at 364 pixels; its captions are written behind "a photo of"
COCO_CAPTIONS = replace(
    STAGE2,
    name="coco_captions",
    trainable=(*STAGE2.trainable, "vision.*"),
    learning_rate=1e-5,
    betas=(0.9, 0.999),
    floor=0.0,
    warmup=1000,
    steps=None,
    image_size=364,
)

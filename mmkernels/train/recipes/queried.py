"""Systems with learned queries between tower and language model: BLIP-2, InstructBLIP, XComposer, Qwen-VL, LLaMA-VID."""

from mmkernels.models.qformer_recipes import STAGE1
from mmkernels.train.recipes.recipe import Mix, Recipe

_PAIRS = {"coco": 113e3, "visual_genome": 100e3, "cc3m": 3e6, "cc12m": 12e6, "sbu": 1e6, "laion400m": 115e6}
_HELD_IN = {  # training samples of InstructBLIP's sets
    "coco_caption": 566_747,
    "web_capfilt": 14e6,
    "textcaps": 109_765,
    "vqav2": 443_757,
    "okvqa": 9_009,
    "aokvqa": 17_056,
    "ocr_vqa": 801_579,
    "llava_instruct": 157_712,
}

QUERIED = {
    "blip2": Recipe(
        "BLIP-2",
        "2301.12597",
        "blip2-opt-2.7b",
        "blip2-tiny",
        connector="Q-Former: 32 queries, 12 layers, cross-attention in every second",
        data={"stage1": Mix(_PAIRS), "stage2": Mix(_PAIRS)},
        prompt="32 query tokens, then the caption (behind 'a photo of' when finetuned on COCO)",
        labels="stage 2: the caption and its end",
        apart="stage 1 has three losses on one batch (ITC, ITM, ITG) and no language model",
        parity="tests/parity/test_qformer_hf.py",
        before=(STAGE1,),
    ),
    "instructblip": Recipe(
        "InstructBLIP",
        "2305.06500",
        "instructblip-vicuna-7b",
        "instructblip-tiny",
        connector="Q-Former that reads the instruction beside the picture",
        data={"instructions": Mix(_HELD_IN, by="square_root")},
        prompt="32 query tokens, instruction, answer; the instruction goes to the Q-Former too",
        labels="the answer and its end",
        apart="sets are drawn by the square root of their size",
        parity="tests/parity/test_blip2_hf.py",
        notes="Sizes as far as they are known; LLaVA's set is three in the paper.",
    ),
    "xcomposer": Recipe(
        "InternLM-XComposer",
        "2309.15112",
        "xcomposer-7b",
        "xcomposer-tiny",
        connector="Q-Former as a perceive sampler (64 queries), flags around an image's tokens",
        data={
            "pretrain": Mix({"interleaved": 1.1e9}),
            "instructions": Mix({"tasks": 1.0, "composition": 1.0}),
        },
        prompt="<|User|>:{instruction}<eoh> <|Bot|>:{answer}<eoa>, images anywhere",
        labels="text in the first stage, answers in the second",
        apart="the language model learns in the first stage; in the second only its LoRA",
        parity="tests/models/test_qformer_weights.py",
        notes="No mix ratio of the second stage was published; 1 each stands for it.",
    ),
    "qwen_vl": Recipe(
        "Qwen-VL",
        "2308.12966",
        "qwen-vl-7b",
        "qwen_vl-tiny",
        connector="one cross-attention layer, 256 queries with 2-D positions",
        data={
            "pretrain": Mix({"pairs": 1.4e9}),
            "multitask": Mix(
                {
                    "caption": 19.7,
                    "vqa": 3.6,
                    "grounding": 3.5,
                    "ref_grounding": 8.7,
                    "grounded_caption": 8.7,
                    "ocr": 24.8,
                    "text": 7.8,
                }
            ),
            "chat": Mix({"instructions": 350e3}),
        },
        prompt="<img>places</img>text; chat: <|im_start|>user\\n...<|im_end|>",
        labels="text around pictures; in chat the assistant's turns and every turn's frame",
        apart="224 pixels, then 448: the tower's positions are stretched between the stages",
        parity="tests/parity/test_qwen.py",
    ),
    "llama_vid": Recipe(
        "LLaMA-VID",
        "2311.17043",
        "llama-vid-7b-long",
        "llama-vid-tiny",
        connector="a frame is two tokens: context attention by the question's queries, pooled content",
        data={
            "alignment": Mix({"images": 558e3, "videos": 232e3}),
            "instruction": Mix({"images": 665e3, "videos": 100e3}),
            "long_video": Mix({"movies": 9e3}),
        },
        prompt="<image> (two places a frame) question, answer",
        labels="the answer",
        apart="the question is read twice, by the Q-Former and by the language model",
        parity="tests/models/test_llama_vid.py",
    ),
}

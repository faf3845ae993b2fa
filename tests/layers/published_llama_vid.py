"""LLaMA-VID's published computation, written out densely under the authors' names, and inputs for it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from published_qformer import CONFIG, Published, State, lavis_state
from torch import Tensor

WIDTH, LM, TEXT = CONFIG.image_width, 10, 5
QFORMER = type(CONFIG)(**{**vars(CONFIG), "text_head": False, "dropout": 0.0})
LINEAR = {
    "vlm_att_projector": (WIDTH, CONFIG.hidden), "vlm_att_key_projector": (WIDTH, WIDTH),
    "vlm_att_val_projector": (LM, WIDTH), "mm_projector.0": (LM, WIDTH), "mm_projector.2": (LM, LM),
}  # fmt: skip


def published_state() -> State:
    """Random parameters under the authors' names, in float64."""
    random = torch.Generator().manual_seed(5)
    state = {}
    for name, (rows, columns) in LINEAR.items():
        state[f"{name}.weight"] = torch.randn(
            rows, columns, generator=random, dtype=torch.float64
        ) / math.sqrt(columns)
        state[f"{name}.bias"] = torch.randn(rows, generator=random, dtype=torch.float64) / 4
    for end in ("weight", "bias"):
        state[f"vlm_att_ln.{end}"] = torch.rand(WIDTH, generator=random, dtype=torch.float64) + 0.5
    bert = {k: v for k, v in lavis_state().items() if not k.startswith("cls.")}
    state["vlm_att_query"] = bert.pop("query_tokens").reshape(1, CONFIG.num_query, CONFIG.hidden)
    return state | {f"vlm_att_encoder.{key}": value for key, value in bert.items()}


class Eager:
    """One prompt over the frames `[N, M, C]` of one sample, as the paper and its public code compute it."""

    def __init__(self, state: State, compress: str) -> None:
        self.p, self.compress = state, compress
        encoder = "vlm_att_encoder."
        bert = {k.removeprefix(encoder): v for k, v in state.items() if k.startswith(encoder)}
        self.bert = Published(bert | {"query_tokens": state["vlm_att_query"]}, CONFIG)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])

    def __call__(self, frames: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        ln = F.layer_norm(frames, (WIDTH,), self.p["vlm_att_ln.weight"], self.p["vlm_att_ln.bias"], 1e-5)
        n = len(frames)
        hidden = self.bert(ln, ids.expand(n, -1), mask.expand(n, -1), "itm")[:, : CONFIG.num_query]
        patches = frames[:, 1:] if frames.shape[1] % 2 == 1 else frames
        return self.tokens(self.linear("vlm_att_projector", hidden), patches)

    def tokens(self, q: Tensor, x: Tensor) -> Tensor:
        scores = q @ self.linear("vlm_att_key_projector", x).transpose(1, 2) / math.sqrt(WIDTH)
        context = self.linear("vlm_att_val_projector", (scores.softmax(-1) @ x).mean(1, keepdim=True))
        if self.compress == "mean":
            x = x.mean(1, keepdim=True)
        if self.compress.startswith("grid:"):
            n = math.isqrt(x.shape[1])
            square = x.transpose(1, 2).reshape(len(x), WIDTH, n, n)
            x = F.avg_pool2d(square, n // int(self.compress[5:])).flatten(2).transpose(1, 2)
        content = self.linear("mm_projector.2", F.gelu(self.linear("mm_projector.0", x)))
        return torch.cat([context, content], 1)


def inputs(frames: int = 3, tokens: int = 17, prompts: int = 2) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(3)
    mask = torch.tensor(
        [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0]], dtype=torch.bool
    )
    return {
        "frames": torch.randn(2, frames, tokens, WIDTH, generator=random, dtype=torch.float64),
        "text_ids": torch.randint(1, CONFIG.vocab, (2, prompts, TEXT), generator=random),
        "text_mask": mask[: 2 * prompts].view(2, prompts, TEXT),
    }


def expected(state: State, compress: str, x: dict[str, Tensor]) -> Tensor:
    eager, (b, p) = Eager(state, compress), x["text_ids"].shape[:2]
    rows = [
        torch.stack([eager(x["frames"][i], x["text_ids"][i, j], x["text_mask"][i, j]) for j in range(p)])
        for i in range(b)
    ]
    return torch.stack(rows)

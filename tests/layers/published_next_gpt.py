"""NExT-GPT's projectors as published: torch's own transformer, and GroupViT as functions of a state dict."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

State = dict[str, Tensor]


class TextFc(nn.Module):
    """The output projection, with the first release's names."""

    def __init__(self, width: int, out: int, queries: int, hidden: int = 512) -> None:
        super().__init__()
        self.fc = nn.Linear(width, hidden)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that pre-norm encoders have no nested tensors
            self.tfm = nn.Transformer(hidden, 4, 4, 4, 4 * hidden, 0.0, batch_first=True, norm_first=True)
        self.model = nn.Linear(hidden, out)
        self.query_embs = nn.Parameter(torch.randn(1, queries, hidden))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        return self.model(self.tfm(self.fc(x + e), self.query_embs.repeat(len(x), 1, 1)))


def _mlp(s: State, at: str, x: Tensor) -> Tensor:
    return F.linear(F.gelu(_linear(s, at + "fc1.", x)), s[at + "fc2.weight"], s[at + "fc2.bias"])


def _linear(s: State, at: str, x: Tensor) -> Tensor:
    return F.linear(x, s[at + "weight"], s.get(at + "bias"))


def _norm(s: State, at: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[at + "weight"], s[at + "bias"])


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _softmax(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (_heads(t, heads) for t in (q, k, v))
    p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    return (p @ v).transpose(1, 2).flatten(2)


def _group(s: State, at: str, x: Tensor, tokens: Tensor, heads: int, noise: Tensor | None) -> Tensor:
    tokens, x = _norm(s, at + "norm_tokens.", tokens), _norm(s, at + "norm_x.", x)
    g = _norm(s, at + "norm_post_tokens.", _mlp(s, at + "mlp_inter.", tokens.mT).mT)
    cross = at + "pre_assign_attn."
    q = _linear(s, cross + "attn.q_proj.", g)
    k, v = (_linear(s, f"{cross}attn.{n}_proj.", x) for n in "kv")
    g = g + _linear(s, cross + "attn.proj.", _softmax(q, k, v, heads))
    g = _norm(s, cross + "norm_post.", g + _mlp(s, cross + "mlp.", _norm(s, cross + "norm2.", g)))
    q = _linear(s, at + "assign.q_proj.", g)
    k, v = (_linear(s, f"{at}assign.{n}_proj.", x) for n in "kv")
    scores = q @ k.mT * g.shape[-1] ** -0.5
    soft = (scores if noise is None else scores + noise).softmax(-2)
    hard = torch.zeros_like(soft).scatter_(-2, soft.argmax(-2, keepdim=True), 1.0)
    p = hard - soft.detach() + soft
    p = p / (p.sum(-1, keepdim=True) + 1.0)
    new = _linear(s, at + "assign.proj.", p @ v) + g
    return new + _mlp(s, at + "mlp_channels.", _norm(s, at + "norm_new_x.", new))


def project(s: State, x: Tensor, depths: tuple[int, ...], heads: int, noise: list[Tensor | None]) -> Tensor:
    x, before = _linear(s, "in_fc.", x), None
    for n, depth in enumerate(depths):
        at = f"layers.{n}."
        own = s.get(at + "group_token")
        if own is not None:
            own = own.expand(len(x), -1, -1)
            if before is not None:
                own = (
                    own
                    + _mlp(s, at + "group_projector.1.", _norm(s, at + "group_projector.0.", before).mT).mT
                )
            x = torch.cat([x, own], 1)
        for b in range(depth):
            block = f"{at}blocks.{b}."
            q, k, v = _linear(s, block + "attn.qkv.", _norm(s, block + "norm1.", x)).chunk(3, -1)
            x = x + _linear(s, block + "attn.proj.", _softmax(q, k, v, heads))
            x = x + _mlp(s, block + "mlp.", _norm(s, block + "norm2.", x))
        if own is not None:
            count = own.shape[1]
            x, before = x[:, :-count], x[:, -count:]
            x = _group(s, at + "downsample.", x, before, heads, noise[n])
    return _linear(s, "out_fc.", _norm(s, "norm.", x))


def state(
    media: int,
    width: int,
    hidden: int,
    depths: tuple[int, ...],
    tokens: tuple[int, ...],
    groups: tuple[int, ...],
) -> State:
    """Random parameters under the published names, float64."""
    sizes: dict[str, tuple[int, ...]] = {}

    def linear(at: str, i: int, o: int, bias: bool = True) -> None:
        sizes.update({at + "weight": (o, i)} | ({at + "bias": (o,)} if bias else {}))

    def norm(at: str) -> None:
        sizes.update({at + "weight": (hidden,), at + "bias": (hidden,)})

    def mlp(at: str, i: int, h: int, o: int) -> None:
        linear(at + "fc1.", i, h)
        linear(at + "fc2.", h, o)

    linear("in_fc.", media, hidden)
    for n, (depth, count) in enumerate(zip(depths, tokens, strict=True)):
        at = f"layers.{n}."
        for b in range(depth):
            block = f"{at}blocks.{b}."
            norm(block + "norm1.")
            norm(block + "norm2.")
            linear(block + "attn.qkv.", hidden, 3 * hidden, bias=False)
            linear(block + "attn.proj.", hidden, hidden)
            mlp(block + "mlp.", hidden, 4 * hidden, hidden)
        if not count:
            continue
        sizes[at + "group_token"] = (1, count, hidden)
        if n:
            norm(at + "group_projector.0.")
            mlp(at + "group_projector.1.", tokens[n - 1], hidden // 2, count)
        down = at + "downsample."
        for name in ("norm_tokens", "norm_post_tokens", "norm_x", "norm_new_x"):
            norm(f"{down}{name}.")
        mlp(down + "mlp_inter.", count, hidden // 2, groups[n])
        mlp(down + "mlp_channels.", hidden, 4 * hidden, hidden)
        for part in ("pre_assign_attn.attn.", "assign."):
            for name in ("q_proj.", "k_proj.", "v_proj.", "proj."):
                linear(down + part + name, hidden, hidden)
        norm(down + "pre_assign_attn.norm_post.")
        norm(down + "pre_assign_attn.norm2.")
        mlp(down + "pre_assign_attn.mlp.", hidden, 4 * hidden, hidden)
    norm("norm.")
    linear("out_fc.", hidden, width)
    return _random(sizes)


def _random(sizes: dict[str, tuple[int, ...]]) -> State:
    g = torch.Generator().manual_seed(5)
    return {k: torch.randn(v, generator=g, dtype=torch.float64) * 0.3 for k, v in sizes.items()}

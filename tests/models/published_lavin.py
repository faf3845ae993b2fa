"""LaVIN's published computation, plain and eager: complex rotary pairs, masks of -inf, convolutions of one place."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.models import LavinConfig

State = dict[str, Tensor]


class _Maker:
    """Random parameters, in order."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.made: State = {}
        self.g, self.dtype = torch.Generator().manual_seed(seed), dtype

    def add(self, name: str, *shape: int, std: float = 0.2) -> None:
        self.made[name] = torch.randn(shape, generator=self.g, dtype=self.dtype) * std

    def linear(self, name: str, out: int, into: int, *more: int, bias: bool = True) -> None:
        self.add(f"{name}.weight", out, into, *more, std=into**-0.5)
        if bias:
            self.add(f"{name}.bias", out)

    def norm(self, name: str, width: int, bias: bool = True) -> None:
        self.add(f"{name}.weight", width)
        self.made[f"{name}.weight"] += 1
        if bias:
            self.add(f"{name}.bias", width)

    def adapter(self, name: str, width: int, routed: bool) -> None:
        self.linear(f"{name}.conv_A", 8, width, 1)
        for branch in ("conv_B", "conv_D") if routed else ("conv_B",):
            self.linear(f"{name}.{branch}", width, 4, 1)
        if routed:
            self.linear(f"{name}.expert_weights", 2, width)


def state(config: LavinConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> State:
    """A whole model under the authors' keys."""
    make, width = _Maker(seed, dtype), config.lm.block.width
    _llama(make, config)
    _clip(make, config)
    make.linear("adapter_proj.conv_A", config.hidden, config.vision.width)
    make.linear("adapter_proj.conv_B", width, config.hidden)
    make.add("adapter_modality_embedding.weight", 2, width, std=1.0)
    return make.made


def _llama(make: _Maker, config: LavinConfig) -> None:
    lm, b = config.lm, config.lm.block
    make.add("tok_embeddings.weight", lm.vocab, b.width, std=1.0)
    for i in range(lm.layers):
        for n in ("wq", "wk", "wv", "wo"):
            make.linear(f"layers.{i}.attention.{n}", b.width, b.width, bias=False)
        for n, out, into in (("w1", b.hidden, b.width), ("w2", b.width, b.hidden), ("w3", b.hidden, b.width)):
            make.linear(f"layers.{i}.feed_forward.{n}", out, into, bias=False)
        make.norm(f"layers.{i}.attention_norm", b.width, bias=False)
        make.norm(f"layers.{i}.ffn_norm", b.width, bias=False)
        make.adapter(f"layers.{i}.adapter_attn", b.width, True)
    make.norm("norm", b.width, bias=False)
    make.linear("output", lm.vocab, b.width, bias=False)


def _clip(make: _Maker, config: LavinConfig) -> None:
    v, at = config.vision, "backbone.visual."
    make.add(f"{at}conv1.weight", v.width, 3, v.patch_size, v.patch_size)
    make.add(f"{at}class_embedding", v.width)
    make.add(f"{at}positional_embedding", v.patches + 1, v.width)
    make.norm(f"{at}ln_pre", v.width)
    for j in range(v.layers):
        block = f"{at}transformer.resblocks.{j}"
        make.add(f"{block}.attn.in_proj_weight", 3 * v.width, v.width, std=v.width**-0.5)
        make.add(f"{block}.attn.in_proj_bias", 3 * v.width)
        make.linear(f"{block}.attn.out_proj", v.width, v.width)
        make.linear(f"{block}.mlp.c_fc", v.hidden, v.width)
        make.linear(f"{block}.mlp.c_proj", v.width, v.hidden)
        make.norm(f"{block}.ln_1", v.width)
        make.norm(f"{block}.ln_2", v.width)
        assert v.adapter is not None
        make.adapter(f"{block}.adapter_attn", v.width, v.adapter.routed)


def leftovers(s: State) -> State:
    """Keys of a whole file that nothing of the model takes."""
    names = ("logit_scale", "token_embedding.weight", "transformer.resblocks.0.ln_1.weight", "visual.proj")
    extra = {f"backbone.{n}": torch.ones(1) for n in (*names, "visual.ln_post.weight")}
    return s | extra | {"rope.freqs": torch.ones(1)}


def _route(s: State, at: str, x: Tensor, half: bool) -> Tensor:
    w = F.linear(x, s[f"{at}.expert_weights.weight"], s[f"{at}.expert_weights.bias"])
    w = (w / 10).softmax(-1)
    return w.half() if half else w


def adapt(s: State, at: str, x: Tensor, half: bool, w: Tensor | None = None) -> Tensor:
    z = x.transpose(1, 2)
    a = F.conv1d(z, s[f"{at}.conv_A.weight"], s[f"{at}.conv_A.bias"])
    b = F.conv1d(a, s[f"{at}.conv_B.weight"], s[f"{at}.conv_B.bias"], groups=2)
    if f"{at}.conv_D.weight" not in s:
        return b.transpose(1, 2)
    w = _route(s, at, x[:, 0], half) if w is None else w
    d = F.conv1d(a, s[f"{at}.conv_D.weight"], s[f"{at}.conv_D.bias"], groups=2)
    return (b * w[:, 0, None, None] + d * w[:, 1, None, None] + z).transpose(1, 2)


def _layer_norm(s: State, at: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[f"{at}.weight"], s[f"{at}.bias"], eps)


def encode_image(config: LavinConfig, s: State, images: Tensor, half: bool) -> Tensor:
    """[N, 3, H, W] -> class tokens [N, R, C]; blocks run as (token, image, channel)."""
    v, at, every = config.vision, "backbone.visual.", config.vision.class_every or 1
    x = F.conv2d(images, s[f"{at}conv1.weight"], stride=v.patch_size).flatten(2).transpose(1, 2)
    x = torch.cat([s[f"{at}class_embedding"].expand(len(x), 1, -1), x], 1) + s[f"{at}positional_embedding"]
    x = _layer_norm(s, f"{at}ln_pre", x, v.eps).transpose(0, 1)
    found = []
    for j in range(v.layers):
        p = f"{at}transformer.resblocks.{j}"
        y = adapt(s, f"{p}.adapter_attn", _layer_norm(s, f"{p}.ln_1", x, v.eps), half)
        x = x + F.multi_head_attention_forward(
            y, y, y, v.width, v.heads, s[f"{p}.attn.in_proj_weight"], s[f"{p}.attn.in_proj_bias"], None, None, False, 0.0,
            s[f"{p}.attn.out_proj.weight"], s[f"{p}.attn.out_proj.bias"], need_weights=False,
        )[0]  # fmt: skip
        h = F.linear(
            _layer_norm(s, f"{p}.ln_2", x, v.eps), s[f"{p}.mlp.c_fc.weight"], s[f"{p}.mlp.c_fc.bias"]
        )
        h = h * torch.sigmoid(1.702 * h) if v.activation == "quick_gelu" else F.gelu(h)
        x = x + F.linear(h, s[f"{p}.mlp.c_proj.weight"], s[f"{p}.mlp.c_proj.bias"])
        if (j + 1) % every == 0:
            found.append(x[:1].transpose(0, 1))
    out = torch.cat(found, 1)
    return out.half().to(x.dtype) if half else out


def project(s: State, x: Tensor) -> Tensor:
    a = F.silu(F.linear(x, s["adapter_proj.conv_A.weight"], s["adapter_proj.conv_A.bias"]))
    return F.linear(a, s["adapter_proj.conv_B.weight"], s["adapter_proj.conv_B.bias"])


def _rms(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def _turn(x: Tensor, start: int) -> Tensor:
    """Neighbouring channels (2 r, 2 r + 1) as complex numbers; x [B, T, H, D]."""
    t, d = x.shape[1], x.shape[-1]
    steps = 1.0 / (10_000.0 ** (torch.arange(0, d, 2, dtype=x.dtype) / d))
    angles = torch.outer(torch.arange(start, start + t, dtype=x.dtype), steps)
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(3)


class Llama:
    """The language model; `step` keeps keys and values without those of the modality token, as the published loop."""

    def __init__(self, config: LavinConfig, s: State, half: bool) -> None:
        self.config, self.s, self.half = config, s, half
        self.cache: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def step(self, h: Tensor, start: int, keep: bool = False) -> Tensor:
        """h `[B, T, C]` at position `start`: all of a sequence, its modality first, or what goes on with the cache."""
        block, t = self.config.lm.block, h.shape[1]
        mask = torch.full((t, t), -torch.inf, dtype=h.dtype).triu(1)
        mask[1:, 0] = -torch.inf
        for i in range(self.config.lm.layers):
            p = f"layers.{i}"
            x = _rms(h, self.s[f"{p}.attention_norm.weight"], block.eps)
            w = _route(self.s, f"{p}.adapter_attn", x[:, 0], self.half) if start == 0 else self.cache[i][2]
            y = adapt(self.s, f"{p}.adapter_attn", x, self.half, w)
            q, k, v = (
                F.linear(y, self.s[f"{p}.attention.{n}.weight"]).unflatten(-1, (block.heads, -1))
                for n in ("wq", "wk", "wv")
            )
            q, k = _turn(q, start), _turn(k, start)
            if start > 0:
                k, v = (torch.cat([old, new], 1) for old, new in zip(self.cache[i], (k, v), strict=False))
            if keep:
                self.cache[i] = (k[:, 1:], v[:, 1:], w) if start == 0 else (k, v, w)
            scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
            scores = scores + mask if start == 0 else scores
            o = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
            h = h + F.linear(o, self.s[f"{p}.attention.wo.weight"])
            x = _rms(h, self.s[f"{p}.ffn_norm.weight"], block.eps)
            gate, up = (F.linear(x, self.s[f"{p}.feed_forward.{n}.weight"]) for n in ("w1", "w3"))
            h = h + F.linear(F.silu(gate) * up, self.s[f"{p}.feed_forward.w2.weight"])
        return F.linear(_rms(h, self.s["norm.weight"], block.eps), self.s["output.weight"])


def insert(
    x: Tensor, labels: Tensor, images: Tensor, some: Tensor, none: Tensor, has: list[int]
) -> tuple[Tensor, Tensor]:
    """Row by row, cut to the length that x had."""
    rows, answers = [], []
    for b, one in enumerate(x):
        more = torch.cat([some, images[b]]) if has[b] else none
        rows.append(torch.cat([one[:1], more, one[1:]])[: x.shape[1]])
        zeros = torch.zeros(len(more), dtype=labels.dtype)
        answers.append(torch.cat([labels[b][:1], zeros, labels[b][1:]])[: x.shape[1]])
    return torch.stack(rows), torch.stack(answers)


def loss(
    config: LavinConfig, s: State, ids: Tensor, labels: Tensor, images: Tensor, has: list[int], half: bool
) -> tuple[Tensor, Tensor]:
    """The training pass over ids `[B, T]` that begin with bos: loss and logits."""
    table, marks, t = s["tok_embeddings.weight"], config.marks, ids.shape[1]
    visual = project(s, encode_image(config, s, images, half))
    some, none = (table[list(p)] for p in (marks.image_prefix, marks.text_prefix))
    h, labels = insert(table[ids], labels, visual, some, none, has)
    kind = s["adapter_modality_embedding.weight"][torch.tensor(has)].unsqueeze(1)
    h, labels = torch.cat([kind, h], 1)[:, :t], F.pad(labels, (1, 0))[:, :t]
    logits = Llama(config, s, half).step(h, 0)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=0), logits

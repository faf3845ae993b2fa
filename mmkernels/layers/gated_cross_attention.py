"""Flamingo's gated cross-attention block: text reads its images, then a feed-forward, each behind a gate that starts closed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table, renames
from mmkernels.layers.norm import EPS, make_norm
from mmkernels.ops.gated_cross_attention import (
    Intervals,
    gated_cross_attention,
    gated_feed_forward,
    media_intervals,
)
from mmkernels.ops.gated_cross_attention.feed_forward import ACTIVATIONS
from mmkernels.primitives import _autocast, _check
from mmkernels.primitives.interval_attention import interval_attention

KeysValues = tuple[Tensor, Tensor]


class GatedCrossAttentionBlock(nn.Module):
    """Text attends to the images it may see, then passes a feed-forward; both are added through tanh gates.

    `x1 = x + tanh(attention_gate) * (attention(norm(x) Wq, media Wkv) Wo)`,
    `y = x1 + tanh(ffn_gate) * (act(norm(x1) Win) Wout)`. Media are not normalised; there are no positions and no biases.

    `media_mode` "last" shows a row its last image, "all_previous" every image so far. `no_media="published"` computes rows
    without a visible image as the published code does: exactly zero in "last" mode before any image, the uniform average in
    "all_previous" mode and past the last medium; "zero" gives exact zeros everywhere. `attend_previous=False` gives text the
    image after it. `gate` "scalar" or "vector" (one per channel). `qk_norm` normalises queries and keys per head.
    `eps=None` is 1e-5 for norm="layer", 1e-6 for "rms".

    **Source** Flamingo (arXiv 2204.14198); weights of `open_flamingo`, `otter`, `idefics` load by `weights.load`.
    **Speed** `mmkernels bench --op gated_cross_attention`.
    """

    sources = ("open_flamingo", "otter", "idefics")

    def __init__(
        self,
        width: int,
        media_width: int,
        *,
        heads: int = 8,
        head_dim: int = 64,
        ff_mult: float = 4,
        media_mode: str = "last",
        no_media: str = "published",
        attend_previous: bool = True,
        norm: str = "layer",
        ffn: str = "gelu",
        gate: str = "scalar",
        qk_norm: bool = False,
        eps: float | None = None,
    ) -> None:
        super().__init__()
        _check.positive(width=width, media_width=media_width, heads=heads, head_dim=head_dim)
        _check.choice("media_mode", media_mode, ("last", "all_previous"))
        _check.choice("no_media", no_media, ("published", "zero"))
        _check.choice("ffn", ffn, ACTIVATIONS)
        _check.choice("gate", gate, ("scalar", "vector"))
        self.heads, self.head_dim = heads, head_dim
        self.media_mode, self.no_media, self.attend_previous = media_mode, no_media, attend_previous
        self.norm_kind, self.ffn = norm, ffn
        self.norm = make_norm(norm, width, eps=eps)
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.kv = nn.Linear(media_width, 2 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.q_norm = make_norm(norm, head_dim, eps=eps) if qk_norm else None
        self.k_norm = make_norm(norm, head_dim, eps=eps) if qk_norm else None
        hidden = int(width * ff_mult)
        self.ffn_norm = make_norm(norm, width, eps=eps)
        self.up = nn.Linear(width, hidden * (2 if ffn == "swiglu" else 1), bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        gates = width if gate == "vector" else 1
        self.attention_gate = nn.Parameter(torch.zeros(gates))
        self.ffn_gate = nn.Parameter(torch.zeros(gates))
        self.eps = EPS[norm] if eps is None else eps

    def project_media(self, media: Tensor) -> KeysValues:
        """media `[B, I, L, Cm]` -> keys and values over the flat media tokens, each `[B * I * L, heads, head_dim]`.

        They do not depend on the text: in generation they are made once.
        """
        return project_media_all([self], media)[0]

    def intervals(
        self, media: Tensor, media_locations: Tensor | None, rows: int, *, use_cached_media: bool = False
    ) -> Intervals:
        """What each of the B * rows text rows sees of media `[B, I, L, Cm]`; without locations, all media of its sample."""
        b, images, latents, _ = media.shape
        if media_locations is None:
            ends = torch.arange(1, b + 1, dtype=torch.int32, device=media.device) * (images * latents)
            hi = ends.repeat_interleave(rows, output_size=b * rows)
            return Intervals(hi - images * latents, hi, torch.zeros_like(hi, dtype=torch.bool))
        seen = media_intervals(
            media_locations, latents, num_media=images, media_mode=self.media_mode,
            use_cached_media=use_cached_media, attend_previous=self.attend_previous, rows=rows,
        )  # fmt: skip
        return seen.without_uniform() if self.no_media == "zero" else seen

    def forward(
        self,
        x: Tensor,
        media: Tensor,
        media_locations: Tensor | None = None,
        *,
        use_cached_media: bool = False,
        intervals: Intervals | None = None,
        media_kv: KeysValues | None = None,
    ) -> Tensor:
        """Adds what the text sees of the media, then the feed-forward.

        **Shapes** x `[B, T, C]`, media `[B, I, L, Cm]`, media_locations bool `[B, T]`, True at media tokens (any length with
        `use_cached_media`: every row then sees its sample's last medium, or all of them). None: every row sees all media of its
        sample. `intervals` and `media_kv` replace what would be computed from `media_locations` and `media`.
        **Dtypes** those of the ops; under autocast x may be narrower than the parameters and keeps its dtype.
        **Gradient** x, media, every parameter. **Edge** see the class.
        **Raises** ValueError for shapes and sizes, TypeError for dtypes and devices.
        """
        size = _check.shapes(x=(x, "B T C"), media=(media, "B I L Cm"))
        if media_locations is not None and intervals is None:
            rows = "B M" if use_cached_media else "B T"
            _check.shapes(x=(x, "B T C"), media_locations=(media_locations, rows))
        k, v = self.project_media(media) if media_kv is None else media_kv
        if intervals is None:
            intervals = self.intervals(media, media_locations, size["T"], use_cached_media=use_cached_media)
        wide = x if x.dtype == self.norm.weight.dtype else _widen(x, self.norm.weight)
        y = self._attend(wide, k, v, intervals)
        y = gated_feed_forward(
            y, norm_weight=self.ffn_norm.weight, norm_bias=_bias(self.ffn_norm), w_in=self.up.weight,
            w_out=self.down.weight, gate=self.ffn_gate, activation=self.ffn, norm=self.norm_kind, eps=self.eps,
        )  # fmt: skip
        return y.to(x.dtype)

    def _attend(self, x: Tensor, k: Tensor, v: Tensor, seen: Intervals) -> Tensor:
        if self.q_norm is None:
            return gated_cross_attention(
                x, k, v, seen.lo, seen.hi, norm_weight=self.norm.weight, norm_bias=_bias(self.norm), w_q=self.q.weight,
                w_o=self.out.weight, gate=self.attention_gate, heads=self.heads, uniform=seen.uniform,
                norm=self.norm_kind, eps=self.eps,
            )  # fmt: skip
        # the fused op has no room for a norm between its projection and its attention: the same steps, one by one
        q = self.q_norm(self.q(self.norm(x)).view(-1, self.heads, self.head_dim)).to(k.dtype)
        o = interval_attention(q, k, v, seen.lo, seen.hi, uniform=seen.uniform)
        return x + torch.tanh(self.attention_gate) * self.out(o.flatten(1)).view_as(x)  # type: ignore[union-attr]

    def published(self, source: str) -> Table:
        """Where the authors' files keep this block's parameters."""
        return {"open_flamingo": _OPEN_FLAMINGO, "otter": _OTTER, "idefics": _IDEFICS}[source]


def project_media_all(blocks: Sequence[GatedCrossAttentionBlock], media: Tensor) -> list[KeysValues]:
    """Keys and values of media `[B, I, L, Cm]` for every block by one product: each `[B * I * L, heads, head_dim]`."""
    if not blocks:
        return []
    width = blocks[0].kv.in_features
    _check.shapes(media=(media, f"B I L {width}"))
    shapes = {(b.heads, b.head_dim, b.kv.in_features) for b in blocks}
    if len(shapes) > 1:
        raise ValueError(
            f"blocks: got (heads, head_dim, media_width) = {sorted(shapes)}, expected the same for all"
        )
    weight = blocks[0].kv.weight if len(blocks) == 1 else torch.cat([b.kv.weight for b in blocks])
    flat = F.linear(media.reshape(-1, width), weight).unflatten(-1, (-1, blocks[0].heads, blocks[0].head_dim))
    parts = flat.unbind(1)  # one stack in backward, where slices would each fill a whole gradient with zeros
    pairs = zip(blocks, parts[::2], parts[1::2], strict=True)
    return [(k if b.k_norm is None else b.k_norm(k).to(v.dtype), v) for b, k, v in pairs]


def _bias(norm: nn.LayerNorm | nn.RMSNorm) -> Tensor | None:
    return norm.bias if isinstance(norm, nn.LayerNorm) else None


def _widen(x: Tensor, weight: Tensor) -> Tensor:
    """Under autocast the residual stream of a frozen half-precision model meets float32 blocks."""
    if _autocast.dtype(x.device.type) is None:
        raise TypeError(
            f"x: got {x.dtype}, expected {weight.dtype} like the block's parameters (or torch.autocast)"
        )
    return x.to(weight.dtype)


def _flamingo(feed_forward: str) -> Table:
    attention = renames(norm="attn.norm", q="attn.to_q", kv="attn.to_kv", out="attn.to_out")
    rest = renames(ffn_norm=f"{feed_forward}.0", up=f"{feed_forward}.1", down=f"{feed_forward}.3")
    gates = (Rule("attention_gate", ("attn_gate",)), Rule("ffn_gate", ("ff_gate",)))
    return Table(attention + rest + gates)


_OPEN_FLAMINGO, _OTTER = _flamingo("ff"), _flamingo("feed_forward")
_IDEFICS = Table(
    (
        *renames(
            norm="input_layernorm", q="cross_attn.q_proj", out="cross_attn.o_proj", q_norm="cross_attn.q_layer_norm",
            k_norm="cross_attn.k_layer_norm", ffn_norm="post_attention_layernorm", down="mlp.down_proj",
        ),
        Rule(r"kv\.weight", ("cross_attn.k_proj.weight", "cross_attn.v_proj.weight")),
        Rule(r"up\.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight")),
        Rule("attention_gate", ("alpha_cross_attn",), torch.flatten),
        Rule("ffn_gate", ("alpha_dense",), torch.flatten),
    )
)  # fmt: skip

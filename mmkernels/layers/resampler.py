"""The Perceiver resampler: any number of image tokens in, a few latents per image out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table, renames
from mmkernels.layers.mlp import MLP
from mmkernels.ops.resampler import latent_attention
from mmkernels.primitives import _check
from mmkernels.primitives.interval_attention import interval_attention


class PerceiverAttention(nn.Module):
    """Latents attend to the media tokens and to themselves: `Wo softmax(q k^T / sqrt(D)) v`, keys from `[LN(x); LN(l)]`."""

    def __init__(self, width: int, heads: int, head_dim: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.media_norm = nn.LayerNorm(width)
        self.latent_norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, heads * head_dim, bias=False)
        self.kv = nn.Linear(width, 2 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        self.q_norm = nn.LayerNorm(head_dim) if qk_norm else None
        self.k_norm = nn.LayerNorm(head_dim) if qk_norm else None

    def forward(self, media: Tensor, latents: Tensor, *, normalised: bool = False) -> Tensor:
        """media `[N, M, C]`, latents `[N, L, C]`, or `[L, C]` for all images -> `[N, L, C]`.

        `normalised`: the media have mean 0 and variance 1 already, which is the same in every layer; what the layer's norm
        scales and shifts them by goes into the weight, and the media stay as they are.
        """
        latents, w, b = self.latent_norm(latents), self.kv.weight, None
        if normalised:
            w, b = w * self.media_norm.weight, w.mv(self.media_norm.bias)
        else:
            media = self.media_norm(media)
        if self.q_norm is not None:
            return self._attend_normed(latents, F.linear(media, w, b))
        return latent_attention(
            latents,
            media,
            w_q=self.q.weight,
            w_kv=w,
            b_kv=b,
            w_self=self.kv.weight,
            w_o=self.out.weight,
            heads=self.heads,
        )  # type: ignore[return-value]

    def _attend_normed(self, latents: Tensor, of_media: Tensor) -> Tensor:
        """Queries and keys are normalised between projection and attention, `of_media` `[N, M, 2 H D]` being projected."""
        latents = latents.expand(of_media.shape[0], -1, -1)
        q = self.q(latents).unflatten(-1, (self.heads, self.head_dim))
        kv = torch.cat([of_media, self.kv(latents)], dim=1)
        k, v = kv.unflatten(-1, (2, self.heads, self.head_dim)).unbind(2)
        assert self.q_norm is not None and self.k_norm is not None
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        lo = torch.zeros(q.shape[:2], dtype=torch.int32, device=q.device)
        hi = torch.full_like(lo, k.shape[1])
        o = interval_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), lo, hi)
        return self.out(o.transpose(1, 2).flatten(2))  # type: ignore[union-attr]


class PerceiverLayer(nn.Module):
    """`l += attention(media, l); l += feed_forward(norm(l))`."""

    def __init__(
        self, width: int, heads: int, head_dim: int, hidden: int, ffn: str, *, qk_norm: bool
    ) -> None:
        super().__init__()
        self.attention = PerceiverAttention(width, heads, head_dim, qk_norm=qk_norm)
        self.ffn_norm = nn.LayerNorm(width)
        self.mlp = MLP(width, hidden, ffn, bias=False)

    def forward(self, media: Tensor, latents: Tensor, *, normalised: bool) -> Tensor:
        latents = latents + self.attention(media, latents, normalised=normalised)
        return latents + self.mlp(self.ffn_norm(latents))


class PerceiverResampler(nn.Module):
    """Learned latents read each image (or video) through `depth` layers and stand for it from then on.

    Frames of one medium are flattened into one run of tokens; where these are many, mean and variance are taken once for all
    layers. `max_frames` adds a learned embedding per frame, `max_media` one per place among the sample's media; None leaves
    them out. `ffn` is "gelu", "relu" or "squared_relu"; `ff_mult` may be fractional.

    **Source** Flamingo (arXiv 2204.14198) 2.1; weights of `open_flamingo`, `otter`, `idefics` load by `weights.load`.
    """

    sources = ("open_flamingo", "otter", "idefics")

    def __init__(
        self,
        width: int,
        *,
        depth: int = 6,
        heads: int = 8,
        head_dim: int = 64,
        latents: int = 64,
        ff_mult: float = 4,
        max_frames: int | None = None,
        max_media: int | None = None,
        ffn: str = "gelu",
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        _check.positive(width=width, heads=heads, head_dim=head_dim, latents=latents)
        _check.choice("ffn", ffn, ("gelu", "relu", "squared_relu"))
        self.inner = heads * head_dim
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.frame_embeddings = _embeddings(max_frames, width)
        self.media_embeddings = _embeddings(max_media, width)
        self.layers = nn.ModuleList(
            PerceiverLayer(width, heads, head_dim, int(width * ff_mult), ffn, qk_norm=qk_norm)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, media: Tensor) -> Tensor:
        """Reads every medium into its latents.

        **Shapes** media `[B, I, F, P, C]` (F frames of P tokens; pictures have F = 1) -> `[B, I, L, C]`.
        **Dtypes** the parameters'. **Gradient** media and every parameter. **Edge** no media: `[B, 0, L, C]`.
        **Raises** ValueError for shapes, and for more frames or media than there are embeddings.
        """
        size = _check.shapes(media=(media, f"B I F P {self.latents.shape[1]}"))
        b, images, frames = size["B"], size["I"], size["F"]
        if self.frame_embeddings is not None:
            media = media + _first(self.frame_embeddings, frames, "max_frames").unsqueeze(1)
        if self.media_embeddings is not None:
            media = media + _first(self.media_embeddings, images, "max_media")[:, None, None]
        media = media.reshape(b * images, frames * size["P"], media.shape[-1])
        latents, many = self.latents, self._many(media)
        if many:
            media = F.layer_norm(media, media.shape[-1:], eps=self.norm.eps)
        for layer in self.layers:
            latents = layer(media, latents, normalised=many)
        return self.norm(latents.expand(b * images, -1, -1)).unflatten(0, (b, images))

    def _many(self, media: Tensor) -> bool:
        """Whether the media are larger than a layer's weight for them: then it is cheaper to scale the weight."""
        return bool(self.layers) and media.shape[:2].numel() > 2 * self.inner

    def published(self, source: str) -> Table:
        """Where the authors' files keep the resampler's parameters."""
        return {"open_flamingo": _OPEN_FLAMINGO, "otter": _OTTER, "idefics": _IDEFICS}[source]


def _embeddings(count: int | None, width: int) -> nn.Parameter | None:
    return None if count is None else nn.Parameter(torch.randn(count, width))


def _first(table: Tensor, count: int, limit: str) -> Tensor:
    if count > table.shape[0]:
        raise ValueError(f"media: got {count}, expected at most {limit} = {table.shape[0]}")
    return table[:count]


def _table(attention: dict[str, str], feed_forward: dict[str, str], *others: Rule) -> Table:
    """A layout from the names inside a layer (ours -> theirs, with "{0}" for the layer's number) and the rules beside them."""
    inside = {rf"attention\.{ours}": theirs for ours, theirs in attention.items()} | feed_forward
    rules = [Rule(rf"layers\.(\d+)\.{ours}\.(\w+)", (f"{theirs}.{{1}}",)) for ours, theirs in inside.items()]
    return Table((*rules, Rule("latents", ("latents",)), *others))


def _flamingo(attention: str, feed_forward: str) -> Table:
    names = {
        "media_norm": "norm_media",
        "latent_norm": "norm_latents",
        "q": "to_q",
        "kv": "to_kv",
        "out": "to_out",
    }
    steps = {"ffn_norm": "0", r"mlp\.up": "1", r"mlp\.down": "3"}
    return _table(
        {ours: attention + theirs for ours, theirs in names.items()},
        {ours: feed_forward + theirs for ours, theirs in steps.items()},
        Rule("frame_embeddings", ("frame_embs",)),
        Rule("media_embeddings", ("media_time_embs",), lambda t: t.flatten(1)),
        *renames(norm="norm"),
    )


_OPEN_FLAMINGO = _flamingo("layers.{0}.0.", "layers.{0}.1.")
_OTTER = _flamingo("layers.{0}.", "layers.{0}.feed_forward.")
_IDEFICS = _table(
    {
        "media_norm": "blocks.{0}.0.context_layer_norm", "latent_norm": "blocks.{0}.0.latents_layer_norm",
        "q": "blocks.{0}.0.q_proj", "out": "blocks.{0}.0.output_proj", "q_norm": "blocks.{0}.0.q_layer_norm",
        "k_norm": "blocks.{0}.0.k_layer_norm",
    },
    {"ffn_norm": "blocks.{0}.1.ln", r"mlp\.up": "blocks.{0}.1.fc", r"mlp\.down": "blocks.{0}.1.c_proj"},
    Rule(r"layers\.(\d+)\.attention\.kv\.weight", ("blocks.{0}.0.k_proj.weight", "blocks.{0}.0.v_proj.weight")),
    *renames(norm="layer_norm"),
)  # fmt: skip

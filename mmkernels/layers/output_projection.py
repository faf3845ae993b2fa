"""NExT-GPT's way out: states of signal tokens become the text conditions of a diffusion model, and are aligned with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table
from mmkernels.layers.cross_attention import CrossBlock, everything
from mmkernels.layers.decoder import Block, BlockConfig
from mmkernels.primitives import _check

REDUCTIONS = ("mean", "sum", "none")


def alignment_loss(pred: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """How far predicted conditions are from the text encoder's, token by token: the norm, not its square.

    `mean over (sample, token) of ||pred - target||_2`; "sum" adds, "none" keeps every token's.

    **Shapes** pred and target `[..., D]` -> scalar, or `[...]`. **Dtypes** any floating; halves are widened to float32.
    **Gradient** pred and target; 0 where they are equal (the published root of a sum of squares gives NaN there).
    **Edge** no token: 0. **Raises** ValueError for shapes and unknown reductions; TypeError for integers.
    **Source** NExT-GPT (arXiv 2309.05519), whose code calls it MSE. **Speed** no bench row: one pass over both.
    """
    _check.choice("reduction", reduction, REDUCTIONS)
    for name, value in (("pred", pred), ("target", target)):
        if not value.is_floating_point():
            raise TypeError(f"{name}: got {value.dtype}, expected a floating dtype")
    if pred.dim() < 1 or pred.shape != target.shape:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected that of pred, {tuple(pred.shape)}, of one dimension or more"
        )
    wide = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    distance = torch.linalg.vector_norm(pred.to(wide) - target.to(wide), dim=-1)
    if reduction == "none":
        return distance
    total = distance.sum()
    return total if reduction == "sum" else total / max(1, distance.numel())


class OutputProjection(nn.Module):
    """`y = output(decoder(queries, encoder(input(h + e))))`: as many condition tokens as there are queries.

    h are the language model's last states at the signal tokens, e the embeddings of these tokens. Encoder and decoder are
    pre-norm transformers of `layers` blocks each, without masks and positions, with a norm behind each; ReLU. Queries start
    normal ("normal", as in the first release) or at zero ("zero", as in the second, where all rows then start alike).
    **Source** NExT-GPT (arXiv 2309.05519); weights of `next_gpt`, of both releases, load by `weights.load`.
    """

    sources = ("next_gpt",)

    def __init__(
        self,
        width: int,
        out_width: int,
        queries: int,
        *,
        hidden: int = 512,
        layers: int = 4,
        heads: int = 4,
        init: str = "normal",
    ) -> None:
        super().__init__()
        _check.positive(
            width=width, out_width=out_width, queries=queries, hidden=hidden, layers=layers, heads=heads
        )
        _check.choice("init", init, ("normal", "zero"))
        self.width, self.hidden = width, hidden
        self.input = nn.Linear(width, hidden)
        block = BlockConfig(hidden, heads, 4 * hidden, activation="relu")
        self.encoder = nn.ModuleList(Block(block) for _ in range(layers))
        self.encoder_norm = nn.LayerNorm(hidden)
        self.decoder = nn.ModuleList(CrossBlock(hidden, heads, 4 * hidden) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(hidden)
        self.output = nn.Linear(hidden, out_width)
        self.queries = nn.Parameter(
            torch.randn(queries, hidden) if init == "normal" else torch.zeros(queries, hidden)
        )
        for part in (self.encoder, self.decoder):
            for parameter in part.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """**Shapes** x and embeddings `[B, S, C]`, S signal tokens -> `[B, queries, out_width]`.
        **Dtypes** x as the parameters, or torch.autocast. **Gradient** x, embeddings and every parameter.
        **Edge** no rows give no rows. **Raises** ValueError for shapes, and for no signal tokens.
        """
        size = _check.shapes(x=(x, f"B S {self.width}"), embeddings=(embeddings, f"B S {self.width}"))
        _check.positive(signals=size["S"])
        z = self.input(x + embeddings)
        seen = everything(z, z.shape[1])
        for block in self.encoder:
            z = block(z, seen)
        z = self.encoder_norm(z)
        y = self.queries.to(z.dtype).expand(size["B"], -1, -1)
        for block in self.decoder:
            y = block(y, z)
        return self.output(self.decoder_norm(y))

    def published(self, source: str) -> Table:
        """Where the authors' files keep the parameters: `fc`, `tfm`, `model`, or `in_fc`, `tfm`, `out_fc`."""
        ends = [
            Rule(rf"{ours}\.(\w+)", (f"{theirs}.{{0}}",))
            for ours, names in (("input", ("fc", "in_fc")), ("output", ("model", "out_fc")))
            for theirs in names
        ]
        norms = Rule(r"(encoder|decoder)_norm\.(\w+)", ("tfm.{0}.norm.{1}",))
        queries = Rule("queries", ("query_embs",), lambda t: t.flatten(0, 1))
        side, stack = r"(encoder|decoder)\.(\d+)\.", "tfm.{0}.layers.{1}."
        pairs = {
            r"attention\.out": "self_attn.out_proj.", r"attention\.qkv": "self_attn.in_proj_", "attention_norm": "norm1.",
            r"cross\.out": "multihead_attn.out_proj.", "cross_norm": "norm2.", r"mlp\.up": "linear1.", r"mlp\.down": "linear2.",
        }  # fmt: skip
        inside = [Rule(rf"{side}{ours}\.(\w+)", (f"{stack}{theirs}{{2}}",)) for ours, theirs in pairs.items()]
        thirds = [
            Rule(rf"{side}cross\.{part}\.(\w+)", (f"{stack}multihead_attn.in_proj_{{2}}",), view)
            for part, view in (("q", lambda t: t[: self.hidden]), ("kv", lambda t: t[self.hidden :]))
        ]
        last = [
            Rule(rf"({kind})\.(\d+)\.mlp_norm\.(\w+)", (f"{stack}norm{n}.{{2}}",))
            for kind, n in (("encoder", 2), ("decoder", 3))
        ]
        return Table((*ends, norms, queries, *inside, *thirds, *last))

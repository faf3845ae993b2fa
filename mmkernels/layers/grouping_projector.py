"""NExT-GPT's way in: a GroupViT that sorts an encoder's tokens into a few groups, each a token of the language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table, renames
from mmkernels.layers.cross_attention import CrossAttention, everything
from mmkernels.layers.decoder import Block, BlockConfig
from mmkernels.layers.mlp import MLP
from mmkernels.primitives import _check


def draw_gumbel(shape: Sequence[int], like: Tensor) -> Tensor:
    """Standard Gumbel noise from torch's generator, never infinite."""
    limits = torch.finfo(like.dtype)
    uniform = torch.rand(shape, dtype=like.dtype, device=like.device)
    return -(-(limits.tiny + uniform * (1 - limits.eps - limits.tiny)).log()).log()


def assign(scores: Tensor, noise: Tensor | None = None) -> Tensor:
    """The group that every token belongs to, one-hot over the groups: `[B, G, M]` -> `[B, G, M]`; backward is softmax's."""
    soft = (scores if noise is None else scores + noise).softmax(1)
    hard = torch.zeros_like(soft).scatter_(1, soft.max(1, keepdim=True)[1], 1.0)
    return hard - soft.detach() + soft


class Mixer(nn.Module):
    """An MLP over tokens, channel by channel: `[B, T, C]` -> `[B, out, C]`."""

    def __init__(self, tokens: int, hidden: int, out: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(tokens, hidden), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Grouping(nn.Module):
    """Tokens x `[B, M, C]` become `groups` tokens: each goes to one group, a group is the mean of its own (and of one zero)."""

    def __init__(self, width: int, heads: int, tokens: int, groups: int) -> None:
        super().__init__()
        self.token_norm, self.mix = nn.LayerNorm(width), Mixer(tokens, width // 2, groups)
        self.group_norm, self.norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.cross, self.cross_norm = CrossAttention(width, heads), nn.LayerNorm(width)
        self.cross_mlp_norm, self.cross_mlp = nn.LayerNorm(width), MLP(width, 4 * width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.out_norm, self.mlp = nn.LayerNorm(width), MLP(width, 4 * width)

    def forward(self, x: Tensor, tokens: Tensor, noise: Tensor | None) -> Tensor:
        x = self.norm(x)
        g = self.group_norm(self.mix(self.token_norm(tokens)))
        g = g + self.cross(g, x)
        g = self.cross_norm(g + self.cross_mlp(self.cross_mlp_norm(g)))
        scores = self.q(g) @ self.k(x).transpose(1, 2) * g.shape[-1] ** -0.5
        if noise is None and self.training:
            noise = draw_gumbel(scores.shape, scores)
        weights = assign(scores, noise)
        weights = weights / (weights.sum(-1, keepdim=True) + 1)
        g = g + self.out(weights @ self.v(x))
        return g + self.mlp(self.out_norm(g))


class Stage(nn.Module):
    """Blocks over tokens with group tokens behind them, then grouping; the last stage has neither."""

    def __init__(self, block: BlockConfig, depth: int, tokens: int, before: int, groups: int) -> None:
        super().__init__()
        width = block.width
        self.blocks = nn.ModuleList(Block(block) for _ in range(depth))
        self.tokens = nn.Parameter(torch.zeros(tokens, width)) if tokens else None
        self.pass_norm = nn.LayerNorm(width) if tokens and before else None
        self.pass_on = Mixer(before, width // 2, tokens) if tokens and before else None
        self.grouping = Grouping(width, block.heads, tokens, groups) if groups else None
        if self.tokens is not None and not before:
            nn.init.trunc_normal_(self.tokens, std=0.02)

    def forward(self, x: Tensor, before: Tensor | None, noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens and the previous stage's group tokens -> this stage's groups, or tokens, and its group tokens."""
        own = None if self.tokens is None else self.tokens.to(x.dtype).expand(len(x), -1, -1)
        if own is not None and self.pass_on is not None and self.pass_norm is not None and before is not None:
            own = own + self.pass_on(self.pass_norm(before))
        count = x.shape[1]
        x = x if own is None else torch.cat([x, own], 1)
        seen = everything(x, x.shape[1])
        for block in self.blocks:
            x = block(x, seen)
        x, own = (x, None) if own is None else (x[:, :count], x[:, count:])
        if self.grouping is None or own is None:
            return x, own
        return self.grouping(x, own, noise), own


class GroupingProjector(nn.Module):
    """`x -> output(norm(stages(input(x))))`: however many tokens come in, `groups[-1]` (8) go out, already one for one token.

    Stage s has `depths[s]` pre-norm blocks and `tokens[s]` group tokens, and ends by grouping into `groups[s]`; the last one
    has no groups. Every input token goes to one group, the likeliest; training adds Gumbel noise, and its backward is that of
    the softmax (straight through).
    **Source** NExT-GPT (arXiv 2309.05519), GroupViT (arXiv 2202.11094); weights of `next_gpt` load by `weights.load`.
    """

    sources = ("next_gpt",)

    def __init__(
        self,
        media_width: int,
        width: int,
        *,
        hidden: int = 512,
        heads: int = 8,
        depths: tuple[int, ...] = (6, 3, 3),
        tokens: tuple[int, ...] = (64, 8, 0),
        groups: tuple[int, ...] = (64, 8),
    ) -> None:
        super().__init__()
        _check.positive(media_width=media_width, width=width, hidden=hidden, heads=heads, stages=len(depths))
        if (
            len(tokens) != len(depths)
            or len(groups) != len(depths) - 1
            or tokens[-1]
            or not all((*tokens[:-1], *groups))
        ):
            raise ValueError(
                f"tokens, groups: got {tokens} and {groups}, expected {len(depths)} and {len(depths) - 1} numbers above 0, "
                "the last of tokens 0"
            )
        self.media_width, self.places = media_width, groups[-1] if groups else 0
        self.input = nn.Linear(media_width, hidden)
        block = BlockConfig(hidden, heads, 4 * hidden, qkv_bias=False)
        before, ends = (0, *tokens[:-1]), (*groups, 0)
        self.stages = nn.ModuleList(
            Stage(block, *numbers) for numbers in zip(depths, tokens, before, ends, strict=True)
        )
        self.norm, self.output = nn.LayerNorm(hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor, noise: Sequence[Tensor] | None = None) -> Tensor:
        """**Shapes** x `[B, M, Cm]` -> `[B, groups[-1], C]`; noise: for each grouping `[B, groups, its input tokens]`, None
        draws it in training and adds none otherwise.
        **Dtypes** x as the parameters, or torch.autocast. **Gradient** x and every parameter.
        **Edge** no rows give no rows. **Raises** ValueError for shapes, for no tokens and for other counts of noise.
        """
        size = _check.shapes(x=(x, f"B M {self.media_width}"))
        _check.positive(tokens=size["M"])
        if noise is not None and len(noise) != len(self.stages) - 1:
            raise ValueError(f"noise: got {len(noise)} tensors, expected {len(self.stages) - 1}")
        x, own = self.input(x), None
        draws = (*(noise or [None] * (len(self.stages) - 1)), None)
        for stage, draw in zip(self.stages, draws, strict=True):
            x, own = stage(x, own, draw)
        return self.output(self.norm(x))

    def published(self, source: str) -> Table:
        """Where the authors' files keep the parameters."""
        at, theirs = r"stages\.(\d+)\.", "layers.{0}."
        inside = {
            "attention_norm": "norm1", r"attention\.qkv": "attn.qkv", r"attention\.out": "attn.proj", "mlp_norm": "norm2",
            r"mlp\.up": "mlp.fc1", r"mlp\.down": "mlp.fc2",
        }  # fmt: skip
        grouping = {
            "token_norm": "norm_tokens", r"mix\.up": "mlp_inter.fc1", r"mix\.down": "mlp_inter.fc2",
            "group_norm": "norm_post_tokens", "norm": "norm_x", r"cross\.q": "pre_assign_attn.attn.q_proj",
            r"cross\.out": "pre_assign_attn.attn.proj", "cross_norm": "pre_assign_attn.norm_post",
            "cross_mlp_norm": "pre_assign_attn.norm2", r"cross_mlp\.up": "pre_assign_attn.mlp.fc1",
            r"cross_mlp\.down": "pre_assign_attn.mlp.fc2", "q": "assign.q_proj", "k": "assign.k_proj", "v": "assign.v_proj",
            "out": "assign.proj", "out_norm": "norm_new_x", r"mlp\.up": "mlp_channels.fc1", r"mlp\.down": "mlp_channels.fc2",
        }  # fmt: skip
        passing = {"pass_norm": "0", r"pass_on\.up": "1.fc1", r"pass_on\.down": "1.fc2"}
        kv = tuple(f"{theirs}downsample.pre_assign_attn.attn.{n}_proj.{{1}}" for n in "kv")
        rules = (
            *renames(input="in_fc", norm="norm", output="out_fc"),
            Rule(rf"{at}tokens", (f"{theirs}group_token",), lambda t: t.flatten(0, 1)),
            *(
                Rule(rf"{at}blocks\.(\d+)\.{a}\.(\w+)", (f"{theirs}blocks.{{1}}.{b}.{{2}}",))
                for a, b in inside.items()
            ),
            *(
                Rule(rf"{at}grouping\.{a}\.(\w+)", (f"{theirs}downsample.{b}.{{1}}",))
                for a, b in grouping.items()
            ),
            Rule(rf"{at}grouping\.cross\.kv\.(\w+)", kv),
            *(Rule(rf"{at}{a}\.(\w+)", (f"{theirs}group_projector.{b}.{{1}}",)) for a, b in passing.items()),
        )
        return Table(rules, within="model.mm_input_projector.")

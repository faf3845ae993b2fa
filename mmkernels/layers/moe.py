"""A mixture of experts in the place of a feed-forward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Table
from mmkernels.layers.expert_parallel import run_sharded, slice_of
from mmkernels.layers.experts import experts_ffn
from mmkernels.layers.mlp import ACTIVATIONS, GATED, MLP
from mmkernels.layers.moe_tables import SOURCES, experts_table, experts_within
from mmkernels.ops.moe import Routing, moe_capacity, moe_route
from mmkernels.ops.moe.route import POLICIES
from mmkernels.primitives import _autocast, _check


@dataclass(frozen=True)
class ExpertsConfig:
    """Arguments of `MoE`; its widths and activation are the feed-forward's."""

    experts: int = 4
    top_k: int = 2
    policy: str = "dropless"
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    min_capacity: int = 0
    residual: bool = False
    sampling: bool = False


class Router(nn.Linear):
    """Logits `[S, E]` of tokens `[S, C]`, without autocast and at least in float32."""

    def __init__(self, width: int, experts: int) -> None:
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        super().__init__(width, experts, bias=False, dtype=wide)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        with _autocast.off(x.device.type):
            return F.linear(x.to(wide), self.weight.to(wide))


class MoE(nn.Module):
    """`y = sum_j w_j ffn_{e_j}(x)` over each token's `top_k` experts, and the loss that keeps experts equally busy.

    The router `softmax(x gate^T)` is computed in float32 whatever the dtypes are, and its weight is made in float32. An expert
    is an `MLP`: the rows of `w_in [E, N, C]` are [gate; up] for the gated kinds, `w_out [E, C, F]`; without `bias` given, the
    kinds that are not gated have biases. `policy` is `moe_route`'s: who is dropped, when weights are renormalised, which loss.

    An expert takes `max(ceil(S / E * factor * K), min_capacity)` of S tokens (`moe_capacity`): `capacity_factor` in
    training, `eval_capacity_factor` else; None takes all. `residual` adds a dense feed-forward:
    `y moe(x) c_0 + mlp(x) c_1, c = softmax(coefficient(x))`. With `sampling` the second choice is drawn with Gumbel noise, as
    the published code does in training and after it.

    **Source** DeepSpeed-MoE (arXiv 2201.05596), Mixtral (arXiv 2401.04088), MoE-LLaVA (arXiv 2401.15947); weights of
    `deepspeed`, `mixtral`, `moe_llava` load by `weights.load`.
    """

    sources = SOURCES

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        top_k: int,
        *,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        policy: str = "dropless",
        activation: str = "swiglu",
        residual: bool = False,
        bias: bool | None = None,
        min_capacity: int = 0,
        sampling: bool = False,
    ) -> None:
        super().__init__()
        _check.positive(width=width, hidden=hidden, experts=experts, top_k=top_k)
        if top_k > experts:
            raise ValueError(f"top_k: got {top_k}, expected at most experts = {experts}")
        for name, factor in (
            ("capacity_factor", capacity_factor),
            ("eval_capacity_factor", eval_capacity_factor),
        ):
            if factor is not None and not 0 < factor < math.inf:
                raise ValueError(f"{name}: got {factor}, expected a positive number or None")
        if min_capacity < 0:
            raise ValueError(f"min_capacity: got {min_capacity}, expected 0 or more")
        _check.choice("policy", policy, POLICIES)
        _check.choice("activation", activation, (*ACTIVATIONS, *GATED))
        if policy == "dropless" and (capacity_factor, eval_capacity_factor) != (None, None):
            raise ValueError("capacity_factor: got one with policy 'dropless', expected None")
        self.width, self.hidden, self.experts, self.top_k = width, hidden, experts, top_k
        self.factors, self.min_capacity = (capacity_factor, eval_capacity_factor), min_capacity
        self.policy, self.activation, self.sampling = policy, activation, sampling
        self.group: dist.ProcessGroup | None = None  # whose ranks share the experts; None: all are here
        self.first = 0  # the number of the first expert that is here
        bias = activation not in GATED if bias is None else bias
        self.gate = Router(width, experts)
        rows = hidden * (2 if activation in GATED else 1)
        self.w_in = nn.Parameter(torch.empty(experts, rows, width))
        self.w_out = nn.Parameter(torch.empty(experts, width, hidden))
        self.b_in = nn.Parameter(torch.empty(experts, rows)) if bias else None
        self.b_out = nn.Parameter(torch.empty(experts, width)) if bias else None
        self.mlp = MLP(width, hidden, activation, bias=bias) if residual else None
        self.coefficient = nn.Linear(width, 2) if residual else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Every expert starts as the two `nn.Linear` that it stands for."""
        for weight, bias, inputs in (
            (self.w_in, self.b_in, self.width),
            (self.w_out, self.b_out, self.hidden),
        ):
            for tensor in (weight, bias):
                if tensor is not None:
                    nn.init.uniform_(tensor, -(inputs**-0.5), inputs**-0.5)

    @classmethod
    def of(cls, mlp: MLP, config: ExpertsConfig) -> MoE:
        """Experts that start as copies of a dense feed-forward, where it is and in its dtype; only the router is new."""
        up, c = mlp.up, config
        gated = mlp.activation in GATED
        with torch.device(up.weight.device):
            made = cls(
                up.in_features, up.out_features // (2 if gated else 1), c.experts, c.top_k, policy=c.policy,
                capacity_factor=c.capacity_factor, eval_capacity_factor=c.eval_capacity_factor, residual=c.residual,
                activation=mlp.activation, bias=up.bias is not None, min_capacity=c.min_capacity, sampling=c.sampling,
            )  # fmt: skip
        for name in ("w_in", "w_out", "b_in", "b_out"):
            own = getattr(made, name)
            if own is not None:
                own.data = own.data.to(up.weight.dtype)
        made.copy_from(mlp)
        return made.train(mlp.training)

    @torch.no_grad()
    def copy_from(self, mlp: MLP) -> None:
        """Every expert, and the dense part of a residual one, becomes a copy of `mlp`."""
        pairs = ((self.w_in, self.b_in, mlp.up), (self.w_out, self.b_out, mlp.down))
        for weight, bias, linear in pairs:
            weight.copy_(linear.weight.expand_as(weight))
            if bias is not None:
                bias.copy_(linear.bias.expand_as(bias))
        if self.mlp is not None:
            self.mlp.to(mlp.up.weight.dtype).load_state_dict(mlp.state_dict())

    @torch.no_grad()
    def expert(self, number: int) -> MLP:
        """A copy of one expert as a feed-forward of its own."""
        here = number - self.first
        if not 0 <= here < self.w_in.shape[0]:
            last = self.first + self.w_in.shape[0] - 1
            raise ValueError(
                f"number: got {number}, expected {self.first} to {last}, the experts that are here"
            )
        weight = self.w_in
        with torch.device(weight.device):
            made = MLP(self.width, self.hidden, self.activation, bias=self.b_in is not None).to(weight.dtype)
        for linear, w, b in ((made.up, self.w_in, self.b_in), (made.down, self.w_out, self.b_out)):
            linear.weight.copy_(w[here])
            if b is not None:
                linear.bias.copy_(b[here])
        return made.train(self.training)

    def capacity(self, tokens: int) -> int | None:
        """How many tokens an expert takes of so many; None: all."""
        factor = self.factors[0 if self.training else 1]
        if factor is None:
            return None
        return moe_capacity(tokens, self.experts, factor, self.top_k, least=self.min_capacity)

    def shard(self, group: dist.ProcessGroup) -> MoE:
        """Keeps this rank's experts of the group, in place; from now on tokens travel to the ranks of their experts.

        **Raises** ValueError unless the ranks divide the experts, and for a layer that is sharded already.
        """
        if self.group is not None:
            raise ValueError("group: got one for a layer that is sharded already, expected a whole layer")
        mine = slice_of(self.experts, group)
        for name in ("w_in", "w_out", "b_in", "b_out"):
            whole = getattr(self, name)
            if whole is not None:
                kept = whole.detach()[mine].clone()
                setattr(self, name, nn.Parameter(kept, requires_grad=whole.requires_grad))
        self.group, self.first = group, mine.start
        return self

    def route(self, x: Tensor, noise: Tensor | None = None, mask: Tensor | None = None) -> Routing:
        """The experts of tokens `[S, C]`."""
        logits = self.gate(x)
        if noise is None and self.sampling:
            noise = self._draw(logits)
        return moe_route(
            logits, self.top_k, policy=self.policy, capacity=self.capacity(x.shape[0]), noise=noise, mask=mask
        )

    def _draw(self, logits: Tensor) -> Tensor:
        """What the published policies draw: uniform numbers for top 1's random selection, Gumbel noise for the others."""
        drawn = torch.empty_like(logits, requires_grad=False)
        if self.top_k == 1 and self.policy.startswith("deepspeed"):
            return drawn.uniform_()
        return -drawn.exponential_().log()

    def run(
        self, x: Tensor, noise: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """As `forward`, with the whole routing; tokens where mask `[...]` is False have no expert: their y is 0."""
        _check_input(x, self.width, mask)
        flat = x.reshape(-1, self.width)
        routing = self.route(flat, noise, None if mask is None else mask.reshape(-1))
        weights = (self.w_in, self.w_out, self.b_in, self.b_out)
        if self.group is None:
            y = experts_ffn(flat, routing, weights, self.activation)
        else:
            y = run_sharded(flat, routing, weights, self.activation, self.group)
        y = y.view(x.shape)
        if self.mlp is not None and self.coefficient is not None:
            c = self.coefficient(x).softmax(-1)
            y = y * c[..., :1] + self.mlp(x) * c[..., 1:]
        return y, routing

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """**Shapes** x `[..., C]`, tokens counted in that order; noise `[S, E]` for all S of them, as the policy reads it (see
        `moe_route`). Returns y like x and the scalar aux_loss.
        **Dtypes** x as the parameters, or torch.autocast; aux_loss at least float32.
        **Gradient** x, and every parameter by the tokens of its expert: an expert without tokens has an exact zero.
        **Edge** no tokens; a token all of whose routes are dropped gives 0. With the experts on several ranks (`shard`) every
        rank has to call, with or without tokens, and either all ranks' x need a gradient or none.
        **Raises** ValueError for shapes.
        **Speed** `mmkernels bench --op moe`.
        """
        y, routing = self.run(x, noise)
        return y, routing.aux_loss

    def published(self, source: str) -> Table:
        """Where the authors' files keep the layer's parameters; of a sharded one, its own experts'."""
        return experts_table(source, self.experts, self._here(), self.activation in GATED)

    def within(self, names: tuple[str, tuple[str, ...], str]) -> Table:
        """The same in a decoder's file: see `decoder_tables.layer_names`."""
        block, up, down = names
        return experts_within(self.experts, self._here(), up, down, block)

    def _here(self) -> range:
        return range(self.first, self.first + self.w_in.shape[0])


def _check_input(x: Tensor, width: int, mask: Tensor | None) -> None:
    if x.dim() < 1 or x.shape[-1] != width:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., {width}]")
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask: got {mask.dtype} of shape {tuple(mask.shape)}, expected bool of {tuple(x.shape[:-1])}"
        )

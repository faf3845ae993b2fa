"""What stands between a vision tower and a language model when it is no more than products: four kinds, by name."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.layers._published import Rule, Table, renames
from mmkernels.layers.mlp import MLP
from mmkernels.primitives import _check

KINDS = ("linear", "mlp2x_gelu", "mlp2x_gelu_norm", "swiglu")
_COGVLM = ("cogvlm", "cogvlm2", "cogvlm_sat")
_SOURCES = {"linear": ("llava",), "mlp2x_gelu": ("llava",), "mlp2x_gelu_norm": ("yi_vl",), "swiglu": _COGVLM}


class Projector(nn.Module):
    """Tokens of a vision tower to tokens of a language model.

    - `linear` (LLaVA): `W x + b`.
    - `mlp2x_gelu` (LLaVA-1.5): `W2 gelu(W1 x + b1) + b2`.
    - `mlp2x_gelu_norm` (Yi-VL): `LN(W2 gelu(LN(W1 x + b1)) + b2)`.
    - `swiglu` (CogVLM): `z = gelu(LN(W x))`, `down(silu(gate z) * up z)` without biases, between the learned tokens boi and
      eoi. The class token, which the tower puts first, is left out. `conv` (CogVLM2) first merges 2 x 2 patches.

    `hidden` is the inner width of swiglu: 11008 in CogVLM, 14336 in CogVLM2. GELU is exact, norms have eps 1e-5.
    **Source** LLaVA (arXiv 2304.08485), Yi (arXiv 2403.04652), CogVLM (arXiv 2311.03079); weights of `llava`, `yi_vl`,
    `cogvlm`, `cogvlm2`, `cogvlm_sat` load by `weights.load`.
    """

    def __init__(
        self, kind: str, media_width: int, width: int, *, hidden: int | None = None, conv: bool = False
    ) -> None:
        super().__init__()
        _check.choice("kind", kind, KINDS)
        _check.positive(media_width=media_width, width=width)
        glu = kind == "swiglu"
        if glu == (hidden is None):
            raise ValueError(f"hidden: got {hidden} for {kind!r}, expected {'a number' if glu else None}")
        if conv and not glu:
            raise ValueError(f"conv: got True for {kind!r}, expected it only with 'swiglu'")
        self.kind, self.media_width, self.sources = kind, media_width, _SOURCES[kind]
        self.input = nn.Linear(media_width, width, bias=not glu)
        if kind == "mlp2x_gelu_norm" or glu:
            self.norm = nn.LayerNorm(width)
        if kind.startswith("mlp2x"):
            self.output = nn.Linear(width, width)
        if kind == "mlp2x_gelu_norm":
            self.output_norm = nn.LayerNorm(width)
        if glu and hidden is not None:
            _check.positive(hidden=hidden)
            self.conv = nn.Conv2d(media_width, media_width, 2, 2) if conv else None
            self.mlp = MLP(width, hidden, "swiglu", bias=False)
            self.boi, self.eoi = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """**Shapes** x `[N, P, Cm]` -> `[N, P, C]`; swiglu: x `[N, 1 + P, Cm]`, the class token first -> `[N, P + 2, C]`, and
        `[N, P / 4 + 2, C]` with `conv`, whose P patches are a square of an even side.
        **Dtypes** x as the parameters, or torch.autocast. **Gradient** x and every parameter.
        **Raises** ValueError for shapes.
        """
        _check.shapes(x=(x, f"N P {self.media_width}"))
        if self.kind == "swiglu":
            return self._glu(x)
        x = self.input(x)
        if self.kind == "linear":
            return x
        if self.kind == "mlp2x_gelu":
            return self.output(F.gelu(x))
        return self.output_norm(self.output(F.gelu(self.norm(x))))

    def _glu(self, x: Tensor) -> Tensor:
        if x.shape[1] < 2:
            raise ValueError(f"x: got {x.shape[1]} tokens, expected a class token and patches")
        x = x[:, 1:] if self.conv is None else self._merge(x[:, 1:], self.conv)
        x = self.mlp(F.gelu(self.norm(self.input(x))))
        boi, eoi = (t.to(x.dtype).expand(x.shape[0], 1, -1) for t in (self.boi, self.eoi))
        return torch.cat([boi, x, eoi], 1)

    @staticmethod
    def _merge(x: Tensor, conv: nn.Conv2d) -> Tensor:
        side = round(x.shape[1] ** 0.5)
        if side * side != x.shape[1] or side % 2:
            raise ValueError(f"x: got {x.shape[1]} patches, expected the square of an even number to merge")
        return conv(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)

    def published(self, source: str) -> Table:
        """Where the authors' files keep the parameters."""
        if source in _COGVLM:
            return _glu_table("mixins.eva." if source == "cogvlm_sat" else "model.vision.")
        within = "model.mm_projector."
        if self.kind == "linear":
            return Table((Rule(r"input\.(\w+)", ("{0}",)),), within=within)
        parts = {"input": "0", "output": "2"}
        if self.kind == "mlp2x_gelu_norm":
            parts = {"input": "0", "norm": "1", "output": "3", "output_norm": "4"}
        return Table(renames(**parts), within=within)


def _glu_table(within: str) -> Table:
    rules = (
        *renames(input="linear_proj.linear_proj", norm="linear_proj.norm1", conv="conv"),
        Rule(r"mlp\.up\.weight", ("linear_proj.gate_proj.weight", "linear_proj.dense_h_to_4h.weight")),
        Rule(r"mlp\.down\.weight", ("linear_proj.dense_4h_to_h.weight",)),
        Rule("(boi|eoi)", ("{0}",), lambda t: t.flatten()),
    )
    return Table(rules, ignored=(r"(patch_embedding|transformer|vit_model)\..*",), within=within)

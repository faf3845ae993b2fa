"""Where published files keep experts: DeepSpeed's modules, by expert, and Mixtral's, on disk by expert, in memory joined."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmkernels.layers._published import Rule, Table, renames

SOURCES = ("deepspeed", "mixtral", "moe_llava")
Kind = tuple[tuple[str, ...], str]
_GATED = (  # names of (gate, up), of which the first pair counts that a file has, and of down, of which the last one counts
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("w2", "w1"), "c_proj"),  # Qwen's
)
_PLAIN = (
    (("fc1",), "fc2"), (("dense_h_to_4h",), "dense_4h_to_h"), (("up_proj",), "down_proj"), (("c_fc",), "c_proj"),
    (("linear1",), "linear2"), (("w1",), "w2"), (("0",), "2"),
)  # fmt: skip


def _stack(ours: str, experts: range, names: tuple[str, ...], end: str) -> Rule:
    """Every expert's tensors, joined and stacked; `names` has `{e}` where the expert's number is."""
    keys = tuple(f"{name.replace('{e}', str(e))}.{end}" for e in experts for name in names)
    return Rule(ours, keys, lambda t: t.unflatten(0, (len(experts), -1)))


def expert_rules(experts: range, at: str, kinds: Sequence[Kind]) -> tuple[Rule, ...]:
    """The four stacked tensors, from experts under `at` (with `{e}`)."""
    sides = [("in", up) for up, _ in kinds] + [("out", (down,)) for _, down in reversed(kinds)]
    return tuple(
        _stack(f"{letter}_{side}", experts, tuple(f"{at}{name}" for name in names), end)
        for side, names in sides
        for letter, end in (("w", "weight"), ("b", "bias"))
    )


def others(at: str, experts: int, here: range) -> tuple[str, ...]:
    """Patterns of the experts that are on other ranks."""
    away = "|".join(str(e) for e in range(experts) if e not in here)
    return (rf"{at.replace('.', chr(92) + '.').replace('{e}', f'({away})')}.*",) if away else ()


def _deepspeed(
    experts: int, here: range, kinds: Sequence[Kind], prefixes: Sequence[str] = ("deepspeed_moe.", "")
) -> Table:
    rules: list[Rule] = []
    ignored: list[str] = []
    for prefix in prefixes:
        at = prefix + "experts.deepspeed_experts.{e}."
        rules += renames(gate=f"{prefix}gate.wg")
        ignored += others(at, experts, here)
        rules += expert_rules(here, at, kinds)
    rules += [Rule(r"mlp\.up\.(\w+)", tuple(f"mlp.{name}.{{0}}" for name in up)) for up, _ in kinds]
    rules += [Rule(r"mlp\.down\.(\w+)", (f"mlp.{down}.{{0}}",)) for _, down in reversed(kinds)]
    return Table((*rules, *renames(coefficient="coefficient")), ignored=tuple(ignored))


def _mixtral(experts: int, here: range) -> Table:
    def mine(t: Tensor) -> Tensor:
        return t[here.start : here.stop]

    at = "experts.{e}."
    rules = (
        *renames(gate="gate"),
        *expert_rules(here, at, [(("w1", "w3"), "w2")]),
        Rule("w_in", ("experts.gate_up_proj",), mine),
        Rule("w_out", ("experts.down_proj",), mine),
    )
    return Table(rules, ignored=others(at, experts, here))


def experts_table(source: str, experts: int, here: range, gated: bool) -> Table:
    """A layer of so many experts of which those in `here` are wanted."""
    return (
        _mixtral(experts, here)
        if source == "mixtral"
        else _deepspeed(experts, here, _GATED if gated else _PLAIN)
    )


def experts_within(experts: int, here: range, up: tuple[str, ...], down: str, block: str) -> Table:
    """The same inside of a decoder's layer `block`, whose dense files call the feed-forward's linear maps `up` and `down`."""
    folder = up[0].rpartition(".")[0]
    bare = tuple(name.rpartition(".")[2] for name in up), down.rpartition(".")[2]
    at = f"{block}{folder}." if folder else block
    table = _deepspeed(experts, here, [bare], ("deepspeed_moe.",)).under("", at)
    return table + _mixtral(experts, here).under("", f"{block}block_sparse_moe.")

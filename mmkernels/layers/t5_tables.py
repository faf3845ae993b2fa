"""Where published T5 files keep the parameters."""

from __future__ import annotations

from mmkernels.layers._published import Rule, Table

SOURCES = ("huggingface",)


def t5_table(source: str, tied: bool) -> Table:
    """`source` is one of SOURCES; a tied head is the embedding again."""
    rules = [
        Rule(r"embedding\.weight", ("shared.weight",)),
        Rule(r"(encoder|decoder)\.norm\.weight", ("{0}.final_layer_norm.weight",)),
        Rule(
            r"(encoder|decoder)\.relative_bias\.weight",
            ("{0}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",),
        ),
        Rule(r"head\.weight", ("lm_head.weight",)),
    ]
    for stack, feed in (("encoder", 1), ("decoder", 2)):  # the decoder's layer 1 looks at the encoder
        for ours, theirs in _block(feed):
            rules.append(
                Rule(
                    rf"{stack}\.blocks\.(\d+)\.{ours}\.weight",
                    tuple(f"{stack}.block.{{0}}.layer.{name}.weight" for name in theirs),
                )
            )
    ignored = [
        r"(encoder|decoder)\.embed_tokens\.weight",  # the embedding again
        # never used: cross-attention has no positions
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    ]
    return Table(tuple(rules), ignored=(*ignored, *((r"lm_head\.weight",) if tied else ())))


def _block(feed: int) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Our submodule of a block -> theirs, joined; `feed` is the number of the published layer that is the feed-forward."""
    own, cross, mlp = "0.SelfAttention", "1.EncDecAttention", f"{feed}.DenseReluDense"
    return (
        ("attention_norm", ("0.layer_norm",)),
        ("qkv", (f"{own}.q", f"{own}.k", f"{own}.v")),
        ("out", (f"{own}.o",)),
        ("cross_norm", ("1.layer_norm",)),
        ("cross_q", (f"{cross}.q",)),
        ("cross_kv", (f"{cross}.k", f"{cross}.v")),
        ("cross_out", (f"{cross}.o",)),
        ("mlp_norm", (f"{feed}.layer_norm",)),
        (r"mlp\.up", (f"{mlp}.wi_0", f"{mlp}.wi_1")),
        (r"mlp\.down", (f"{mlp}.wo",)),
    )

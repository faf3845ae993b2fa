"""Where published checkpoints keep a Q-Former's parameters."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmkernels.layers._published import Rule, Table, renames

SOURCES = ("lavis", "lavis_instruct", "xcomposer", "huggingface")

_PARAMETERS = r"\.(weight|bias)"


def _flat_queries(tokens: Tensor) -> Tensor:
    return tokens.reshape(-1, tokens.shape[-1])  # published as [1, queries, hidden]


def _layers(root: str, inner: str, crossing: Sequence[int]) -> tuple[Rule, ...]:
    """`root` leads to the stack of layers; `inner` is what the authors call an attention's projections."""
    own = rf"layers\.(\d+)\.{{}}{_PARAMETERS}"
    theirs = f"{root}layer.{{{{0}}}}.{{}}.{{{{1}}}}"
    pairs = {
        r"attention\.out": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
        r"cross\.q": f"crossattention.{inner}.query", r"cross\.out": "crossattention.output.dense",
        "cross_norm": "crossattention.output.LayerNorm",
        r"query_ffn\.up": "intermediate_query.dense", r"query_ffn\.down": "output_query.dense",
        "query_norm": "output_query.LayerNorm",
        r"text_ffn\.up": "intermediate.dense", r"text_ffn\.down": "output.dense", "text_norm": "output.LayerNorm",
    }  # fmt: skip
    joined = tuple(theirs.format(f"attention.{inner}.{part}") for part in ("query", "key", "value"))
    image = (
        f"{root}layer.{i}.crossattention.{inner}.{part}.{{0}}" for i in crossing for part in ("key", "value")
    )
    return (
        *(Rule(own.format(ours), (theirs.format(name),)) for ours, name in pairs.items()),
        Rule(own.format(r"attention\.qkv"), joined),
        Rule(rf"image_kv{_PARAMETERS}", tuple(image)),
        Rule("query_tokens", ("query_tokens",), _flat_queries),
    )


def _bert(crossing: Sequence[int]) -> Table:
    """LAVIS' module: a BERT with a masked-language-model head; the learned queries lie beside it."""
    root, head = "bert.embeddings.", "cls.predictions."
    rules = renames(
        norm=f"{root}LayerNorm", embedding=f"{root}word_embeddings", position_embedding=f"{root}position_embeddings",
        lm_dense=f"{head}transform.dense", lm_norm=f"{head}transform.LayerNorm",
    )  # fmt: skip
    return Table(
        (*_layers("bert.encoder.", "self", crossing), *rules, Rule("lm_bias", (f"{head}bias",))),
        # the decoder's weight and bias are the embedding and `bias` again
        ignored=(r"bert\.embeddings\.position_ids", r"cls\.predictions\.decoder\.(weight|bias)"),
    )


_NO_HEAD = (
    r"lm_(dense|norm)\.(weight|bias)",
    "lm_bias",
)  # published without one: it keeps what it was initialised with


def qformer_table(source: str, crossing: Sequence[int]) -> Table:
    if source == "lavis":
        return _bert(crossing)
    if source in ("lavis_instruct", "xcomposer"):
        table = _bert(crossing)
        return Table(table.rules, _NO_HEAD, table.ignored)
    text = renames(
        embedding="embeddings.word_embeddings", position_embedding="embeddings.position_embeddings"
    )
    norms = renames(norm="layernorm") + renames(norm="embeddings.layernorm")  # BLIP-2's file, InstructBLIP's
    return Table(
        (*_layers("encoder.", "attention", crossing), *text, *norms), _NO_HEAD, (r"embeddings\.position_ids",)
    )

"""Checkpoints: strict in, atomic out, no pickles, and every published layout that a table exists for."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmkernels import models, weights
from mmkernels.layers import GatedCrossAttentionBlock, PerceiverResampler, VisionConfig, VisionTower
from mmkernels.models.unpickle import tensors


def _block(**options) -> GatedCrossAttentionBlock:
    return GatedCrossAttentionBlock(16, 12, heads=2, head_dim=8, ff_mult=2, **options)


def _published_block(ff: str) -> dict[str, torch.Tensor]:
    sizes = {
        "attn.norm.weight": (16,), "attn.norm.bias": (16,), "attn.to_q.weight": (16, 16), "attn.to_kv.weight": (32, 12),
        "attn.to_out.weight": (16, 16), "attn_gate": (1,), f"{ff}.0.weight": (16,), f"{ff}.0.bias": (16,),
        f"{ff}.1.weight": (32, 16), f"{ff}.3.weight": (16, 32), "ff_gate": (1,),
    }  # fmt: skip
    return {key: torch.randn(size) for key, size in sizes.items()}


def _published_resampler(layer: str, ff: str, depth: int = 2) -> dict[str, torch.Tensor]:
    norm = {"norm_media": (16,), "norm_latents": (16,)}
    linear = {"to_q": (16, 16), "to_kv": (32, 16), "to_out": (16, 16)}
    state = {"latents": torch.randn(3, 16), "norm.weight": torch.randn(16), "norm.bias": torch.randn(16)}
    for i in range(depth):
        at, last = f"layers.{i}.{layer}", f"layers.{i}.{ff}"
        for name, size in norm.items():
            state |= {f"{at}{name}.{end}": torch.randn(size) for end in ("weight", "bias")}
        state |= {f"{at}{name}.weight": torch.randn(size) for name, size in linear.items()}
        state |= {f"{last}0.weight": torch.randn(16), f"{last}0.bias": torch.randn(16)}
        state |= {f"{last}1.weight": torch.randn(64, 16), f"{last}3.weight": torch.randn(16, 64)}
    return state


@pytest.mark.parametrize(("source", "ff"), [("open_flamingo", "ff"), ("otter", "feed_forward")])
def test_published_blocks(source, ff):
    block, state = _block(), _published_block(ff)
    weights.load(block, state, source=source)
    assert torch.equal(block.kv.weight, state["attn.to_kv.weight"])
    assert torch.equal(block.down.weight, state[f"{ff}.3.weight"])
    assert torch.equal(block.ffn_gate, state["ff_gate"])


@pytest.mark.parametrize(
    ("source", "layer", "ff"), [("open_flamingo", "0.", "1."), ("otter", "", "feed_forward.")]
)
def test_published_resamplers(source, layer, ff):
    resampler = PerceiverResampler(16, depth=2, heads=2, head_dim=8, latents=3, max_frames=4, max_media=5)
    state = _published_resampler(layer, ff)
    state |= {"frame_embs": torch.randn(4, 16), "media_time_embs": torch.randn(5, 1, 16)}
    weights.load(resampler, state, source=source)
    assert torch.equal(resampler.media_embeddings, state["media_time_embs"][:, 0])
    assert torch.equal(resampler.layers[1].attention.out.weight, state[f"layers.1.{layer}to_out.weight"])
    assert torch.equal(resampler.layers[1].mlp.up.weight, state[f"layers.1.{ff}1.weight"])


def test_a_refusal_lists_everything_and_touches_nothing():
    block, state = _block(), _published_block("ff")
    before = {n: p.detach().clone() for n, p in block.named_parameters()}
    del state["attn_gate"], state["ff.1.weight"]
    state |= {"attn.to_q.bias": torch.zeros(16), "attn.to_out.weight": torch.zeros(16, 8)}
    state["attn.norm.weight"] = torch.zeros(16, dtype=torch.int64)
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        weights.load(block, state, source="open_flamingo")
    for part in (
        "missing: attn_gate, ff.1.weight",
        "left over: attn.to_q.bias",
        "out.weight has shape [16, 8], expected [16, 16]",
        "norm.weight has dtype torch.int64",
    ):
        assert part in str(error.value)
    assert all(torch.equal(p, before[n]) for n, p in block.named_parameters())
    with pytest.raises(ValueError, match="expected 'open_flamingo', 'otter', 'idefics'"):
        weights.load(block, state, source="huggingface")
    with pytest.raises(ValueError, match="expected None only"):
        weights.load(torch.nn.Linear(2, 2), {}, source="otter")


def test_parts_that_do_not_join_are_misshapen():
    state = {k: v.clone() for k, v in _block(norm="rms").state_dict().items()}
    k, v = state.pop("kv.weight").chunk(2)
    with pytest.raises(ValueError, match=r"kv\.weight cannot be made of \[16, 12\] and \[16, 11\]"):
        weights.load(
            _block(norm="rms"),
            {"cross_attn.k_proj.weight": k, "cross_attn.v_proj.weight": v[:, 1:]},
            source="idefics",
        )


def test_values_take_the_dtype_of_the_parameters():
    block, state = _block().double(), {k: v.bfloat16() for k, v in _published_block("ff").items()}
    weights.load(block, state, source="open_flamingo")
    assert block.q.weight.dtype == torch.float64
    assert torch.equal(block.q.weight, state["attn.to_q.weight"].double())


def _tiny(placed_at: int = 2) -> models.Flamingo:
    config = models.config("flamingo-tiny")
    return models.build(
        replace(
            config,
            cross=replace(config.cross, every=placed_at),
            resampler=replace(config.resampler, max_frames=None),
        )
    )


def test_the_released_layout_of_a_whole_model():
    """Resampler, blocks under the decoder layers they stand before, the embedding; frozen parts may be missing."""
    model = _tiny(2)
    width, hidden, inner = 128, 256, 128
    state: dict[str, torch.Tensor] = {"lang_encoder.transformer.wte.weight": torch.randn(600, width)}
    state |= {
        f"perceiver.{k}": torch.randn(v.shape) for k, v in _theirs(model.resampler, "open_flamingo").items()
    }
    for layer in (1, 3):
        at = f"lang_encoder.transformer.blocks.{layer}.gated_cross_attn_layer."
        state |= {at + k: torch.randn(v.shape) for k, v in _theirs(model.cross[0], "open_flamingo").items()}
    state["lang_encoder.gated_cross_attn_layers.1.attn_gate"] = torch.ones(
        1
    )  # duplicates and frozen parts are not read
    state["lang_encoder.old_decoder_blocks.0.norm_1.weight"] = torch.ones(width)
    state["lang_encoder.transformer.blocks.0.decoder_layer.norm_1.weight"] = torch.ones(width)
    state["vision_encoder.class_embedding"] = torch.ones(width)
    frozen = {
        n: p.detach().clone() for n, p in model.named_parameters() if n.startswith(("lm.blocks", "vision"))
    }
    weights.load(model, state, source="open_flamingo")
    at = "lang_encoder.transformer.blocks.3.gated_cross_attn_layer."
    assert torch.equal(model.cross[1].up.weight, state[at + "ff.1.weight"])
    assert model.cross[1].up.weight.shape == (hidden, width) and model.cross[1].q.weight.shape == (
        inner,
        width,
    )
    table = state["lang_encoder.transformer.wte.weight"]
    assert torch.equal(model.lm.embedding.weight, table[:512])
    assert torch.equal(model.lm.special_rows, table[list(model.lm.special)])
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
    with pytest.raises(ValueError, match=r"missing: .*blocks\.2.*left over: .*blocks\.1"):
        weights.load(_tiny(3), state, source="open_flamingo")


def _theirs(module: torch.nn.Module, source: str) -> dict[str, torch.Tensor]:
    """Our parameters under the authors' keys, for layouts that join nothing."""
    rules = module.published(source).rules
    named = {}
    for name, value in module.state_dict().items():
        (key,) = next(r for r in rules if r.sources(name) is not None).sources(name)
        named[key] = value
    return named


def test_open_clip_files():
    torch.manual_seed(0)
    tower = VisionTower(VisionConfig(8, 4, 16, 1, 2, 32))
    block = "visual.transformer.resblocks.0."
    state = {
        "visual.class_embedding": (16,), "visual.positional_embedding": (5, 16), "visual.proj": (16, 8),
        "visual.conv1.weight": (16, 3, 4, 4), "visual.ln_pre.weight": (16,), "visual.ln_pre.bias": (16,),
        "visual.ln_post.weight": (16,), "visual.ln_post.bias": (16,), "logit_scale": (), "token_embedding.weight": (9, 8),
        f"{block}ln_1.weight": (16,), f"{block}ln_1.bias": (16,), f"{block}ln_2.weight": (16,), f"{block}ln_2.bias": (16,),
        f"{block}attn.in_proj_weight": (48, 16), f"{block}attn.in_proj_bias": (48,),
        f"{block}attn.out_proj.weight": (16, 16), f"{block}attn.out_proj.bias": (16,),
        f"{block}mlp.c_fc.weight": (32, 16), f"{block}mlp.c_fc.bias": (32,),
        f"{block}mlp.c_proj.weight": (16, 32), f"{block}mlp.c_proj.bias": (16,),
    }  # fmt: skip
    state = {k: torch.randn(v) for k, v in state.items()}
    weights.load(tower, state, source="open_clip")
    assert torch.equal(tower.blocks[0].attention.qkv.weight, state[f"{block}attn.in_proj_weight"])
    images = torch.randn(2, 3, 8, 8)
    patches = (
        torch.nn.functional.conv2d(images, state["visual.conv1.weight"], stride=4).flatten(2).transpose(1, 2)
    )
    torch.testing.assert_close(tower.patch(_patches(tower, images)), patches)


def _patches(tower: VisionTower, images: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = tower.patch.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tower(images)
    handle.remove()
    return seen[0]


def test_a_file_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    model, other = _tiny(), _tiny()
    path = tmp_path / "model.safetensors"
    weights.save(model, path, metadata={"step": "7"})
    weights.load(other, path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    weights.load(other, str(path))
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_folder_of_files_is_one_checkpoint(tmp_path):
    state = _published_block("ff")
    names = sorted(state)
    save_file({k: state[k] for k in names[:4]}, tmp_path / "a.safetensors")
    save_file({k: state[k] for k in names[4:]}, tmp_path / "b.safetensors")
    block = _block()
    weights.load(block, tmp_path, source="open_flamingo")
    assert torch.equal(block.up.weight, state["ff.1.weight"])
    save_file({names[0]: state[names[0]]}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="another file of the folder"):
        weights.load(block, tmp_path, source="open_flamingo")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder"):
        weights.save({"a": torch.ones(1)}, tmp_path / "nowhere" / "a.safetensors")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    weights.save({"a": torch.ones(2)}, path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        weights.save({"a": torch.zeros(2)}, path)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert torch.equal(load_file(path)["a"], torch.ones(2))


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def _torch_file(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_pickles_are_refused_by_content_and_never_run(tmp_path):
    mark, block = tmp_path / "ran", _block()
    evil = _torch_file(tmp_path / "evil.safetensors", {"a": _Evil(mark)})
    bare = tmp_path / "bare.safetensors"
    bare.write_bytes(pickle.dumps(_Evil(mark)))
    for path in (evil, bare):
        with pytest.raises(ValueError, match="mmkernels convert"):
            weights.load(block, path)
    with pytest.raises(ValueError, match="cannot be converted"):
        weights.convert(evil, tmp_path / "out.safetensors")
    assert not mark.exists() and not (tmp_path / "out.safetensors").exists()


def test_broken_files_are_refused(tmp_path):
    whole, block = tmp_path / "whole.safetensors", _block()
    weights.save(block, whole)
    data = whole.read_bytes()
    for name, content in (("cut", data[: len(data) // 2]), ("empty", b""), ("noise", os.urandom(200)),
                          ("huge", (2**60).to_bytes(8, "little") + data[8:])):  # fmt: skip
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            weights.load(block, path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        weights.load(block, tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="without safetensors"):
        weights.load(block, tmp_path / "folder")


def test_conversion(tmp_path):
    block, state = _block(), _published_block("ff")
    old = _torch_file(
        tmp_path / "old.pt", {"epoch": 3, "model_state_dict": {f"module.{k}": v for k, v in state.items()}}
    )
    new = tmp_path / "new.safetensors"
    assert sorted(weights.convert(old, new)) == sorted(state)
    weights.load(block, new, source="open_flamingo")
    assert torch.equal(block.q.weight, state["attn.to_q.weight"])
    with pytest.raises(FileNotFoundError):
        weights.convert(tmp_path / "nowhere.pt", new)
    for content, match in (
        ([1, 2], "holds a list"),
        ({"a": 1, "b": {}}, "other things than tensors: a, b"),
        ({}, "a dict"),
    ):
        with pytest.raises(ValueError, match=match):
            tensors(content)

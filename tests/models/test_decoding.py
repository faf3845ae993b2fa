"""Generation: caches, the media-time rules, prompts of unequal length, stopping and sampling."""

from __future__ import annotations

import pytest
import torch
from tiny import PAD, pictures, text_ids

from mmkernels.models.sampling import Sampler

LATENTS = 8


@torch.no_grad()
def test_steps_from_a_cache_equal_the_whole(model):
    ids, images = text_ids("aIbcIdefgh", "IabcdefgCi"), pictures(2, 2)
    whole = model(images, ids).logits
    cache = model.new_cache(2, 10)
    parts = [model(images, ids[:, :6], cache=cache).logits]
    parts += [model(input_ids=part, cache=cache).logits for part in ids[:, 6:].split((1, 2, 1), dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def _seen(model, cache) -> list[list[tuple[int, int] | str]]:
    """Which media (first, one past the last) each row of the last call saw; "all" where it averaged."""
    c = cache.media["condition"]
    b, images = c.media.shape[:2]
    rows = zip(
        c.intervals.lo.view(b, -1), c.intervals.hi.view(b, -1), c.intervals.uniform.view(b, -1), strict=True
    )
    return [
        [
            "all"
            if u
            else ((l - n * images * LATENTS) // LATENTS, (h - n * images * LATENTS) // LATENTS)
            if h > l
            else ()
            for l, h, u in zip(lo.tolist(), hi.tolist(), uniform.tolist(), strict=True)
        ]
        for n, (lo, hi, uniform) in enumerate(rows)
    ]


@torch.no_grad()
def test_media_time_while_decoding(model):
    cache = model.new_cache(3, 12)
    model(pictures(3, 3), text_ids("IaIb", "abIc", "abcd"), cache=cache)
    assert _seen(model, cache) == [
        [(0, 1), (0, 1), (1, 2), (1, 2)],
        [(), (), (0, 1), (0, 1)],
        [(), (), (), ()],
    ]
    model(input_ids=text_ids("xy", "xy", "xy"), cache=cache)  # no media token: everyone keeps its last medium
    assert _seen(model, cache) == [[(1, 2)] * 2, [(0, 1)] * 2, [(), ()]]
    model(
        input_ids=text_ids("x", "I", "x"), cache=cache
    )  # one row has one: time restarts for the whole batch
    assert _seen(model, cache) == [[()], [(0, 1)], [()]]
    model(input_ids=text_ids("y", "y", "y"), cache=cache)  # and stays so
    assert _seen(model, cache) == [[()], [(0, 1)], [()]]
    model(input_ids=text_ids("IIII", "IIxx", "xxxx"), cache=cache)  # more media tokens than media
    assert _seen(model, cache)[0] == [(0, 1), (1, 2), (2, 3), "all"]
    cache.text.length = 0
    model(input_ids=text_ids("z", "z", "z"), cache=cache)
    assert _seen(model, cache) == [["all"], [(1, 2)], [()]]
    model(pictures(3, 1), text_ids("Iz", "zI", "zz"), cache=cache)  # new media: their own time
    assert _seen(model, cache) == [[(0, 1), (0, 1)], [(), (0, 1)], [(), ()]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_from_prompts_of_unequal_length(model, side):
    prompts, images = ["IabCIcd", "Ie", "xyzIf"], pictures(3, 2)
    pad = str.rjust if side == "left" else str.ljust
    ids = text_ids(*(pad(p, 7, ".") for p in prompts))
    together = model.generate(images, ids, ids != PAD, max_new_tokens=4, stop=())
    for n, prompt in enumerate(prompts):
        alone = model.generate(images[n : n + 1], text_ids(prompt), max_new_tokens=4, stop=())
        assert torch.equal(together[n : n + 1], alone), n
        slow, text = text_ids(prompt), []
        for _ in range(4):  # without a cache
            with torch.no_grad():
                text.append(model(images[n : n + 1], slow).logits[:, -1].argmax(-1))
            slow = torch.cat([slow, text[-1][:, None]], 1)
        assert torch.equal(torch.stack(text, 1), alone), n


def test_a_row_ends_at_its_stop_token(model):
    images, ids = pictures(2, 1), text_ids("Iab", "Icd")
    free = model.generate(images, ids, max_new_tokens=6, stop=())
    stop = int(free[0, 2])
    first = [int((row == stop).nonzero()[0]) if bool((row == stop).any()) else 5 for row in free]
    ended = model.generate(images, ids, max_new_tokens=6, stop=(stop,))
    assert ended.shape[1] == max(first) + 1
    for row, whole, end in zip(ended, free, first, strict=True):
        assert torch.equal(row[: end + 1], whole[: end + 1]) and not row[end + 1 :].any()


def test_sampling(model):
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)).expand(200, -1)
    likeliest = logits[0].argsort(descending=True)

    def draw(**options):
        return Sampler(**options, generator=torch.Generator().manual_seed(0))(logits)

    greedy = likeliest[:1].expand(200)
    for options in ({"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}, {"temperature": 0.0}):
        assert torch.equal(draw(**{"temperature": 1.0, **options}), greedy), options
    free = draw(temperature=9.0)
    assert torch.equal(free, draw(temperature=9.0)) and len(free.unique()) > 30
    assert set(draw(temperature=9.0, top_k=4).tolist()) == set(likeliest[:4].tolist())
    mass = (logits[0] / 9).softmax(-1)[likeliest].cumsum(-1)
    kept = likeliest[: int((mass < 0.2).sum()) + 1]  # the fewest that reach it
    assert set(draw(temperature=9.0, top_p=0.2).tolist()) == set(kept.tolist()) and len(kept) > 2
    one = [model.generate(pictures(1, 1), text_ids("Iab"), max_new_tokens=2, temperature=3.0, top_k=5, stop=(),
                          generator=torch.Generator().manual_seed(n)) for n in (0, 0, 1, 2, 3)]  # fmt: skip
    assert torch.equal(one[0], one[1]) and any(not torch.equal(one[0], other) for other in one)
    for bad in ({"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            model.generate(pictures(1, 1), text_ids("Iab"), **bad)


@torch.no_grad()
def test_the_last_position_alone(model):
    ids, images = text_ids("Iab", "cId"), pictures(2, 1)
    whole, last = model(images, ids).logits, model(images, ids, last_only=True).logits
    torch.testing.assert_close(last, whole[:, -1:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="last_only"):
        model(images, ids, labels=ids, last_only=True)

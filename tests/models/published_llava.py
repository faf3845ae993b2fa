"""What LLaVA's authors compute, step by step in plain words of torch: joined tiles, and texts with pictures in them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def joined(features, size, grid, newline, *, kind="unpad", base=True, most=0, hf=False):
    """Tokens of a picture of `size` (w, h) whose tiles form `grid` (columns, rows)."""
    side = math.isqrt(features.shape[1])
    columns, rows = grid
    tiles = features[1:] if base else features
    x = tiles.view(rows, columns, side, side, -1)
    if kind == "flat":
        x = tiles.flatten(0, 1)
    elif kind == "spatial":
        x = x.permute(0, 2, 1, 3, 4).flatten(0, 3)
    else:
        x = x.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
        if kind == "maxpool2x2":
            x = F.max_pool2d(x, 2).flatten(1).T
        else:
            x = unpad(x, *size, hf)
            if most:
                times = math.sqrt(x.shape[1] * x.shape[2] / (most * side**2))
                if times > 1.1:
                    smaller = [int(x.shape[1] // times), int(x.shape[2] // times)]
                    x = F.interpolate(x[None], smaller, mode="bilinear")[0]
            x = torch.cat([x, newline[:, None, None].expand(*x.shape[:-1], 1)], -1).flatten(1).T
    return torch.cat([features[0], x]) if base else x


def unpad(x, width, height, hf):
    rows, columns = x.shape[1:]
    if width / height > columns / rows:
        kept = height * (columns / width)
        kept = int(round(kept, 7)) if hf else int(kept)
        cut = (rows - kept) // 2
        return x[:, cut : rows - cut]
    kept = width * (rows / height)
    kept = int(round(kept, 7)) if hf else int(kept)
    cut = (columns - kept) // 2
    return x[:, :, cut : columns - cut]


def spliced(ids, mask, labels, media, table, *, max_length=None, left=False):
    """Embeddings, mask, labels and positions of rows whose pictures stand at -200."""
    rows, told, at = [], [], 0
    for row, keep, label in zip(ids, mask, labels, strict=True):
        row, label = row[keep].tolist(), label[keep].tolist()
        parts, marks = [], []
        for token, answer in zip(row, label, strict=True):
            if token == -200:
                parts.append(media[at])
                marks += [-100] * len(media[at])
                at += 1
            else:
                parts.append(table[token][None])
                marks.append(answer)
        if -200 not in row:
            parts.append(media[at][0:0])
            at += 1
        rows.append(torch.cat(parts)[:max_length])
        told.append(marks[:max_length])
    longest = max(map(len, rows))
    out = torch.zeros(len(rows), longest, table.shape[1], dtype=table.dtype)
    labels, mask = torch.full((len(rows), longest), -100), torch.zeros(len(rows), longest, dtype=torch.bool)
    positions = torch.zeros(len(rows), longest, dtype=torch.int64)
    for n, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        out[n, place], labels[n, place], mask[n, place] = row, torch.tensor(told[n]), True
        positions[n, place] = torch.arange(len(row))
    return out, mask, labels, positions


def spliced_by_yi(ids, mask, labels, media, table):
    """The older rules: padding stays, the mask grows on its left."""
    rows, told, at = [], [], 0
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        parts, marks = [], []
        for token, answer in zip(row, label, strict=True):
            if token == -200:
                parts.append(media[at])
                marks += [-100] * len(media[at])
                at += 1
            else:
                parts.append(table[token][None])
                marks.append(answer)
        at += -200 not in row
        rows.append(torch.cat(parts))
        told.append(marks)
    longest = max(map(len, rows))
    out = torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])
    labels = torch.tensor([marks + [-100] * (longest - len(marks)) for marks in told])
    masks = [
        [True] * (len(row) - len(keep)) + keep.tolist() + [False] * (longest - len(row))
        for row, keep in zip(rows, mask, strict=True)
    ]
    return out, torch.tensor(masks), labels

"""What every family's losses must do: learn one batch."""

from __future__ import annotations

from dataclasses import replace

import torch


def losses_of(make, model, stage, name, *, rate=2e-3, steps=8):
    """The loss `name` over some steps on its first batch, in what `stage` trains; `make()` gives the objectives."""
    stage = replace(stage, losses={name: 1.0}, mix={name: 1.0})
    stage.freeze(model)
    objectives, losses = make(), []
    optimizer = torch.optim.AdamW(objectives.parameters(stage), lr=rate)
    for _ in range(steps):
        loss = objectives.loss(name, 0, stage)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses

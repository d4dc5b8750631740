"""Modules whose projections share an input, truly or only by the look of their source."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.integrations.models import adapted

PROJECTIONS = ["q", "k", "v"]


class Attention(nn.Module):
    def __init__(self, features: int = 24) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(features, 16), nn.Linear(features, 8)
        self.v, self.o = nn.Linear(features, 8, bias=False), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        k, v = self.k(x), self.v(x)
        return self.o(torch.tanh(q) * torch.cat((k, v), -1))


class InPlace(Attention):
    """x changes between the calls, by a method."""

    def forward(self, x):
        x = x * 1
        q = self.q(x)
        x.add_(1)
        return self.o(torch.tanh(q) * torch.cat((self.k(x), self.v(x)), -1))


class HalfFrozen(Attention):
    """q outside the graph, k and v inside."""

    def forward(self, x):
        with torch.no_grad():
            q = self.q(x)
        return self.o(torch.tanh(q) * torch.cat((self.k(x), self.v(x)), -1))


class HalfCheckpointed(Attention):
    """q and k alone in a checkpoint, v outside."""

    def forward(self, x):
        q, k = checkpoint(lambda x: (self.q(x), self.k(x)), x, use_reentrant=False)
        return self.o(torch.tanh(q) * torch.cat((k, self.v(x)), -1))


class Overwriting(Attention):
    """In-place changes of the results."""

    def forward(self, x):
        q = self.q(x)
        q += 1
        k = self.k(x)
        k.mul_(2)
        return self.o(torch.tanh(q) * torch.cat((k, self.v(x)), -1))


class Crossed(Attention):
    """Different tensors under one name."""

    def forward(self, x):
        q = self.q(x)
        x = x.flip(0)
        return self.o(torch.tanh(q) * torch.cat((self.k(x), self.v(x)), -1))


class Branching(Attention):
    def forward(self, x):
        q = self.q(x)
        k = self.k(x) if x.shape[0] > 100 else self.k(x.flip(0))
        for _ in range(2):
            v = self.v(x)
        return self.o(torch.tanh(q) * torch.cat((k, v), -1))


def attention(kind: type = Attention, **config) -> nn.Module:
    torch.manual_seed(1)
    return adapted(kind(), target_modules=config.pop("target_modules", [*PROJECTIONS, "o"]), **config)

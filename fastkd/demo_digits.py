"""What the demo in pictures is made of: digits, a transformer that draws them, and a judge of what it drew."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import diffusion
from fastkd.diffusion import RectifiedFlow, TrigFlow

SIDE, CLASSES, PATCH = 8, 10, 2
SCALE = 0.75  # standard deviation of the pixels, which go from -1 to 1
TRIG, FLOW = TrigFlow(SCALE), RectifiedFlow()


class Digits:
    """Pictures [n, 8, 8], labels [n], and batches of them."""

    def __init__(self, pictures: Tensor, labels: Tensor, batch: int, seed: int) -> None:
        self.pictures, self.labels, self.batch = pictures, labels, batch
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.labels), (self.batch,), generator=self.generator)
        return self.pictures[rows], self.labels[rows]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def chosen(self, share: float) -> Tensor:
        """[batch], true with this probability."""
        return torch.rand(self.batch, generator=self.generator) < share


def load() -> tuple[Tensor, Tensor]:
    """1,797 digits that scikit-learn ships with, 0 to 16 brought to -1 to 1, and which digits they are."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32) / 8 - 1, torch.tensor(found.target)


class Block(nn.Module):
    """Attention and MLP, modulated by a condition [B, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = zeroed(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift, gate, scale2, shift2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        x = x + gate * self.attend(normal(x) * (1 + scale) + shift)
        return x + gate2 * self.mlp(normal(x) * (1 + scale2) + shift2)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(normal(q), normal(k), v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """F(x_t / sigma_data, t) of TrigFlow; with ``gap``, a second time, what a mean over it needs."""

    def __init__(self, side: int = SIDE, width: int = 96, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.into, self.onto = nn.Linear(PATCH**2, width), zeroed(nn.Linear(width, PATCH**2))
        self.place = nn.Parameter(0.02 * torch.randn((side // PATCH) ** 2, width))
        self.label = nn.Embedding(CLASSES, width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.gap = nn.Sequential(nn.Linear(64, width), nn.SiLU(), zeroed(nn.Linear(width, width)))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.register_buffer("frequencies", torch.linspace(0, math.log(30), 32).exp())
        self.frequencies: Tensor

    def waves(self, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequencies
        return torch.cat((angle.cos(), angle.sin()), -1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor, gap: Tensor | None = None) -> Tensor:
        condition = self.time(self.waves(t)) + self.label(labels)
        if gap is not None:
            condition = condition + self.gap(self.waves(0.3 * gap))  # fast waves would make fast tangents
        z, condition = self.into(patches(x)) + self.place, F.silu(condition)
        for block in self.blocks:
            z = block(z, condition)
        return pictures(self.onto(normal(z)))


class MeanVelocity(nn.Module):
    """u(x_t, t, r) of RectifiedFlow by a network of TrigFlow, whose velocity it is at first."""

    def __init__(self, network: Transformer) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, r: Tensor, labels: Tensor) -> Tensor:
        y, angle = diffusion.transfer(x, t, FLOW, TRIG)
        predicted = self.network(y / SCALE, angle, labels, t - r)
        return TRIG.convert(predicted, y, angle, "F", "eps") - TRIG.convert(predicted, y, angle, "F", "x")


def patches(x: Tensor) -> Tensor:
    """Pictures [n, side, side] as [n, patches, PATCH^2], row by row."""
    cut = (-1, PATCH)
    return x.unflatten(1, cut).unflatten(3, cut).transpose(2, 3).flatten(3).flatten(1, 2)


def pictures(x: Tensor) -> Tensor:
    """What they were cut from."""
    grid = math.isqrt(x.shape[1])
    return x.unflatten(1, (grid, grid)).unflatten(3, (PATCH, PATCH)).transpose(2, 3).flatten(3).flatten(1, 2)


def zeroed(layer: nn.Linear) -> nn.Linear:
    """A layer that adds nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def normal(x: Tensor) -> Tensor:
    """Of root mean square 1."""
    return F.rms_norm(x, x.shape[-1:])


class Judge(nn.Module):
    """A small classifier: logits, and the features before them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU())
        self.logits = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))


def judge_of(pictures: Tensor, labels: Tensor, steps: int, seed: int) -> Judge:
    """One that has learned from pictures with some noise."""
    judge, data = Judge(), Digits(pictures, labels, 128, seed)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    for _ in range(steps):
        x, y = data.draw()
        loss = F.cross_entropy(judge(x + 0.1 * data.normal(*x.shape)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.requires_grad_(False)


def distance(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of normal distributions with the means and covariances of features [n, D]."""
    (mean, cov), (mean2, cov2) = ((x.mean(0), x.T.cov()) for x in (a.double(), b.double()))
    root = torch.linalg.eigvals(cov @ cov2).real.clamp(min=0).sqrt().sum()
    return ((mean - mean2).square().sum() + cov.trace() + cov2.trace() - 2 * root).item()

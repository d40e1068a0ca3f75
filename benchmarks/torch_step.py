"""Time the same training steps and evaluation in plain PyTorch; `benchmarks.cifar_step --torch` starts this file.

It may run in another Python than ltjax, so it only imports PyTorch, NumPy and the standard library. Its argument is the
size as JSON. It writes a line about itself, and for each line [way, what, count] of its standard input a line
{"seconds": ...}: the time of `count` steps of a stage, or of evaluating `count` images. All lines are JSON.

The network is ltjax's ResNet for CIFAR, with names that `ltjax.interop` imports. Images are in memory in the network's
layout, so loading, cropping and mirroring, which are part of ltjax's steps, take no time here.
"""

import json
import os
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import torch  # pyrefly: ignore[missing-import]
from torch import nn  # pyrefly: ignore[missing-import]
from torch.nn import functional as F  # pyrefly: ignore[missing-import]


class Way(NamedTuple):
    title: str
    memory_format: Any
    bfloat16: bool  # autocast


WAYS = {
    "nchw_float32": Way("NCHW float32, as the authors run it", torch.contiguous_format, False),
    "channels_last_float32": Way("channels_last float32", torch.channels_last, False),
    "channels_last_bfloat16": Way("channels_last, autocast to bfloat16", torch.channels_last, True),
}


class Block(nn.Module):
    """Two 3x3 convolutions. The shortcut takes every `stride`-th pixel, and pads new channels with zeros."""

    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.new = stride, (out - channels) // 2

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride > 1 or self.new:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new, self.new))
        return F.relu(x + y)


class ResNet(nn.Module):
    """A ResNet of depth 6 n + 2: images [B, 3, 32, 32] -> logits [B, C]."""

    def __init__(self, depth: int = 32, width: int = 16, num_classes: int = 100):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        blocks = (depth - 2) // 6
        self.layer1 = self._stage(width, width, 1, blocks)
        self.layer2 = self._stage(width, 2 * width, 2, blocks)
        self.layer3 = self._stage(2 * width, 4 * width, 2, blocks)
        self.linear = nn.Linear(4 * width, num_classes)

    @staticmethod
    def _stage(channels: int, out: int, stride: int, blocks: int) -> nn.Sequential:
        return nn.Sequential(Block(channels, out, stride), *(Block(out, out, 1) for _ in range(blocks - 1)))

    def features(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def forward(self, x):
        return self.linear(self.features(x))


class Runner:
    """One network with its batch of images, and its timed functions."""

    def __init__(self, way: Way, *, depth: int, width: int, num_classes: int, batch_size: int, eval_batch_size: int):
        self.way, self.rng = way, np.random.default_rng(0)
        self.net = ResNet(depth, width, num_classes).to(memory_format=way.memory_format)
        self.scale = nn.Parameter(torch.ones(num_classes))  # of each class's logit, in stage 2
        settings = dict(lr=0.1, momentum=0.9, weight_decay=5e-4)
        self.optimizer = torch.optim.SGD(self.net.parameters(), **settings)
        self.classifier_optimizer = torch.optim.SGD([*self.net.linear.parameters(), self.scale], **settings)
        self.batch = self._batch(batch_size, num_classes)
        self.eval_batch = self._batch(eval_batch_size, num_classes)

    def _batch(self, size: int, num_classes: int):
        images = torch.randn(size, 3, 32, 32).contiguous(memory_format=self.way.memory_format)
        return images, torch.randint(num_classes, (size,))

    def autocast(self):
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.way.bfloat16)

    def features(self) -> None:
        """Run a step of stage 1: mixup, cross-entropy, and SGD of the whole network."""
        images, labels = self.batch
        share, order = self.rng.beta(1.0, 1.0), torch.randperm(len(labels))
        mixed = share * images + (1 - share) * images[order]
        with self.autocast():
            logits = self.net(mixed).float()
            loss = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels[order])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def classifier(self) -> None:
        """Run a step of stage 2: train classifier and scale; the frozen backbone's batch norms are in training mode."""
        images, labels = self.batch
        with self.autocast():
            with torch.no_grad():
                features = self.net.features(images)
            loss = F.cross_entropy(self.scale * self.net.linear(features).float(), labels)
        self.classifier_optimizer.zero_grad()
        loss.backward()
        self.classifier_optimizer.step()

    def evaluate(self, count: int) -> list[np.ndarray]:
        """Return predictions, confidences and losses of `count` images, [count] each, like ltjax's evaluation."""
        images, labels = self.eval_batch
        outcomes = []
        self.net.eval()
        with torch.inference_mode(), self.autocast():
            for start in range(0, count, len(labels)):
                size = min(len(labels), count - start)
                logits = self.net(images[:size]).float()
                losses = F.cross_entropy(logits, labels[:size], reduction="none")
                outcomes.append((logits.argmax(-1), logits.softmax(-1).amax(-1), losses))
        self.net.train()
        return [torch.cat(values).numpy() for values in zip(*outcomes, strict=True)]

    def seconds(self, what: str, count: int) -> float:
        """Time `count` steps of "features" or "classifier", or "evaluation" of `count` images."""
        started = time.perf_counter()
        if what == "evaluation":
            self.evaluate(count)
        else:
            step = {"features": self.features, "classifier": self.classifier}[what]
            for _ in range(count):
                step()
        return time.perf_counter() - started


def main() -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.manual_seed(0)
    settings = json.loads(sys.argv[1])
    runners = {name: Runner(way, **settings) for name, way in WAYS.items()}
    titles = {name: way.title for name, way in WAYS.items()}
    print(json.dumps({"version": torch.__version__, "threads": torch.get_num_threads(), "ways": titles}), flush=True)
    for line in sys.stdin:
        way, what, count = json.loads(line)
        print(json.dumps({"seconds": runners[way].seconds(what, count)}), flush=True)


if __name__ == "__main__":
    main()

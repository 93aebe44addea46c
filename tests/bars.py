"""A data set, a network and an augmentation that are small enough to train in a test."""

import torch

from pydistill.data import Dataset
from pydistill.nn import ConvNet


def make_net():
    return ConvNet(1, 3, width=4, depth=1, image_size=6)


def make_dataset():
    """Three classes that differ in where the image is bright."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = 0.5 * torch.randn(60, 1, 6, 6, generator=generator)
    for label in range(3):
        images[labels == label, :, 2 * label : 2 * label + 2] += 2
    names = ("top", "middle", "bottom")
    return Dataset("bars", images[:45], labels[:45], images[45:], labels[45:], names, torch.zeros(1), torch.ones(1))


class Shift:
    """Each batch is shifted in brightness by what `draw` says."""

    def draw(self, shape, generator):
        return 0.1 * torch.randn(shape[0], 1, 1, 1, generator=generator)

    def __call__(self, images, record):
        return images + record

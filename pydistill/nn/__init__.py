"""Student networks as the method repositories define them, on the fused operators."""

from pydistill.nn.acceleration import Conv2d, InstanceNormReLUAvgPool, accelerate
from pydistill.nn.alexnet import AlexNet
from pydistill.nn.bn_stat_matcher import BNStatMatcher
from pydistill.nn.convnet import ConvNet
from pydistill.nn.frozen import FrozenConv2d, freeze, frozen_convolutions
from pydistill.nn.mlp import MLP
from pydistill.nn.registry import NETS, NetName, make
from pydistill.nn.resnet import ResNet18, ResNet50
from pydistill.nn.small_resnet import SmallResNet18
from pydistill.nn.vgg import VGG11
from pydistill.nn.vit import ViT

__all__ = [
    "MLP",
    "NETS",
    "VGG11",
    "AlexNet",
    "BNStatMatcher",
    "Conv2d",
    "ConvNet",
    "FrozenConv2d",
    "InstanceNormReLUAvgPool",
    "NetName",
    "ResNet18",
    "ResNet50",
    "SmallResNet18",
    "ViT",
    "accelerate",
    "freeze",
    "frozen_convolutions",
    "make",
]

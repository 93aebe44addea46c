"""The operators: one file each, registered with torch when imported."""

from pydistill.ops.attention_map import attention_map
from pydistill.ops.attention_map_divergence import attention_map_divergence
from pydistill.ops.augment import augment_images
from pydistill.ops.bn_stat_match import bn_match_forward, bn_stat_match
from pydistill.ops.conv2d import conv2d
from pydistill.ops.convnet_step import (
    ConvNetShape,
    Workspace,
    convnet_features,
    convnet_features_backward,
    convnet_gradient,
    convnet_logits,
    convnet_tangent,
)
from pydistill.ops.frozen_conv2d import FrozenFilters, frozen_conv2d, frozen_filters
from pydistill.ops.graph_cut_greedy import graph_cut_greedy
from pydistill.ops.instance_norm_relu_avg_pool import instance_norm_relu_avg_pool
from pydistill.ops.kd_divergence import kd_divergence
from pydistill.ops.max_pool2d import max_pool2d
from pydistill.ops.multi_crop import multi_crop
from pydistill.ops.row_products import row_products
from pydistill.ops.soft_cross_entropy import soft_cross_entropy
from pydistill.ops.sparse_label_loss import sparse_label_loss

__all__ = [
    "ConvNetShape",
    "FrozenFilters",
    "Workspace",
    "attention_map",
    "attention_map_divergence",
    "augment_images",
    "bn_match_forward",
    "bn_stat_match",
    "conv2d",
    "convnet_features",
    "convnet_features_backward",
    "convnet_gradient",
    "convnet_logits",
    "convnet_tangent",
    "frozen_conv2d",
    "frozen_filters",
    "graph_cut_greedy",
    "instance_norm_relu_avg_pool",
    "kd_divergence",
    "max_pool2d",
    "multi_crop",
    "row_products",
    "soft_cross_entropy",
    "sparse_label_loss",
]

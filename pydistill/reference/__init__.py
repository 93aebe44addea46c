"""Plain-torch definitions of the operators: any device and dtype, differentiable to any order."""

from pydistill.reference.attention_map import attention_map
from pydistill.reference.attention_map_divergence import attention_map_divergence
from pydistill.reference.augment import augment_images
from pydistill.reference.bn_stat_match import bn_match_forward, bn_stat_match
from pydistill.reference.convnet_step import convnet_features, convnet_gradient, convnet_logits, convnet_tangent
from pydistill.reference.frozen_conv2d import frozen_conv2d
from pydistill.reference.graph_cut_greedy import graph_cut_greedy
from pydistill.reference.instance_norm_relu_avg_pool import instance_norm_relu_avg_pool
from pydistill.reference.kd_divergence import kd_divergence
from pydistill.reference.krr_loss import krr_loss
from pydistill.reference.max_pool2d import max_pool2d
from pydistill.reference.mmd import mmd
from pydistill.reference.multi_crop import multi_crop
from pydistill.reference.row_products import row_products
from pydistill.reference.soft_cross_entropy import soft_cross_entropy
from pydistill.reference.sparse_label_loss import densify, sparse_label_loss

__all__ = [
    "attention_map",
    "attention_map_divergence",
    "augment_images",
    "bn_match_forward",
    "bn_stat_match",
    "convnet_features",
    "convnet_gradient",
    "convnet_logits",
    "convnet_tangent",
    "densify",
    "frozen_conv2d",
    "graph_cut_greedy",
    "instance_norm_relu_avg_pool",
    "kd_divergence",
    "krr_loss",
    "max_pool2d",
    "mmd",
    "multi_crop",
    "row_products",
    "soft_cross_entropy",
    "sparse_label_loss",
]

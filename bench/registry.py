"""The benchmark cases, in the order of `python -m bench.run`."""

from __future__ import annotations

from .case import Case
from .cases.images import AUGMENT, INSTANCE_NORM_RELU_AVG_POOL, MULTI_CROP
from .cases.labels import KD_DIVERGENCE, SOFT_LABEL_BYTES, SOFT_LABEL_READ, SPARSE_LABEL_LOSS
from .cases.matching import (
    ATTENTION_MAP_DIVERGENCE,
    ATTENTION_MAP_DIVERGENCE_MEMORY,
    DATADAM_STEP,
    DM_STEP,
    GRADIENT_MATCHING_STEP,
    KRR_LOSS,
    KRR_LOSS_MEMORY,
    MMD,
    MMD_MEMORY,
)
from .cases.recovery import BN_STAT_MATCH, BN_STAT_MATCH_MEMORY, FROZEN_CONV2D, FROZEN_RESNET18, SRE2L_RECOVER_STEP
from .cases.selection import GRAPH_CUT_GREEDY
from .cases.trajectory import (
    EXPERT_STORE,
    OUTER_STEP,
    OUTER_STEP_MEMORY,
    TRAIN_STUDENTS,
    UNROLL_ALEXNET_MEMORY,
    UNROLL_MEMORY,
    UNROLL_NETWORKS,
    UNROLL_RESNET18_MEMORY,
    UNROLL_SCALING,
    UNROLL_STEP,
    UNROLL_STEP_64,
    UNROLL_STEP_SMALL,
    UNROLL_VGG11_MEMORY,
)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        UNROLL_STEP,
        UNROLL_STEP_64,
        UNROLL_STEP_SMALL,
        OUTER_STEP,
        UNROLL_SCALING,
        UNROLL_MEMORY,
        OUTER_STEP_MEMORY,
        UNROLL_NETWORKS,
        UNROLL_RESNET18_MEMORY,
        UNROLL_VGG11_MEMORY,
        UNROLL_ALEXNET_MEMORY,
        TRAIN_STUDENTS,
        GRADIENT_MATCHING_STEP,
        EXPERT_STORE,
        SOFT_LABEL_READ,
        SOFT_LABEL_BYTES,
        INSTANCE_NORM_RELU_AVG_POOL,
        AUGMENT,
        MULTI_CROP,
        DATADAM_STEP,
        DM_STEP,
        MMD,
        MMD_MEMORY,
        ATTENTION_MAP_DIVERGENCE,
        ATTENTION_MAP_DIVERGENCE_MEMORY,
        KRR_LOSS,
        KRR_LOSS_MEMORY,
        BN_STAT_MATCH,
        BN_STAT_MATCH_MEMORY,
        SRE2L_RECOVER_STEP,
        FROZEN_CONV2D,
        FROZEN_RESNET18,
        GRAPH_CUT_GREEDY,
        KD_DIVERGENCE,
        SPARSE_LABEL_LOSS,
    )
}

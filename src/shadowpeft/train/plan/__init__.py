"""What a training will need, from a config alone: parameters, bytes, batch, parallelism, and a ceiling of its speed."""

from shadowpeft.train.plan.ceilings import Ceilings, measured_ceilings
from shadowpeft.train.plan.fit import Fit, Layout, choose
from shadowpeft.train.plan.planning import MARGIN, Devices, Plan, plan_training
from shadowpeft.train.plan.skeleton import Skeleton, build_skeleton, enable_checkpointing, read_dtype
from shadowpeft.train.plan.trace import StepShape, StepTrace, trace_step

__all__ = [
    "MARGIN",
    "Ceilings",
    "Devices",
    "Fit",
    "Layout",
    "Plan",
    "Skeleton",
    "StepShape",
    "StepTrace",
    "build_skeleton",
    "choose",
    "enable_checkpointing",
    "measured_ceilings",
    "plan_training",
    "read_dtype",
    "trace_step",
]

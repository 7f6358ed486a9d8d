"""The step between two blocks as one differentiable operation, and the choice among its implementations."""

from shadowpeft.core.kernels.backend import step_backend
from shadowpeft.core.kernels.function import fused_step
from shadowpeft.core.kernels.spec import Branch, StepSpec, StepWeights

__all__ = ["Branch", "StepSpec", "StepWeights", "fused_step", "step_backend"]

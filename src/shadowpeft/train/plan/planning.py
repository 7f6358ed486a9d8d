"""The whole plan of one training: every figure that `shadowpeft plan` prints."""

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from shadowpeft.core.config import require
from shadowpeft.core.head_loss import usual_rows
from shadowpeft.model.positions import within_positions
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.plan.ceilings import Ceilings
from shadowpeft.train.plan.fit import Fit, choose
from shadowpeft.train.plan.skeleton import Skeleton, build_skeleton
from shadowpeft.train.plan.trace import StepShape, StepTrace, cache_bytes, trace_step

# The plan is checked against measured peaks to within this share (benchmarks/plan.py), so as much is left free.
MARGIN = 0.15
KINDS = ("cpu", "gpu")


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What there is to train on.

    Attributes:
        count: processes, one a device.
        memory: bytes of each.
        margin: share of them that tensors must leave free: libraries, fragments, scratch of kernels.
        kind: ``cpu`` or ``gpu``, which differ in how many logits are in memory at a time.
    """

    count: int = 1
    memory: int | None = None
    margin: float = MARGIN
    kind: str = "cpu"

    def __post_init__(self) -> None:
        require(self.count >= 1, "gpus", self.count, "an integer of at least 1")
        require(0 <= self.margin < 1, "margin", self.margin, "a share in [0, 1)")
        require(self.kind in KINDS, "device", self.kind, f"one of {', '.join(KINDS)}")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """See :meth:`to_dict` for what it says.

    Attributes:
        step: the traced step of the asked batch.
        largest: the traced step of the largest batch; None without a memory, or where not one row fits.
        smallest: that of one row, where not one fits.
        fit: layout and rows; None without a memory.
        cache: bytes of keys and values of one row of ``length`` tokens in generation.
    """

    model: str
    dtype: str
    parameters: dict[str, int]
    step: StepTrace
    largest: StepTrace | None
    smallest: StepTrace | None
    fit: Fit | None
    devices: Devices
    cache: int
    ceilings: Ceilings | None

    def parts(self) -> dict[str, int]:
        """Bytes by what they are for; ``peak`` is the most there is at once, which need not be all of them."""
        step = self.step
        return {
            "base weights": step.base,
            "adapter weights": step.adapter,
            "gradients": step.gradients,
            "optimizer states": step.optimizer,
            "kept for backward": step.kept,
            "loss chunk": step.loss_chunk,
            "batch": step.batch,
            "peak of a step": step.peak,
            "KV cache of a row in generation": self.cache,
        }

    def speed(self) -> dict[str, Any] | None:
        """Ceilings of tokens a second, of all devices together; None without ceilings of a device."""
        if self.ceilings is None:
            return None
        step = self.largest or self.step
        count = self.devices.count
        seconds = self.ceilings.step_seconds(step)
        bandwidth = self.ceilings.bandwidth
        read = step.base + step.adapter + self.cache
        return {
            "is_estimate": True,
            "ceilings": asdict(self.ceilings),
            "batch": step.shape.batch,
            "step_flops": step.flops,
            "training_tokens_per_second_at_most": count * step.shape.num_tokens / seconds,
            # One row a device, each token reading all weights and the row's cache once.
            "generated_tokens_per_second_at_most": None if bandwidth is None else count * bandwidth / read,
        }

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values; sizes in bytes."""
        fit, memory = self.fit, self.devices.memory
        step = self.largest or self.smallest or self.step
        return {
            "model": self.model,
            "dtype": self.dtype,
            "parameters": self.parameters,
            "shape": asdict(self.step.shape),
            "bytes": self.parts(),
            "phases": self.step.peaks,
            "devices": asdict(self.devices),
            "fit": None
            if fit is None or memory is None
            else {
                "parallelism": fit.layout.kind,
                "processes": fit.layout.processes,
                "rows_a_process": fit.batch,
                "bytes_a_process": fit.layout.per_process(step),
                "is_arithmetic": fit.layout.kind != "single",
            },
            "speed": self.speed(),
        }


def plan_training(
    model: str,
    config: TrainConfig,
    devices: Devices,
    *,
    labels: int | None = None,
    labelled: float = 1.0,
    ceilings: Ceilings | None = None,
) -> Plan:
    """Plans a training with the settings of ``config`` (batch, length, dtype, accumulation, checkpointing, shadow).

    Args:
        model: folder, config.json, hub name or 'embedded'; no weights are read.
        labels: classes of a sequence classifier; None for a language model.
        labelled: share of the tokens that carry a label.

    Raises:
        ArchitectureError, ConfigError: as :func:`build_skeleton`.
    """
    require(0 < labelled <= 1, "labelled", labelled, "a share in (0, 1]")
    require(labels is None or labels >= 1, "labels", labels, "an integer of at least 1")
    recomputes = config.gradient_checkpointing
    skeleton = build_skeleton(model, config.shadow, dtype=config.dtype, labels=labels, checkpointing=recomputes)
    shape = _shape(skeleton, config, devices, labelled)

    @cache
    def trace(rows: int) -> StepTrace:
        return trace_step(skeleton, StepShape(**{**asdict(shape), "batch": rows}))

    fit = None
    if devices.memory is not None:
        memory = int(devices.memory * (1 - devices.margin))
        fit, _ = choose(trace, processes=devices.count, memory=memory, block_bytes=skeleton.block_bytes())
    return Plan(
        model=model,
        dtype=str(skeleton.dtype).removeprefix("torch."),
        parameters=skeleton.parameters(),
        step=trace(config.batch_size),
        largest=trace(fit.batch) if fit is not None and fit.batch else None,
        smallest=trace(1) if fit is not None and not fit.batch else None,
        fit=fit,
        devices=devices,
        cache=cache_bytes(skeleton, batch=1, length=shape.length),
        ceilings=ceilings,
    )


def _shape(skeleton: Skeleton, config: TrainConfig, devices: Devices, labelled: float) -> StepShape:
    vocabulary = skeleton.model.config.get_text_config().vocab_size
    return StepShape(
        batch=config.batch_size,
        length=within_positions(config.max_length, skeleton.model.config),
        labelled=labelled,
        accumulates=config.gradient_accumulation > 1,
        chunk_rows=usual_rows(vocabulary, "cpu" if devices.kind == "cpu" else "cuda"),
    )

"""Which batch fits, how a training is spread, and the ceilings of its speed."""

import pytest
import torch

from models import tiny_base
from shadowpeft import ShadowConfig
from shadowpeft.errors import ConfigError
from shadowpeft.train.config import TrainConfig
from shadowpeft.train.plan import (
    Ceilings,
    Devices,
    StepShape,
    build_skeleton,
    choose,
    measured_ceilings,
    plan_training,
    trace_step,
)
from shadowpeft.train.plan.fit import MOST_ROWS, largest_batch
from shadowpeft.train.plan.units import parse_bytes, parse_rate, readable

SHADOW = ShadowConfig(r=4, update_hidden_size=4, shadow_intermediate_size=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    tiny_base("qwen3", dtype=torch.float32, hidden_size=64, vocab_size=600).config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def skeleton(folder):
    return build_skeleton(folder, SHADOW)


def planned(folder, devices, **settings):
    return plan_training(folder, TrainConfig(max_length=32, batch_size=2, shadow=SHADOW, **settings), devices)


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 64, 1000, MOST_ROWS, MOST_ROWS + 5])
@pytest.mark.parametrize("guess", [1, 3, 60, 999, 10**9])
def test_the_largest_batch_is_found_from_any_guess(most, guess):
    tried = []

    def fits(rows):
        tried.append(rows)
        return rows <= most

    assert largest_batch(fits, guess) == min(most, MOST_ROWS)
    assert len(tried) < 40


def test_the_batch_fits_and_one_row_more_does_not(folder, skeleton):
    memory = 30_000_000
    found = planned(folder, Devices(memory=memory, margin=0.1))
    rows = found.fit.batch
    usable = int(0.9 * memory)
    chunk = found.step.shape.chunk_rows
    one, more = (trace_step(skeleton, StepShape(batch=n, length=32, chunk_rows=chunk)).peak for n in (rows, rows + 1))
    assert rows > 10
    assert one <= usable < more
    assert found.largest.peak == one


def test_a_base_that_fits_on_one_device_is_copied_and_a_larger_one_is_sharded(folder, skeleton):
    step = trace_step(skeleton, StepShape(batch=1, length=32))
    enough = planned(folder, Devices(count=4, memory=step.peak * 2, margin=0.0))
    assert enough.fit.layout.kind == "ddp"
    assert enough.fit.layout.per_process(step) == step.peak + step.gradients
    short = planned(folder, Devices(count=4, memory=int(step.peak * 0.95), margin=0.0))
    assert short.fit.layout.kind == "sharded"
    assert short.fit.layout.per_process(step) < step.peak
    assert short.fit.batch >= 1


def test_more_processes_hold_less_each_and_what_is_gathered_stays(skeleton):
    step = trace_step(skeleton, StepShape(batch=1, length=32))
    blocks = skeleton.block_bytes()
    assert len(blocks) == 5, "four of the base and one of the shadow"
    sizes = []
    for processes in (2, 8, 1000):
        fit, layouts = choose(lambda _: step, processes=processes, memory=1, block_bytes=blocks)
        assert [layout.kind for layout in layouts] == ["ddp", "sharded"]
        assert fit.batch == 0
        sizes.append(fit.layout.per_process(step))
    assert sizes == sorted(sizes, reverse=True)
    weights = step.base + step.adapter
    assert sizes[-1] > step.kept + (weights - sum(blocks)) + max(blocks)


def test_a_device_too_small_for_a_row_says_what_one_takes(folder):
    found = planned(folder, Devices(memory=10**6))
    assert found.fit.batch == 0
    assert found.to_dict()["fit"]["bytes_a_process"] == found.smallest.peak > 10**6


def test_a_gpu_has_more_logits_in_memory(folder):
    settings = {"shadow": SHADOW, "batch_size": 64, "max_length": 64}
    chunks = [
        plan_training(folder, TrainConfig(**settings), Devices(kind=kind)).step.loss_chunk for kind in ("cpu", "gpu")
    ]
    # 2,048 rows of logits against 1,024, beside what does not depend on them.
    assert 1.5 * chunks[0] < chunks[1] < 2 * chunks[0]


def test_the_longest_row_is_what_the_base_has_positions_for(folder):
    found = plan_training(folder, TrainConfig(max_length=4096, batch_size=1, shadow=SHADOW), Devices())
    assert found.step.shape.length == 64


def test_the_time_of_a_step_is_the_sum_of_its_operations_at_the_slower_ceiling(skeleton):
    step = trace_step(skeleton, StepShape(batch=1, length=32))
    computing = Ceilings(flops=1e6, bandwidth=None, source="given")
    assert computing.step_seconds(step) == step.flops / 1e6
    fast_memory = Ceilings(flops=1e6, bandwidth=1e30, source="given")
    assert fast_memory.step_seconds(step) == pytest.approx(step.flops / 1e6)
    slow_memory = Ceilings(flops=1e30, bandwidth=1e6, source="given")
    assert slow_memory.step_seconds(step) == pytest.approx(sum(moved for _, moved in step.operations) / 1e6)


def test_speed_grows_with_the_devices_and_is_called_an_estimate(folder):
    ceilings = Ceilings(flops=1e12, bandwidth=1e11, source="given")
    config = TrainConfig(max_length=32, batch_size=2, shadow=SHADOW)
    one, four = (
        plan_training(folder, config, Devices(count=n, memory=10**9), ceilings=ceilings).speed() for n in (1, 4)
    )
    name = "training_tokens_per_second_at_most"
    assert one["is_estimate"]
    assert four[name] == pytest.approx(4 * one[name], rel=0.05)
    assert four["generated_tokens_per_second_at_most"] == pytest.approx(4 * one["generated_tokens_per_second_at_most"])


def test_ceilings_are_measured_here():
    found = measured_ceilings(torch.float32, size=64, device="cpu")
    assert found.source == "measured here"
    assert found.flops > 1e6 and found.bandwidth > 1e6


@pytest.mark.parametrize(
    ("text", "size"), [("80GB", 80 * 10**9), ("80gib", 80 * 2**30), (" 23.5 GiB ", 25232932864), ("512 MB", 512 * 10**6)]
)
def test_sizes_are_read(text, size):
    assert parse_bytes(text, "memory") == size


@pytest.mark.parametrize("text", ["80", "GB", "", "-1GB", "0GB", "80G B", "80XB", "1e9GB", "80 iB", "lots"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="expected a size above 0 with its unit"):
        parse_bytes(text, "memory")


def test_rates_are_read_and_sizes_written():
    assert [parse_rate(text, "flops") for text in ("312T", "1.5P", "2000", "3TB/s")] == [
        *(312e12, 1.5e15, 2000.0, 3e12)
    ]
    assert [readable(size) for size in (7, 1234, 80 * 10**9, 999_999)] == ["7 B", "1.23 KB", "80.0 GB", "1000 KB"]
    with pytest.raises(ConfigError, match="flops='fast' is not valid"):
        parse_rate("fast", "flops")

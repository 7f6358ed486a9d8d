"""Whether freed memory really stays with the process, seen from the page faults of a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

# 16 blocks of 8 MiB, made and freed together, five times: what one training step does.
STEPS = """
import resource, sys, torch
from shadowpeft.train.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    return [torch.zeros(2**21) for _ in range(16)]
for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    # Every large block is mapped by itself, which glibc as it comes does or does not, by what happened before.
    given = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True, env=given)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_steps_after_the_first_hardly_touch_fresh_pages():
    # Not none: the first steps may leave a part of the heap untouched. As glibc comes, most pages of each step are fresh.
    assert 10 * faults("keep") < faults("default")

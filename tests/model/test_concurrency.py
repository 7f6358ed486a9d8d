"""Many threads on one model. ``SHADOWPEFT_CONCURRENCY=full`` does 8 x 500 calls and 5,000 for memory; the suite a few."""

import gc
import os
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import shadowpeft.generate  # noqa: F401 (registers speculative decoding)
from models import randomise, tiny_base, tiny_config, tokens
from shadowpeft import get_shadow_model

FULL = os.environ.get("SHADOWPEFT_CONCURRENCY") == "full"
NUM_THREADS = 8
CALLS_A_THREAD = 500 if FULL else 15
CALLS_FOR_MEMORY = 5000 if FULL else 200


@pytest.fixture(scope="module")
def model():
    """Three adapters, one of another width, on one base in float64, where batching changes no digit that is compared."""
    model = get_shadow_model(tiny_base(num_hidden_layers=3), tiny_config())
    model.add_adapter("second", tiny_config(r=2))
    model.add_adapter("narrow", tiny_config(shadow_hidden_size=16))
    for seed, name in enumerate(model.networks):
        randomise(model.network(name), seed=seed)
    return model


# Every way of calling, by a name; each takes (model, adapter, ids) and returns a tensor.
def forward(model, adapter, ids):
    return model(ids, adapter=adapter).logits


def disabled(model, adapter, ids):
    with model.disable_adapter():
        return model(ids).logits


def chosen_by_block(model, adapter, ids):
    with model.using_adapter(adapter):
        return model(ids, labels=ids).loss


def padded(model, adapter, ids):
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return model(ids, attention_mask=mask, adapter=adapter).logits


def chunked(model, adapter, ids):
    cache = model(ids[:, :3], use_cache=True, adapter=adapter).past_key_values
    return model(ids[:, 3:], past_key_values=cache, use_cache=True, adapter=adapter).logits


def greedy(model, adapter, ids):
    return model.generate(ids, max_new_tokens=4, do_sample=False, adapter=adapter)


def beams(model, adapter, ids):
    return model.generate(ids, max_new_tokens=3, do_sample=False, num_beams=2, adapter=adapter)


def drafted(model, adapter, ids):
    with model.using_adapter(adapter):
        return model.generate(ids[:1], max_new_tokens=4, do_sample=False, speculative=2)


def detached(model, adapter, ids):
    return model.detach(adapter)(ids).logits


WAYS = (forward, greedy, disabled, chunked, chosen_by_block, beams, padded, drafted, forward, detached)
ADAPTERS = ("default", "second", "narrow")


def job(number):
    """(way, adapter, ids [B, T]) of call ``number``; B from 1 to 3, T from 5 to 11."""
    return WAYS[number % len(WAYS)], ADAPTERS[number % 3], tokens(1 + number % 3, 5 + number % 7, seed=number % 11)


def answer(model, number):
    way, adapter, ids = job(number)
    with torch.no_grad():  # gradients are switched thread by thread
        return way(model, adapter, ids)


def test_eight_threads_give_what_one_gives(model):
    numbers = range(NUM_THREADS * CALLS_A_THREAD)
    period = len(WAYS) * 3 * 7 * 11  # call numbers further apart are equal
    expected = {number: answer(model, number) for number in {number % period for number in numbers}}
    together = threading.Barrier(NUM_THREADS)

    def work(thread):
        together.wait()
        return [(number, answer(model, number)) for number in numbers[thread::NUM_THREADS]]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = [pair for pairs in pool.map(work, range(NUM_THREADS)) for pair in pairs]
    wrong = [number for number, value in found if not torch.equal(value, expected[number % period])]
    assert wrong == []
    assert len(found) == NUM_THREADS * CALLS_A_THREAD


class Births(TorchDispatchMode):
    """Weak references to every tensor that any operation returns while it is on."""

    def __init__(self):
        super().__init__()
        self.born = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else [result]
        self.born += [weakref.ref(value) for value in results if isinstance(value, torch.Tensor)]
        return result


@pytest.mark.parametrize("way", sorted(set(WAYS), key=lambda way: way.__name__))
def test_no_tensor_outlives_its_call(model, way):
    """With the cycle collector off, so that not even a cycle keeps one until later; the answer itself is let go too."""
    answer(model, WAYS.index(way))  # what is made once, such as a table of rotations, is made before
    births = Births()
    gc.collect()
    gc.disable()
    try:
        with births, torch.no_grad():
            way(model, "second", tokens())
        alive = [reference() for reference in births.born if reference() is not None]
        lasting = {id(value) for value in (*model.parameters(), *model.buffers())}
        assert len(births.born) > 50
        assert [tuple(value.shape) for value in alive if id(value) not in lasting] == []
    finally:
        gc.enable()


def test_memory_is_flat_over_many_calls(model):
    """No more tensors alive after the second half of the calls than after the first; the process grows by no page of note."""
    counts, sizes = [], []
    for half in range(2):
        for number in range(half * CALLS_FOR_MEMORY // 2, (half + 1) * CALLS_FOR_MEMORY // 2):
            answer(model, number)
        gc.collect()
        counts.append(sum(issubclass(type(value), torch.Tensor) for value in gc.get_objects()))
        sizes.append(resident_megabytes())
    print(f"{CALLS_FOR_MEMORY} calls: {counts} tensors alive, {sizes} MB resident")
    assert counts[1] == counts[0]
    if None not in sizes:
        # One kept state of [3, 11, 32] in float64 a call would be 8 kB: 21 MB over 2,500 calls. Arenas of malloc move by less.
        assert sizes[1] - sizes[0] < 8


def resident_megabytes():
    """Resident set of this process; None where the system does not tell."""
    path = "/proc/self/statm"
    if not os.path.exists(path):
        return None
    with open(path) as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

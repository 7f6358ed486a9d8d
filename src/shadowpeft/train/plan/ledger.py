"""What the operations of a piece of code allocate, compute and move, without running them."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


@dataclass(kw_only=True)
class Phase:
    """One stretch of a traced step.

    Attributes:
        start, end, peak: bytes of all live tensors before and after it, and the most there were at once.
        operations: (floating point operations, bytes read and written) of each operation that is not a view.
    """

    start: int
    end: int = 0
    peak: int = 0
    operations: list[tuple[int, int]] = field(default_factory=list)


class Ledger(TorchDispatchMode):
    """Counts every storage that is made while it is in effect, until the storage is freed.

    What a kernel uses inside itself (scratch of a matrix product, say) is not seen.

    Args:
        num_labels: what ``nonzero`` finds, which no trace can know: rows with a label.
    """

    def __init__(self, *, num_labels: int) -> None:
        super().__init__()
        self.live = 0
        self.phases: dict[str, Phase] = {}
        self._num_labels = num_labels
        self._phase = Phase(start=0)
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.nonzero.default:
            out = torch.empty(self._num_labels, args[0].dim(), dtype=torch.int64, device=args[0].device)
        else:
            out = func(*args, **kwargs)
        made = False
        for tensor in _tensors(out):
            made |= self.add(tensor)
        if made or func._schema.is_mutable:
            flops = _flops(func, args, kwargs, out)
            moved = sum(t.numel() * t.element_size() for t in _tensors((args, kwargs, out)))
            self._phase.operations.append((flops, moved))
        return out

    def add(self, tensor: Tensor) -> bool:
        """Counts a tensor's storage, if it is not counted yet."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return False
        self._known.add(key)
        self.live += size
        self._phase.peak = max(self._phase.peak, self.live)
        weakref.finalize(storage, self._freed, key, size).atexit = False
        return True

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        self._phase = Phase(start=self.live, peak=self.live)
        self.phases[name] = self._phase
        yield self._phase
        self._phase.end = self.live


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _flops(func: Any, args: tuple, kwargs: dict[str, Any], out: Any) -> int:
    formula = _FORMULAS.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return flop_counter.sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# torch's own table lacks the attention of a CPU. Masked halves are counted as computed.
_FORMULAS: dict[Any, Callable[..., Any]] = {
    **flop_counter.flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}

"""A forward pass whose graph keeps no tensor that one cheap element-wise expression gives back.

A frozen block keeps, per token, ``gate``, ``silu(gate)`` and ``up`` of its MLP and the queries and keys both in front
of their norm and behind rotation, although the second of each follows from the first. Within :func:`lean_graph`, such
a tensor is replaced by the expression that made it, over tensors that are kept anyway; backward evaluates it again,
bit for bit. It works on any model: nothing is known of its modules, only of torch's element-wise functions.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Element-wise or smaller, deterministic, and much cheaper than the products between them.
_CHEAP: frozenset[Callable] = frozenset(
    [
        *(F.silu, F.gelu, F.relu, torch.tanh, torch.sigmoid, torch.rsqrt),
        *(torch.neg, torch.cat, torch.square, torch.pow),
        *(torch.mul, torch.add, torch.sub, torch.div),
        *(Tensor.mul, Tensor.add, Tensor.sub, Tensor.div, Tensor.neg, Tensor.pow, Tensor.tanh, Tensor.square),
        *(Tensor.__mul__, Tensor.__rmul__, Tensor.__add__, Tensor.__radd__, Tensor.__sub__, Tensor.__rsub__),
        *(Tensor.__neg__, Tensor.__truediv__, Tensor.__pow__, Tensor.rsqrt, Tensor.sigmoid),
        *(Tensor.to, Tensor.float, Tensor.contiguous, Tensor.clone),
    ]
)
_CASTS = frozenset([Tensor.to, Tensor.float])
# What holds its numbers in one storage and nothing else; fake tensors stand for such where a step is only planned.
PLAIN = (Tensor, nn.Parameter, FakeTensor)
# The hooks in effect. Absent before torch 2.7, where hooks further out could not be told of what is kept.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # type: ignore[attr-defined]
# Smaller tensors are kept as they are.
_FEWEST_BYTES = 2**12


class _View(NamedTuple):
    """A tensor as a window on a storage, without holding either."""

    key: int
    version: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "_View":
        key = tensor.untyped_storage()._cdata
        return cls(key, tensor._version, tensor.shape, tensor.stride(), int(tensor.storage_offset()), tensor.dtype)


@dataclass(frozen=True, slots=True)
class _Origin:
    """How the whole of a storage came about.

    ``storages``: its own and its arguments', held weakly: their memory may go, but not their names to others.
    ``narrow``: for a widening cast, what was cast, which is worth keeping in its place.
    """

    storages: tuple[StorageWeakRef, ...]
    version: int
    function: Callable
    arguments: tuple
    options: dict[str, Any]
    narrow: Tensor | None


class _Kept:
    """A tensor that stays, in the form that hooks further out made of it."""

    __slots__ = ("_packed", "_unpack", "dtype", "storage", "version")

    def __init__(self, tensor: Tensor, outer: tuple[Callable, Callable] | None) -> None:
        self.storage, self.version = StorageWeakRef(tensor.untyped_storage()), tensor._version
        self.dtype = tensor.dtype
        self._unpack = None if outer is None else outer[1]
        self._packed = tensor if outer is None else outer[0](tensor)

    def tensor(self) -> Tensor:
        return self._packed if self._unpack is None else self._unpack(self._packed)


@dataclass(frozen=True, slots=True)
class _Expression:
    """What to evaluate in place of a tensor that was not kept: ``function`` over kept tensors and expressions."""

    function: Callable
    arguments: tuple
    options: dict[str, Any]

    def value(self, known: dict[int, Tensor]) -> Tensor:
        if id(self) not in known:
            arguments = [_evaluate(argument, known) for argument in self.arguments]
            known[id(self)] = self.function(*arguments, **self.options)
        return known[id(self)]


@dataclass(frozen=True, slots=True)
class _Window:
    """One view of a kept tensor's, or an expression's, whole storage."""

    source: "_Kept | _Expression"
    view: _View

    def value(self, known: dict[int, Tensor]) -> Tensor:
        whole = self.source.tensor() if isinstance(self.source, _Kept) else self.source.value(known)
        if (whole.shape, whole.stride(), whole.storage_offset()) == self.view[2:5]:
            return whole
        return whole.as_strided(self.view.size, self.view.stride, self.view.offset)


def _evaluate(argument: Any, known: dict[int, Tensor]) -> Any:
    if isinstance(argument, _Window):
        return argument.value(known)
    if isinstance(argument, list):
        return [_evaluate(item, known) for item in argument]
    return argument


class _Recorder(TorchFunctionMode):
    """Notes, for the time of one forward pass, how cheap results came about and what is kept.

    Not within hooks further in, as a checkpointed block has them: nothing is packed here of what they see, and noting
    it would hold the narrow sources of its casts, which checkpointing is to free.
    """

    def __init__(self, outer: tuple[Callable, Callable] | None) -> None:
        super().__init__()
        self._outer = outer
        self._origins: dict[int, _Origin] = {}
        self._kept: dict[int, _Kept] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if func in _CHEAP and isinstance(result, Tensor) and result.requires_grad and self._is_innermost():
            self._note(result, func, args, kwargs or {})
        return result

    def _is_innermost(self) -> bool:
        assert _top_hooks is not None
        hooks = _top_hooks(False)
        return hooks is not None and hooks[0] == self.pack

    def _note(self, result: Tensor, func: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        storage = result.untyped_storage()
        if storage.nbytes() < _FEWEST_BYTES or any(isinstance(value, Tensor) for value in kwargs.values()):
            return
        arguments = tuple(_handle(argument) for argument in args)
        if any(isinstance(a, _View) and a.key == storage._cdata for a in arguments):
            return  # the argument itself, or a view of it
        widens = func in _CASTS and result.element_size() > args[0].element_size()
        narrow = args[0].detach() if widens else None
        storages = tuple(StorageWeakRef(t.untyped_storage()) for t in (result, *_tensors(args)) if t.requires_grad)
        self._origins[storage._cdata] = _Origin(storages, result._version, func, arguments, kwargs, narrow)

    def pack(self, tensor: Tensor) -> "_Window | _Kept":
        if type(tensor) not in PLAIN or tensor.layout != torch.strided:
            return _Kept(tensor, self._outer)
        view = _View.of(tensor)
        if tensor.untyped_storage().nbytes() >= _FEWEST_BYTES:
            found = self._expressed(view)
            if found is not None:
                return found
        return self._keep(tensor, view)

    def _expressed(self, view: _View) -> "_Window | None":
        """``view`` by way of what is kept already, or of the narrower tensor it was cast from."""
        found, origin = self._window(view, {}), self._origins.get(view.key)
        if found is not None:
            return found
        if origin is None or origin.narrow is None or origin.version != view.version:
            return None
        self._keep(origin.narrow, _View.of(origin.narrow))
        return self._window(view, {})

    def _keep(self, tensor: Tensor, view: _View) -> _Window:
        # The alias spans all of the storage, so that any other view of it can be taken from it.
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        whole = tensor.detach() if tensor.numel() == size and tensor.is_contiguous() else tensor.as_strided((size,), (1,), 0)
        kept = self._kept[view.key] = _Kept(whole, self._outer)
        return _Window(kept, view)

    def _window(self, view: _View, made: dict[int, "_Expression"]) -> "_Window | None":
        """None where an expression reaches a tensor that is not kept."""
        kept = self._kept.get(view.key)
        if kept is not None and kept.version == view.version and kept.dtype == view.dtype:
            return _Window(kept, view)
        origin = self._origins.get(view.key)
        if origin is None or origin.version != view.version:
            return None
        if view.key not in made:
            arguments = self._resolved(origin.arguments, made)
            if arguments is None:
                return None
            made[view.key] = _Expression(origin.function, tuple(arguments), origin.options)
        return _Window(made[view.key], view)

    def _resolved(self, arguments: Any, made: dict[int, "_Expression"]) -> list | None:
        """The arguments of an origin by way of what is kept; None where one of them cannot be had."""
        found = []
        for argument in arguments:
            if isinstance(argument, _View):
                resolved = self._window(argument, made)
            elif isinstance(argument, list):
                resolved = self._resolved(argument, made)
            else:
                found.append(argument)
                continue
            if resolved is None:
                return None
            found.append(resolved)
        return found

    def clear(self) -> None:
        self._origins.clear()
        self._kept.clear()


def _tensors(arguments: Any) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from _tensors(argument)


def _handle(argument: Any) -> Any:
    """What an origin notes of an argument: constants as they are, tensors with a gradient without holding them."""
    if isinstance(argument, Tensor):
        return _View.of(argument) if argument.requires_grad else argument
    return [_handle(item) for item in argument] if isinstance(argument, list | tuple) else argument


def _unpack(window: "_Window | _Kept") -> Tensor:
    if isinstance(window, _Kept):
        return window.tensor()
    if not torch.is_grad_enabled():  # as in any backward pass but one that is differentiated again
        return window.value({})
    with torch.no_grad():
        return window.value({})


@contextmanager
def lean_graph() -> Iterator[None]:
    """Within the block, autograd keeps expressions in place of tensors that follow from others it keeps.

    Hooks for saved tensors that are already in effect (offloading, counting) still see every tensor that is kept.
    Does nothing without gradients, inside torch.compile, which makes such choices itself, and before torch 2.7.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _top_hooks is None:
        yield
        return
    recorder = _Recorder(_top_hooks(False))
    try:
        with recorder, torch.autograd.graph.saved_tensors_hooks(recorder.pack, _unpack):
            yield
    finally:
        recorder.clear()

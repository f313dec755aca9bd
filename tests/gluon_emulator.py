"""Runs Gluon and Triton kernels' own Python on the CPU: what they compute and how they wait.

Gluon has no interpreter. Here a kernel's function is given other globals, in which ``gl`` and its
neighbours are made of torch, and each partition of ``warp_specialize`` is a thread. One thread runs
at a time; at every operation on a barrier, on shared memory or on the tensor cores a seeded draw
decides who goes on, and when copies and matrix products that are under way happen. So a run is
reproducible, nothing is timed, and a deadlock is when nobody can go on.

Caught are deadlocks, too many arrivals, shared memory that is overwritten too early or read too
late (a copy under way leaves NaN), results used before they are waited for, and stores that the
tensor cores may not see for want of a fence. Not seen are layouts, alignment, and anything slow.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from triton.experimental.gluon import language as gluon_language
from triton.runtime.jit import JITFunction

from gluon_machine import Barrier, Barriers, Boxes, Machine, ProtocolError, Shared, hopper


@dataclass(frozen=True)
class Pointer:
    """A pointer to numbers of a tensor, or many."""

    numbers: torch.Tensor
    offset: Any = 0

    @classmethod
    def to(cls, tensor: torch.Tensor) -> Pointer:
        size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
        return cls(tensor.as_strided((size,), (1,)))

    @property
    def dtype(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(element_ty=self.numbers.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.numbers, self.offset + offset)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        offset, mask = torch.broadcast_tensors(
            torch.as_tensor(self.offset).long(), torch.as_tensor(True if mask is None else mask)
        )
        inside = (offset >= 0) & (offset < len(self.numbers))
        if not inside[mask].all():
            raise ProtocolError("a pointer leaves its tensor")
        return offset, mask


class Language:
    """``gl`` and ``tl``, on one machine, for one program of a grid."""

    def __init__(self, machine: Machine, program: tuple[int, ...], grid: tuple[int, ...]) -> None:
        self.machine, self.program, self.grid = machine, program, grid
        self.int32, self.int64, self.float32 = torch.int32, torch.int64, torch.float32
        self.exp2, self.static_range = torch.exp2, range
        self.warp_specialize = machine.run

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *_: None
        raise AttributeError(name)

    def program_id(self, axis: int) -> torch.Tensor:
        return torch.tensor(self.program[axis], dtype=torch.int32)

    def num_programs(self, axis: int) -> int:
        return self.grid[axis]

    def arange(self, start: int, stop: int, layout: object = None) -> torch.Tensor:
        return torch.arange(start, stop, dtype=torch.int32)

    def full(self, shape: list, value: float, dtype: Any, layout: object = None) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype)

    def zeros(self, shape: list, dtype: Any, layout: object = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def to_tensor(self, value: Any) -> torch.Tensor:
        return torch.as_tensor(value)

    def convert_layout(self, value: torch.Tensor, layout: object) -> torch.Tensor:
        return value

    def inline_asm_elementwise(self, asm: str, *rest: Any, **options: Any) -> Any:
        return rest[1][0]

    def where(self, condition: Any, a: Any, b: Any) -> torch.Tensor:
        return torch.where(torch.as_tensor(condition), a, b)

    def minimum(self, a: Any, b: Any) -> torch.Tensor:
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

    def maximum(self, a: Any, b: Any) -> torch.Tensor:
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))

    def cdiv(self, a: Any, b: Any) -> Any:
        return (a + b - 1) // b

    def log2(self, value: Any) -> torch.Tensor:
        return torch.log2(torch.as_tensor(value))

    def max(self, value: torch.Tensor, axis: int) -> torch.Tensor:
        return value.amax(axis)

    def sum(self, value: torch.Tensor, axis: int | None = None) -> torch.Tensor:
        return value.sum(axis, dtype=value.dtype)

    def cumsum(self, value: torch.Tensor, axis: int) -> torch.Tensor:
        return value.cumsum(axis, dtype=value.dtype)

    def load(self, pointer: Pointer, mask: Any = None, other: float = 0) -> torch.Tensor:
        offset, mask = pointer.places(mask)
        value = torch.full(offset.shape, other, dtype=pointer.numbers.dtype)
        value[mask] = pointer.numbers[offset[mask]]
        return value

    def store(self, pointer: Pointer, value: Any, mask: Any = None) -> None:
        offset, mask = pointer.places(mask)
        value = torch.as_tensor(value).to(pointer.numbers.dtype).broadcast_to(offset.shape)
        pointer.numbers[offset[mask]] = value[mask]

    def allocate_shared_memory(self, dtype: Any, shape: list, layout: object) -> Any:
        if layout == "barrier":
            return Barriers([Barrier(self.machine) for _ in range(shape[0])])
        return Shared(self.machine, torch.full(shape, torch.nan, dtype=dtype))


class Emulated:
    """Stands in for a kernel: ``Emulated(kernel)[grid](*arguments, **options)``.

    Args:
        kernel: a ``gluon.jit`` or ``triton.jit`` function.
        seed: of the order in which things happen.
        edited: by function name, code to run in place of the function's; see ``without``.
    """

    def __init__(
        self, kernel: JITFunction, seed: int = 0, edited: dict[str, types.CodeType] | None = None
    ) -> None:
        self.kernel, self.seed, self.edited = kernel, seed, edited or {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            names = [parameter.name for parameter in self.kernel.params]
            known = {name: value for name, value in options.items() if name in names}
            values = [_argument(value) for value in arguments]
            for program in _programs(grid):
                machine = Machine((self.seed, program))
                language = Language(machine, program, grid)
                self.bind(machine, language)(*values, **known)
                if machine.under_way:
                    raise ProtocolError("a copy or a product that nobody waits for")

        return launch

    def bind(self, machine: Machine, language: Language) -> Callable:
        """The kernel as a Python function whose globals are the machine's."""
        replaced = {
            **hopper(machine),
            "gl": language,
            "tl": language,
            "range": lambda *of: map(torch.tensor, range(*map(int, of))),
        }
        modules: dict[str, dict[str, Any]] = {}

        def bound(function: types.FunctionType) -> Callable:
            code = self.edited.get(function.__name__, function.__code__)
            return types.FunctionType(code, module(function), function.__name__)

        def module(function: types.FunctionType) -> dict[str, Any]:
            if function.__module__ not in modules:
                names = modules[function.__module__] = dict(function.__globals__)
                for name, value in function.__globals__.items():
                    if isinstance(value, JITFunction):
                        names[name] = bound(value.fn)
                    elif isinstance(value, gluon_language.constexpr):
                        names[name] = value.value
                names.update(replaced)
            return modules[function.__module__]

        return bound(self.kernel.fn)


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer.to(value)
    if hasattr(value, "block_shape"):
        return Boxes(value.base, tuple(value.block_shape))
    return value


def _programs(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    indices = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid))
    return [tuple(index) for index in indices.tolist()]


WAITING = ("mbarrier.wait", "mbarrier.arrive", "fence_async_shared", "warpgroup_mma_wait")


def rules(function: JITFunction) -> list[str]:
    """The calls by which a function waits, arrives or fences."""
    return [ast.unparse(call) for call in _rules(_tree(function))]


def without(function: JITFunction, number: int) -> dict[str, types.CodeType]:
    """A function without one of its ``rules``, as ``Emulated`` takes it.

    A wait for matrix products waits for one product less.
    """
    tree = ast.Module([_tree(function)], [])
    call = _rules(tree)[number]
    if ast.unparse(call.func) == "warpgroup_mma_wait":
        call.args[0] = ast.BinOp(call.args[0], ast.Add(), ast.Constant(1))
    else:
        call.func, call.args, call.keywords = ast.Name("dict", ast.Load()), [], []
    module = compile(ast.fix_missing_locations(tree), "edited", "exec", dont_inherit=True)
    (code,) = (part for part in module.co_consts if isinstance(part, types.CodeType))
    return {function.fn.__name__: code}


def _tree(function: JITFunction) -> ast.FunctionDef:
    """A function without decorators and annotations."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(function.fn))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    for argument in definition.args.args:
        argument.annotation = None
    return definition


def _rules(tree: ast.AST) -> list[ast.Call]:
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [call for call in calls if ast.unparse(call.func) in WAITING]

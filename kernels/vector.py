"""A small language for a CPU's kernels: vectors with one number for each image of a tile, in LLVM's instructions.

A kernel is a Python function that is called once, with a `Code`, and writes its instructions down; `kernels.native`
compiles them. Arithmetic on `Value`s is IEEE's, instruction by instruction, in the order written: nothing is reordered,
and a product and a sum become one rounding only where `fma` says so. So results are the same bits on every machine.

    def scaled(code, x, y, count):                  y[k] = 2 · x[k] + 1, for vectors k < count
        with code.loop(count) as k:
            code.store(code.fma(code.load(x, k), code.number(2), code.number(1)), y, k)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from llvmlite import ir

I64, POINTER, BOOL = ir.IntType(64), ir.PointerType(), ir.IntType(1)


class Value:
    """What an instruction gives: an integer, a pointer, a number or a vector of numbers, with their operators."""

    def __init__(self, code: Code, instruction: ir.Value):
        self.code, self.ir = code, instruction

    @property
    def is_integer(self) -> bool:
        """Whether it is an integer, or a vector of them."""
        return isinstance(getattr(self.ir.type, "element", self.ir.type), ir.IntType)

    def binary(self, other: Value | float, of_integers: str, of_numbers: str, turned: bool = False) -> Value:
        other = other if isinstance(other, Value) else self.code.like(other, self)
        a, b = (other, self) if turned else (self, other)
        return Value(self.code, getattr(self.code.at, of_integers if self.is_integer else of_numbers)(a.ir, b.ir))

    def __add__(self, other):
        return self.binary(other, "add", "fadd")

    def __radd__(self, other):
        return self.binary(other, "add", "fadd", turned=True)

    def __sub__(self, other):
        return self.binary(other, "sub", "fsub")

    def __rsub__(self, other):
        return self.binary(other, "sub", "fsub", turned=True)

    def __mul__(self, other):
        return self.binary(other, "mul", "fmul")

    def __rmul__(self, other):
        return self.binary(other, "mul", "fmul", turned=True)

    def __truediv__(self, other):
        return self.binary(other, "udiv", "fdiv")

    def __rtruediv__(self, other):
        return self.binary(other, "udiv", "fdiv", turned=True)

    def __mod__(self, other):
        return self.binary(other, "urem", "frem")

    def compare(self, other: Value | float, how: str) -> Value:
        other = other if isinstance(other, Value) else self.code.like(other, self)
        of = "icmp_signed" if self.is_integer else "fcmp_ordered"
        return Value(self.code, getattr(self.code.at, of)(how, self.ir, other.ir))

    def __lt__(self, other):
        return self.compare(other, "<")

    def __le__(self, other):
        return self.compare(other, "<=")

    def __gt__(self, other):
        return self.compare(other, ">")

    def __ge__(self, other):
        return self.compare(other, ">=")

    def equals(self, other: Value | float) -> Value:
        return self.compare(other, "==")

    def __and__(self, other):
        """Of bits, or of conditions."""
        return Value(self.code, self.code.at.and_(self.ir, other.ir))

    def __or__(self, other):
        return Value(self.code, self.code.at.or_(self.ir, other.ir))

    def __xor__(self, other):
        return Value(self.code, self.code.at.xor(self.ir, other.ir))


class Variable:
    """A value that changes: `get()` and `set(value)`."""

    def __init__(self, code: Code, start: Value):
        self.code = code
        with code.at.goto_entry_block():  # LLVM keeps those in registers
            self.place = code.at.alloca(start.ir.type)
        self.set(start)

    def get(self) -> Value:
        return Value(self.code, self.code.at.load(self.place, typ=self.place.allocated_type))

    def set(self, value: Value) -> None:
        self.code.at.store(value.ir, self.place)


class Code:
    """Where a kernel writes its instructions.

    Args:
        lanes: numbers of a vector: images of a tile.
        double: whether numbers are float64, else float32.
        registers: that a vector takes.
        many: whether the CPU has 32 of them, else 16.

    Several functions make a module; `function` begins one.
    """

    def __init__(self, lanes: int, double: bool = False, registers: int = 1, many: bool = False):
        self.module, self.lanes, self.double = ir.Module("kernels"), lanes, double
        self.registers, self.many = registers, many
        self.float = ir.DoubleType() if double else ir.FloatType()
        self.vector = self.unit = ir.VectorType(self.float, lanes)
        self.bits = ir.VectorType(I64 if double else ir.IntType(32), lanes)
        self.constants = {}  # of vectors, each written down once
        self.at: ir.IRBuilder

    # ------------------------------------------------------------------------------------------------ functions

    def function(self, body: Callable, arguments: str, vectors: bool = False, name: str = "") -> Callable:
        """Write a function, `body(code, *arguments)`, and return what writes a call of it.

        Args:
            arguments: for each a letter: "i" an integer, "p" a pointer, "v" a vector.
            vectors: whether it returns a vector; else nothing.
            name: for those that are called from outside; the others are the module's own.
        """
        types = {"i": I64, "p": POINTER, "v": self.vector}
        signature = ir.FunctionType(self.vector if vectors else ir.VoidType(), [types[letter] for letter in arguments])
        made = ir.Function(self.module, signature, name or self.module.get_unique_name(body.__name__))
        if not name:
            made.linkage = "internal"
        before = getattr(self, "at", None)
        self.at = ir.IRBuilder(made.append_basic_block("entry"))
        result = body(self, *(Value(self, x) for x in made.args))
        self.at.ret(result.ir) if vectors else self.at.ret_void()
        self.at = before
        return lambda *values: Value(self, self.at.call(made, [value.ir for value in values]))

    def job(self, body: Callable, arguments: str, name: str) -> None:
        """Write a function that reads its arguments, "i" and "p", from memory, as integers side by side.

        All it is called with is a pointer to the first one. `native.in_parallel` calls such functions.
        """

        def read(code: Code, at: Value) -> None:
            values = [code.load_integer(at, k) for k in range(len(arguments))]
            body(code, *(code.pointer(x) if of == "p" else x for x, of in zip(values, arguments, strict=True)))

        self.function(read, "p", name=name)

    def intrinsic(self, name: str, count: int) -> ir.Function:
        """One of LLVM's functions of vectors, with `count` arguments."""
        full = f"llvm.{name}.v{self.lanes}f{64 if self.double else 32}"
        if full in self.module.globals:
            return self.module.globals[full]
        return ir.Function(self.module, ir.FunctionType(self.vector, [self.vector] * count), full)

    def wider(self, times: int) -> Code:
        """The same place to write, with vectors that many times as wide; in memory they are still counted as before.

        An instruction becomes one for each register. A CPU sees only so many instructions ahead, and so finds several
        that do not wait for each other.
        """
        out = copy.copy(self)
        out.lanes = self.lanes * times
        out.vector, out.bits = (ir.VectorType(kind.element, out.lanes) for kind in (self.vector, self.bits))
        return out

    # --------------------------------------------------------------------------------------------------- values

    def number(self, x: float) -> Value:
        """A vector of one number."""
        return Value(self, self.everywhere(self.vector, x))

    def integer(self, x: int) -> Value:
        return Value(self, ir.Constant(I64, x))

    def like(self, x: float, other: Value) -> Value:
        """A constant of the type of another value."""
        kind = other.ir.type
        return Value(self, self.everywhere(kind, x) if isinstance(kind, ir.VectorType) else ir.Constant(kind, x))

    def everywhere(self, kind: ir.VectorType, x: float) -> ir.Constant:
        """A constant in all places of a vector."""
        key = str(kind), x, math.copysign(1, x)
        if key not in self.constants:
            self.constants[key] = ir.Constant(kind, [x] * kind.count)
        return self.constants[key]

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a · b + c, rounded once."""
        return Value(self, self.at.call(self.intrinsic("fma", 3), [a.ir, b.ir, c.ir]))

    def absolute(self, x: Value) -> Value:
        return Value(self, self.at.call(self.intrinsic("fabs", 1), [x.ir]))

    def with_sign(self, x: Value, sign: Value) -> Value:
        """|x| with the sign of another."""
        return Value(self, self.at.call(self.intrinsic("copysign", 2), [x.ir, sign.ir]))

    def where(self, condition: Value, a: Value, b: Value) -> Value:
        """a where the condition holds, else b."""
        return Value(self, self.at.select(condition.ir, a.ir, b.ir))

    def larger(self, a: Value, b: Value) -> Value:
        return self.where(a > b, a, b)

    def smaller(self, a: Value, b: Value) -> Value:
        return self.where(a < b, a, b)

    def as_bits(self, x: Value) -> Value:
        return Value(self, self.at.bitcast(x.ir, self.bits))

    def from_bits(self, x: Value) -> Value:
        return Value(self, self.at.bitcast(x.ir, self.vector))

    def shifted(self, bits: Value, by: int) -> Value:
        """Integers times 2^by; for by < 0 divided, without the sign."""
        how = self.at.shl if by > 0 else self.at.lshr
        return Value(self, how(bits.ir, self.everywhere(self.bits, abs(by))))

    def to_number(self, bits: Value) -> Value:
        """Integers as numbers."""
        return Value(self, self.at.sitofp(bits.ir, self.vector))

    def whole_part(self, x: Value) -> Value:
        """Of numbers that are not negative, without the digits after the point."""
        return self.to_number(Value(self, self.at.fptosi(x.ir, self.bits)))

    # --------------------------------------------------------------------------------------------------- memory

    def load(self, pointer: Value, index: Value | int = 0) -> Value:
        """Vector number `index` from a pointer on."""
        return Value(self, self.at.load(self.address(pointer, index).ir, align=4, typ=self.vector))

    def store(self, x: Value, pointer: Value, index: Value | int = 0) -> None:
        self.at.store(x.ir, self.address(pointer, index).ir, align=4)

    def load_one(self, pointer: Value, index: Value | int = 0) -> Value:
        """Number `index` from a pointer on, in all places of a vector."""
        return self.same(self.at.load(self.address(pointer, index, self.float).ir, typ=self.float))

    def load_integer(self, pointer: Value, index: Value | int = 0) -> Value:
        return Value(self, self.at.load(self.address(pointer, index, I64).ir, typ=I64))

    def taken(self, pointer: Value) -> Value:
        """The integer at a pointer, to which one is added; of several threads, no two get the same."""
        one = ir.Constant(I64, 1)
        return Value(self, self.at.atomic_rmw("add", pointer.ir, one, "monotonic"))

    def call_at(self, integer: Value, pointer: Value) -> None:
        """Call the function of one pointer that is at an address."""
        signature = ir.FunctionType(ir.VoidType(), [POINTER])
        self.at.call(self.at.inttoptr(integer.ir, signature.as_pointer()), [pointer.ir])

    def pointer(self, integer: Value) -> Value:
        return Value(self, self.at.inttoptr(integer.ir, POINTER))

    def address(self, pointer: Value, index: Value | int, kind: ir.Type | None = None) -> Value:
        """Where item `index` is, of a vector's size or of another type's."""
        index = index if isinstance(index, Value) else self.integer(index)
        return Value(self, self.at.gep(pointer.ir, [index.ir], source_etype=kind or self.unit))

    # -------------------------------------------------------------------------------------------------- control

    @contextmanager
    def loop(self, count: Value, start: Value | int = 0) -> Iterator[Value]:
        """Do what is written inside for start, …, count − 1, perhaps never."""
        start = start if isinstance(start, Value) else self.integer(start)
        before = self.at.block
        body, after = (self.at.append_basic_block(name) for name in ("loop", "done"))
        self.at.cbranch((start < count).ir, body, after)
        self.at.position_at_end(body)
        index = self.at.phi(I64)
        index.add_incoming(start.ir, before)
        yield Value(self, index)
        following = self.at.add(index, ir.Constant(I64, 1))
        index.add_incoming(following, self.at.block)
        self.at.cbranch(self.at.icmp_signed("<", following, count.ir), body, after)
        self.at.position_at_end(after)

    def each_vector(self, count: Value, body: Callable[[Code, Value], object], together: int = 4) -> None:
        """Write body(code, k) for all vectors k < count: so many together in one wide vector, and then the rest."""
        together = max(1, together // self.registers)
        wide = self.wider(together)
        with self.loop(count / together) as k:
            body(wide, k * together)
        with self.loop(count, count / together * together) as k:
            body(self, k)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Do what is written inside only if the condition holds."""
        with self.at.if_then(condition.ir):
            yield

    @contextmanager
    def choice(self, condition: Value) -> Iterator[tuple]:
        """`with code.choice(c) as (then, otherwise): with then: …  with otherwise: …`"""
        with self.at.if_else(condition.ir) as both:
            yield both

    def variable(self, start: Value) -> Variable:
        return Variable(self, start)

    def switch(self, on: Value, cases: Sequence[Callable[[], object]]) -> None:
        """Do what cases[k]() writes where `on` is k."""
        after = self.at.append_basic_block("after")
        blocks = [self.at.append_basic_block(f"case{k}") for k in range(len(cases))]
        switch = self.at.switch(on.ir, after)
        for k, (block, case) in enumerate(zip(blocks, cases, strict=True)):
            switch.add_case(ir.Constant(I64, k), block)
            self.at.position_at_end(block)
            case()
            self.at.branch(after)
        self.at.position_at_end(after)

    # -------------------------------------------------------------------------------------- numbers of single images

    def gather(self, live: Value, of_lane: Callable[[Value], Value]) -> Value:
        """The vector with the number of_lane(k) in each lane k < live, and 0 in the others."""
        place = self.room()
        self.store(self.number(0), place)
        with self.loop(live) as lane:
            self.at.store(of_lane(lane).ir, self.address(place, lane, self.float).ir)
        return self.load(place)

    @contextmanager
    def each(self, live: Value, x: Value) -> Iterator[tuple[Value, Value]]:
        """Do what is written inside for each lane k < live: k, and the number of x there."""
        place = self.room()
        self.store(x, place)
        with self.loop(live) as lane:
            yield lane, Value(self, self.at.load(self.address(place, lane, self.float).ir, typ=self.float))

    def room(self, count: int = 1) -> Value:
        """Memory for some vectors, as long as the function runs."""
        with self.at.goto_entry_block():
            place = self.at.alloca(self.vector, count)
        place.type = POINTER  # of any type
        return Value(self, place)

    def load_as_number(self, pointer: Value, index: Value, kind: ir.Type) -> Value:
        """Item `index` of an array of float32 or of integers, as one number."""
        loaded = self.at.load(self.address(pointer, index, kind).ir, typ=kind)
        if isinstance(kind, ir.IntType):
            return Value(self, self.at.uitofp(loaded, self.float))
        return Value(self, loaded if kind == self.float else self.at.fpext(loaded, self.float))

    def as_integer(self, x: Value) -> Value:
        """A number without digits after the point."""
        return Value(self, self.at.fptosi(x.ir, I64))

    def of_integer(self, x: Value) -> Value:
        """An integer in all places of a vector."""
        return self.same(self.at.sitofp(x.ir, self.float))

    def same(self, one: ir.Value) -> Value:
        """A number in all places of a vector."""
        first = self.at.insert_element(ir.Constant(self.vector, ir.Undefined), one, ir.Constant(ir.IntType(32), 0))
        places = self.everywhere(ir.VectorType(ir.IntType(32), self.lanes), 0)
        return Value(self, self.at.shuffle_vector(first, ir.Constant(self.vector, ir.Undefined), places))

    def store_number(self, x: Value, pointer: Value, index: Value) -> None:
        self.at.store(x.ir, self.address(pointer, index, self.float).ir)

    def store_integer(self, x: Value, pointer: Value, index: Value) -> None:
        self.at.store(x.ir, self.address(pointer, index, I64).ir)

"""Programs of a launch that take turns in Triton's interpreter, as programs that wait for each other need.

    with interleaved(seed=0):
        kernel[grid](…)

The interpreter runs programs one after another, so one that waits for a later one would wait for ever. Here each
has a thread. One thread runs at a time, up to its next atomic operation; then another one is picked at random.
"""

from __future__ import annotations

import inspect
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from unittest import mock


class Stopped(BaseException):
    """Ends the other programs where one failed."""


class Program(threading.Thread):
    """A program of a launch, at `place` in its grid."""

    def __init__(self, turns: Turns, place: tuple, arguments: dict):
        super().__init__(daemon=True)
        self.turns, self.place, self.arguments = turns, place, arguments
        self.go, self.done, self.error = threading.Semaphore(0), False, None

    def run(self) -> None:
        try:
            self.resume()
            self.turns.kernel(**self.arguments)
        except BaseException as error:
            self.error = error
        self.done = True
        self.turns.back.release()

    def pause(self) -> None:
        """Hand over until the next turn."""
        self.turns.back.release()
        self.resume()

    def resume(self) -> None:
        self.go.acquire()
        if self.turns.stopped:
            raise Stopped
        self.turns.begin(self)


class Turns:
    """Stands for a kernel: keeps the programs that the interpreter calls, and runs them together at the last one."""

    def __init__(self, kernel, builder, lot: random.Random):
        self.kernel, self.builder, self.lot = kernel, builder, lot
        self.__name__, self.__globals__ = kernel.__name__, kernel.__globals__  # the interpreter asks for these
        self.__signature__ = inspect.signature(kernel)
        self.programs: list[Program] = []
        self.back, self.running, self.stopped = threading.Semaphore(0), None, False

    def begin(self, program: Program) -> None:
        self.running = program
        self.builder.grid_idx = program.place

    def __call__(self, **arguments) -> None:
        self.programs.append(Program(self, self.builder.grid_idx, arguments))
        if len(self.programs) < prod(self.builder.grid_dim):
            return
        for program in self.programs:
            program.start()
        while waiting := [program for program in self.programs if not program.done]:
            program = self.lot.choice(waiting)
            program.go.release()
            self.back.acquire()
            if program.error is not None:
                self.stopped = True
                for other in self.programs:
                    other.go.release()
                    other.join()
                raise program.error


@contextmanager
def interleaved(seed: int) -> Iterator[None]:
    """Within, the programs of each launch in the interpreter take turns, drawn with a seed."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    run, atomic_rmw, turns = executor.__call__, builder.create_atomic_rmw, []

    def launched(self, *arguments, **options):
        kernel, lot = self.fn, random.Random(seed)
        self.fn = Turns(kernel, interpreter.interpreter_builder, lot)
        turns.append(self.fn)
        try:
            run(self, *arguments, **options)
        finally:
            self.fn = kernel
            turns.pop()

    def in_turn(self, *arguments):
        turns[-1].running.pause()
        return atomic_rmw(self, *arguments)

    with mock.patch.object(executor, "__call__", launched), mock.patch.object(builder, "create_atomic_rmw", in_turn):
        yield

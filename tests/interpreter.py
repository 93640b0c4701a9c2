"""Runs kernels in the Mosaic GPU interpreter and turns what it reports into one verdict.

Kernels run in a worker process, one for each process of the test run. An alarm signal would not do: it interrupts a
kernel of one warpgroup that waits for ever, but with two the threads go on waiting, and the runtime waits for them.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import io
import multiprocessing
import re
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np

try:
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
except ImportError as error:
    raise ImportError(f"jax {jax.__version__} has moved the state of its GPU interpreter: adapt {__file__}") from error

from jax_fp8attn.testing import assert_bitwise_equal

LIMIT = 180.0  # seconds, many times what a kernel takes: a busy machine is no hang


class FaultFound(Exception):
    """The interpreter objects to the kernel."""


class RaceFound(FaultFound):
    pass


class OutOfBounds(FaultFound):
    pass


class Hang(FaultFound):
    """The kernel did not end within its time."""


class InterpreterError(Exception):
    """The kernel could not be interpreted to its end, for a reason that is none of the faults above."""


def parameters() -> plgpu.InterpretGPUParams:
    """Races, accesses out of bounds and reads of unwritten memory all show."""
    # 0.11.2 has no on_race and goes on after a race
    known = {field.name for field in dataclasses.fields(plgpu.InterpretGPUParams)}
    on_race = {"on_race": "raise"} if "on_race" in known else {}
    return plgpu.InterpretGPUParams(
        detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan", **on_race
    )


def run_interpreted(function: Callable[..., Any], *arguments: Any, kernels: int = 1, limit: float = LIMIT) -> Any:
    """``function(interpret, *arguments)`` as numpy arrays, from the worker process.

    function  of a module that the worker can import; passes ``interpret`` to the kernels it calls
    kernels   how many kernels the interpreter has to have run: a test must not pass because none did
    limit     seconds until ``Hang``
    """
    global _worker
    if _worker is None:
        _worker = _Worker()
    try:
        kind, value, count = _worker.call((function, arguments), limit)
    except (Hang, InterpreterError):
        _worker = None
        raise
    if kind is not None:
        raise kind(value)
    if count != kernels:
        raise InterpreterError(f"{count} kernels were interpreted, expected {kernels}")
    return value


def verdict(
    function: Callable[..., Any], *arguments: Any, expected: Any, kernels: int = 1, limit: float = LIMIT
) -> str:
    """In a word, what the gate says about one kernel whose result should be ``expected``, bit for bit."""
    try:
        result = run_interpreted(function, *arguments, kernels=kernels, limit=limit)
        assert_bitwise_equal(result, expected)
    except FaultFound as fault:
        return type(fault).__name__
    except AssertionError:
        return "wrong result"
    return "clean"


class _Worker:
    """The process that interprets."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other,), daemon=True)
        self.process.start()
        other.close()
        atexit.register(self.stop)
        self.receive(LIMIT)

    def call(self, request: Any, limit: float) -> Any:
        self.connection.send(request)
        return self.receive(limit)

    def receive(self, limit: float) -> Any:
        try:
            if self.connection.poll(limit):
                return self.connection.recv()
        except EOFError:
            self.stop()
            raise InterpreterError(f"the worker died with exit status {self.process.exitcode}") from None
        self.stop()
        raise Hang(f"no end after {limit} s")

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        atexit.unregister(self.stop)


_worker: _Worker | None = None


def _serve(connection: Any) -> None:
    """Answers requests (function, arguments) with (exception type or None, result or message, kernels)."""
    # programs run in the threads that call them: a pool of as many threads as processors can have none left for a
    # warpgroup that another one waits for
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        except Exception:
            # a request that cannot be unpickled here
            connection.send((InterpreterError, traceback.format_exc(), 0))
            continue
        connection.send(_interpret(*request))


def _interpret(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[type | None, Any, int]:
    gpu_callbacks.reset_gpu_interpret_mode_state()
    printed = io.StringIO()
    text, result = "", None
    with _race_states() as states, contextlib.redirect_stdout(printed):
        try:
            result = jax.tree.map(np.asarray, function(parameters(), *arguments))
            jax.effects_barrier()
        except Exception as error:
            text = f"{error}\n{traceback.format_exc()}"
    gpu_callbacks.reset_gpu_interpret_mode_state()
    # a barrier that went through a phase nobody waited for: which of the two is reported is a matter of time
    raced = "RACE DETECTED" in text or "no threads observed phase" in text
    if raced or any(state.races_found for state in states):
        return RaceFound, text or printed.getvalue(), len(states)
    if re.search("out[- ]of[- ]bounds", text, re.IGNORECASE):
        return OutOfBounds, text, len(states)
    if text:
        return InterpreterError, text, len(states)
    return None, result, len(states)


@contextlib.contextmanager
def _race_states() -> Iterator[list[Any]]:
    """The race detectors of all kernels that run inside; ``get_races`` knows the last one only."""
    states, make = [], gpu_callbacks.GPURaceDetectionState

    def recorded(*arguments: Any, **options: Any) -> Any:
        states.append(make(*arguments, **options))
        return states[-1]

    with mock.patch.object(gpu_callbacks, "GPURaceDetectionState", recorded):
        yield states

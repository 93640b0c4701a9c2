"""Comparators for tests of FP8 kernels: non-finite positions first, then bounds that notice a wrong answer.

All take numpy or jax arrays, raise ``AssertionError`` with coordinates, and return the measured error.
Element tolerances alone are not used: the outputs of long rows are tiny, and an all-zero result would pass.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def as_float64(x: Any) -> np.ndarray:
    """Any array as numpy float64, without a detour through float32."""
    return np.asarray(x).astype(np.float64)


def assert_same_nonfinite(actual: Any, expected: Any, what: str = "result") -> None:
    """NaN, +inf and -inf stand at the same positions."""
    a, e = as_float64(actual), as_float64(expected)
    assert a.shape == e.shape, f"{what}: shape {a.shape}, expected {e.shape}"
    for name, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        differ = test(a) != test(e)
        if differ.any():
            where = np.argwhere(differ)[0].tolist()
            raise AssertionError(
                f"{what}: {name} positions differ at {int(differ.sum())} of {a.size} places, first at {where}: "
                f"got {a[tuple(where)]}, expected {e[tuple(where)]}"
            )


def row_relative_l2(actual: Any, expected: Any) -> np.ndarray:
    """|actual - expected| / |expected| over the last axis. Rows with non-finite numbers count their finite part only;
    a row that should be all zero counts its absolute norm."""
    a, e = as_float64(actual), as_float64(expected)
    finite = np.isfinite(a) & np.isfinite(e)
    difference = np.linalg.norm(np.where(finite, a - np.where(finite, e, 0), 0), axis=-1)
    size = np.linalg.norm(np.where(finite, e, 0), axis=-1)
    return np.where(size > 0, difference / np.where(size > 0, size, 1), difference)


def assert_rows_close(
    actual: Any, expected: Any, worst: float, overall: float | None = None, what: str = "out"
) -> float:
    """Same non-finite positions, and relative L2 error within ``worst`` for each row and ``overall`` for the tensor."""
    assert_same_nonfinite(actual, expected, what)
    errors = row_relative_l2(actual, expected)
    if not errors.size:
        return 0.0
    where = np.unravel_index(int(np.argmax(errors)), errors.shape)
    row = list(map(int, where))
    assert errors[where] <= worst, f"{what}: row {row} is off by {errors[where]:.3g}, bound {worst:.3g}"
    if overall is not None:
        total = relative_error(actual, expected)
        assert total <= overall, f"{what}: relative error {total:.3g}, bound {overall:.3g}"
    return float(errors[where])


def relative_error(actual: Any, expected: Any) -> float:
    """Frobenius norm of the difference over that of ``expected``, over places where both are finite."""
    a, e = as_float64(actual), as_float64(expected)
    finite = np.isfinite(a) & np.isfinite(e)
    size = np.linalg.norm(e[finite])
    difference = np.linalg.norm(a[finite] - e[finite])
    return float(difference / size) if size else float(difference)


def assert_relative_error(actual: Any, expected: Any, bound: float, what: str = "result") -> float:
    """Same non-finite positions, and Frobenius-relative error within ``bound``."""
    assert_same_nonfinite(actual, expected, what)
    error = relative_error(actual, expected)
    assert error <= bound, f"{what}: relative error {error:.3g}, bound {bound:.3g}"
    return error


def assert_lse_close(actual: Any, expected: Any, atol: float = 1e-5, rtol: float = 1e-5, what: str = "lse") -> float:
    """Same non-finite positions, and |actual - expected| <= atol + rtol*|expected|."""
    assert_same_nonfinite(actual, expected, what)
    a, e = as_float64(actual), as_float64(expected)
    finite = np.isfinite(e)
    excess = np.where(finite, np.abs(np.where(finite, a, 0) - np.where(finite, e, 0)), 0)
    bad = excess > atol + rtol * np.where(finite, np.abs(e), 0)
    if bad.any():
        where = np.argwhere(bad)[0].tolist()
        raise AssertionError(f"{what}: {a[tuple(where)]} at {where}, expected {e[tuple(where)]} (+-{atol}, {rtol})")
    return float(excess.max(initial=0.0))


def fp8_bytes(x: Any) -> np.ndarray:
    """e4m3 codes (or their bytes) as uint8."""
    x = np.asarray(x)
    assert x.dtype in (np.uint8, jnp.float8_e4m3fn), f"codes are {x.dtype}, expected float8_e4m3fn or uint8"
    return x.view(np.uint8)


def fp8_ulps(actual: Any, expected: Any) -> np.ndarray:
    """Distance in codes, sign-magnitude order: 0x00 and 0x80 are 0 apart. NaN against a number is 255."""
    a, e = fp8_bytes(actual).astype(np.int32), fp8_bytes(expected).astype(np.int32)
    nan_a, nan_e = (a & 0x7F) == 0x7F, (e & 0x7F) == 0x7F

    def order(b: np.ndarray) -> np.ndarray:
        return np.where(b & 0x80, -(b & 0x7F), b & 0x7F)

    return np.where(nan_a | nan_e, np.where(nan_a & nan_e, 0, 255), np.abs(order(a) - order(e)))


def assert_codes_close(
    actual: Any, expected: Any, max_ulps: int = 1, min_identical: float = 0.995, what: str = "codes"
) -> float:
    """e4m3 codes within ``max_ulps`` everywhere and identical in at least ``min_identical`` of the places."""
    assert np.shape(actual) == np.shape(expected), f"{what}: shape {np.shape(actual)}, expected {np.shape(expected)}"
    ulps = fp8_ulps(actual, expected)
    if not ulps.size:
        return 1.0
    where = np.unravel_index(int(np.argmax(ulps)), ulps.shape)
    assert ulps[where] <= max_ulps, (
        f"{what}: code {fp8_bytes(actual)[where]:#04x} at {list(map(int, where))}, "
        f"expected {fp8_bytes(expected)[where]:#04x}: {ulps[where]} apart"
    )
    identical = float((ulps == 0).mean())
    assert identical >= min_identical, f"{what}: {identical:.4%} identical, at least {min_identical:.2%} expected"
    return identical


def assert_bitwise_equal(actual: Any, expected: Any, what: str = "result") -> None:
    """Every leaf has the same bytes."""
    flat_a, tree_a = jax.tree.flatten(actual)
    flat_e, tree_e = jax.tree.flatten(expected)
    assert tree_a == tree_e, f"{what}: structure {tree_a}, expected {tree_e}"
    for number, (a, e) in enumerate(zip(flat_a, flat_e, strict=True)):
        a, e = np.ascontiguousarray(np.asarray(a)), np.ascontiguousarray(np.asarray(e))
        alike = a.shape == e.shape and a.dtype == e.dtype
        assert alike, f"{what}: leaf {number} is {a.dtype}{a.shape}, expected {e.dtype}{e.shape}"
        if not a.size:
            continue
        differ = np.atleast_1d(a).view(np.uint8) != np.atleast_1d(e).view(np.uint8)
        if differ.any():
            differ = differ.reshape(*np.atleast_1d(a).shape, a.dtype.itemsize).any(-1)
            where = np.argwhere(differ)[0].tolist()
            raise AssertionError(
                f"{what}: leaf {number} differs at {int(differ.sum())} of {a.size} places, first at {where}: "
                f"{np.atleast_1d(a)[tuple(where)]} against {np.atleast_1d(e)[tuple(where)]}"
            )


def assert_within_emulated(
    actual: Any, emulated: Any, exact: Any, factor: float = 2.0, rounding: float = 0.0, what: str = "out"
) -> float:
    """The error of ``actual`` is at most ``factor`` times the emulated reference's plus ``rounding`` (relative)."""
    assert_same_nonfinite(actual, exact, what)
    error, allowed = relative_error(actual, exact), factor * relative_error(emulated, exact) + rounding
    bound = f"bound {allowed:.3g} ({factor} x the emulated reference)"
    assert error <= allowed, f"{what}: relative error {error:.3g}, {bound}"
    return error

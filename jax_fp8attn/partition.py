"""Heads over devices: how a call is cut when its operands are sharded under plain ``jax.jit``.

Two ways lead here. In the compiler's mode (``AxisType.Auto``) XLA's own implementations are jax.numpy code that the
partitioner cuts by itself; a kernel is opaque to it, and becomes one call with a sharding rule. In explicit mode
(``AxisType.Explicit``) shardings are types, known while tracing: every implementation runs under ``shard_map``.

One device, and the inside of ``shard_map``, see nothing of this.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_fp8attn.errors import InvalidInputError
from jax_fp8attn.quantize import Fp8Array, Fp8PerGroup, Fp8PerTensor, Fp8Spec, physical_scales

ALL = -1  # in place of an axis: no heads, every device has all of it
Run = Callable[[Any], Callable[[Any], Any]]  # problem -> arrays -> result


@dataclasses.dataclass(frozen=True)
class Heads:
    """Where the heads of a call are.

    counts   fields of the problem that count heads; the number of devices must divide each
    arrays   like the op's arrays: the axis of heads of each, or ALL
    results  the same for the leaves of the result, in order
    """

    counts: tuple[str, ...]
    arrays: Any
    results: tuple[int, ...]

    def divide(self, problem: Any, parts: int) -> bool:
        return all(getattr(problem, name) % parts == 0 for name in self.counts)

    def axes(self, arrays: Any) -> list[int]:
        """One for each leaf of ``arrays``."""
        return jax.tree.leaves(jax.tree.broadcast(self.arrays, arrays))


def output_axes(spec: Fp8Spec | None) -> tuple[int, ...]:
    """Of an output [T, H, D], and of its scales."""
    if spec is None:
        return (1,)
    return (1, ALL) if isinstance(spec, Fp8PerTensor) else (1, 1 if spec.scale_layout == "row" else 0)


def _local(heads: Heads, problem: Any, parts: int, names: tuple[str, ...], run: Run) -> Callable[[Any], Any]:
    """What one of ``parts`` devices computes. Where a word holds the scales of several devices, all get all words."""
    local = dataclasses.replace(problem, **{name: getattr(problem, name) // parts for name in heads.counts})
    if not _words_straddle(problem, parts):
        return run(local)
    spec = problem.output_quant
    by_row = run(dataclasses.replace(local, output_quant=dataclasses.replace(spec, scale_layout="row")))

    def call(arrays: Any) -> Any:
        result = by_row(arrays)
        out, *rest = result if problem.return_lse else (result,)
        scales = physical_scales(lax.all_gather(out.scales, names, axis=1, tiled=True), spec)
        out = Fp8Array(out.values, scales, spec, out.num_tokens)
        return (out, *rest) if problem.return_lse else out

    return call


def _words_straddle(problem: Any, parts: int) -> bool:
    spec = getattr(problem, "output_quant", None)
    if parts == 1 or not isinstance(spec, Fp8PerGroup) or spec.scale_layout != "col_tma_packed":
        return False
    width = getattr(problem, "width", None) or problem.v_width
    return problem.heads // parts * width // spec.group_size % 4 != 0


def _result_axes(heads: Heads, problem: Any, parts: int) -> tuple[int, ...]:
    values, *rest = heads.results
    return (values, ALL, *rest[1:]) if _words_straddle(problem, parts) else heads.results


def _spec(axis: int, names: tuple[str, ...]) -> PartitionSpec:
    return PartitionSpec(*[None] * axis, names) if axis != ALL and names else PartitionSpec()


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def by_compiler(heads: Heads | None, problem: Any, run: Run) -> Callable[[Any], Any]:
    """``run(problem)``, which the partitioner cannot look into, as a call that it may cut by heads."""
    if heads is None or _inside_shard_map() or not all(getattr(problem, name) for name in heads.counts):
        return run(problem)

    def call(arrays: Any) -> Any:
        leaves, tree = jax.tree.flatten(arrays)
        trees: list[Any] = []

        def whole(*leaves: jax.Array) -> list[jax.Array]:
            results, result_tree = jax.tree.flatten(run(problem)(tree.unflatten(leaves)))
            trees.append(result_tree)
            return results

        cut = _Cut(heads, problem, run, tree, heads.axes(arrays))
        partitioned = custom_partitioning(whole)
        partitioned.def_partition(partition=cut.partition, sharding_rule=cut.rule)
        results = partitioned(*leaves)
        return trees[-1].unflatten(results)

    return call


def _inside_shard_map() -> bool:
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


@dataclasses.dataclass(frozen=True)
class _Cut:
    """The callbacks of one call."""

    heads: Heads
    problem: Any
    run: Run
    tree: Any  # of the arrays
    axes: list[int]  # of their leaves

    def partition(self, mesh: Any, arguments: Sequence[Any], results: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
        names = self._names(arguments)
        parts = math.prod(mesh.shape[name] for name in names)
        if not self.heads.divide(self.problem, parts):
            names, parts = (), 1
        local = _local(self.heads, self.problem, parts, names, self.run)
        place = lambda axis: NamedSharding(mesh, _spec(axis, names))
        return (
            mesh,
            lambda *leaves: jax.tree.leaves(local(self.tree.unflatten(leaves))),
            [place(axis) for axis in _result_axes(self.heads, self.problem, parts)],
            tuple(place(axis) for axis in self.axes),
        )

    def _names(self, arguments: Sequence[Any]) -> tuple[str, ...]:
        """The mesh axes that the heads of some operand are sharded over."""
        for argument, axis in zip(arguments, self.axes, strict=True):
            if axis != ALL and (names := _names(argument.sharding.spec[axis])):
                return names
        return ()

    def rule(self, mesh: Any, arguments: Sequence[Any], results: Sequence[Any]) -> SdyShardingRule:
        """Axes of heads go together; every other axis goes alone."""
        shapes = [[tuple(value.shape) for value in values] for values in (arguments, results)]
        axes = [self.axes, self._linked(mesh, shapes[1])]
        sizes = [shape[a] for s, ax in zip(shapes, axes, strict=True) for shape, a in zip(s, ax, strict=True) if a >= 0]
        least, alone, factors = min(sizes), _fresh(), {}
        mappings = [
            tuple(_mapping(shape, axis, least, alone, factors) for shape, axis in zip(s, ax, strict=True))
            for s, ax in zip(shapes, axes, strict=True)
        ]
        return SdyShardingRule(*mappings, **factors)

    def _linked(self, mesh: Any, shapes: Sequence[tuple[int, ...]]) -> list[int]:
        """Words of scales go with the heads where no cut makes them straddle devices."""
        axes = list(self.heads.results)
        spec = getattr(self.problem, "output_quant", None)
        if isinstance(spec, Fp8PerGroup) and spec.scale_layout == "col_tma_packed" and shapes[1][0] % mesh.size:
            axes[1] = ALL
        return axes


def _fresh() -> Iterator[str]:
    number = 0
    while True:
        yield f"x{number}"
        number += 1


def _mapping(
    shape: tuple[int, ...], axis: int, least: int, alone: Iterator[str], factors: dict[str, int]
) -> ArrayMapping:
    """An axis of heads is the factor that all have, times how often this one has it."""
    names: list[Any] = [next(alone) for _ in shape]
    if axis != ALL:
        times = shape[axis] // least
        names[axis] = "heads"
        if times > 1:
            names[axis] = CompoundFactor("heads", f"times{times}")
            factors[f"times{times}"] = times
    return ArrayMapping(*names)


def explicit_mesh(arrays: Any) -> Any:
    """The mesh whose explicit axes are in the types of ``arrays``, or None."""
    for leaf in jax.tree.leaves(arrays):
        sharding = getattr(jax.typeof(leaf), "sharding", None)
        mesh = getattr(sharding, "mesh", None)
        if mesh is not None and not mesh.empty and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def by_type(op: str, heads: Heads | None, problem: Any, run: Run, mesh: Any) -> Callable[[Any], Any]:
    """``run(problem)`` on every device, as the shardings in the types of its arrays say."""

    def call(arrays: Any) -> Any:
        leaves, tree = jax.tree.flatten(arrays)
        axes = [ALL] * len(leaves) if heads is None else heads.axes(arrays)
        names = _typed_names(op, arrays, axes)
        parts = math.prod(mesh.shape[name] for name in names)
        if parts > 1 and not heads.divide(problem, parts):
            counts = {name: getattr(problem, name) for name in heads.counts}
            raise InvalidInputError(f"{op}: heads are sharded over {parts} devices, which do not divide {counts}.")
        local = _local(heads, problem, parts, names, run) if parts > 1 else run(problem)
        trees: list[Any] = []

        def on_device(*leaves: jax.Array) -> list[jax.Array]:
            results, result_tree = jax.tree.flatten(local(tree.unflatten(leaves)))
            trees.append(result_tree)
            return results

        specs = tuple(_spec(axis, names) for axis in axes)
        out_specs = (
            [_spec(axis, names) for axis in _result_axes(heads, problem, parts)] if parts > 1 else _spec(ALL, ())
        )
        results = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=specs,
            out_specs=out_specs,
            axis_names={n for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit},
            check_vma=False,
        )(*(jax.sharding.reshard(x, NamedSharding(mesh, s)) for x, s in zip(leaves, specs, strict=True)))
        return trees[-1].unflatten(results)

    return call


def _typed_names(op: str, arrays: Any, axes: Sequence[int]) -> tuple[str, ...]:
    """The mesh axes of the heads; an error if anything else is sharded, or heads are in two ways."""
    found: dict[tuple[str, ...], str] = {}
    for (path, leaf), axis in zip(jax.tree_util.tree_leaves_with_path(arrays), axes, strict=True):
        name = jax.tree_util.keystr(path).lstrip(".")
        for position, entry in enumerate(getattr(jax.typeof(leaf).sharding, "spec", ())):
            names = _names(entry)
            if names and position != axis:
                raise InvalidInputError(
                    f"{op}: axis {position} of {name} is sharded over {names}; expected nothing but heads to be "
                    "sharded. Call jax.sharding.reshard on it, or the op inside jax.shard_map."
                )
            if names:
                found.setdefault(names, name)
    if len(found) > 1:
        ways = " and ".join(f"over {names} in {name}" for names, name in found.items())
        raise InvalidInputError(f"{op}: heads are sharded {ways}; expected one way for all.")
    return next(iter(found), ())

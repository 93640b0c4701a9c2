"""The Mosaic GPU kernel of merge_attn_states: how work is cut (anywhere), and what only a GPU can show."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from implementations import kernels
from jax_fp8attn.pallas import merge_sm90
from jax_fp8attn.pallas.common import groups
from jax_fp8attn.pallas.merge_sm90 import MergeConfig, default_config
from test_merge import States, exact_states, states

from jax_fp8attn import Fp8PerGroup, Fp8PerTensor, InvalidInputError, UnsupportedError, dispatch, merge_attn_states
from jax_fp8attn.cli import gated
from jax_fp8attn.dispatch import Device
from jax_fp8attn.problems import MergeProblem
from jax_fp8attn.testing import assert_bitwise_equal, assert_codes_close

HOPPER = Device("cuda", "NVIDIA H200", (9, 0))
PACKED = Fp8PerGroup.deepgemm_sm100()
on_gpu = pytest.mark.skipif(not kernels("merge_attn_states"), reason="needs a CUDA device")


def problem(dtype: Any = ml_dtypes.bfloat16, quant: Any = None, **facts: Any) -> MergeProblem:
    dtype = np.dtype(dtype)
    default = {"states": 2, "tokens": 64, "heads": 8, "width": 128, "dtype": dtype, "out_dtype": dtype}
    return MergeProblem(**default | facts, output_quant=quant and quant.static())


def every_problem() -> Any:
    """A grid over all that a configuration may depend on."""
    formats = [Fp8PerGroup(g, "ue8m0", layout) for g in (32, 64, 128) for layout in ("row", "col_tma")]
    quants = [None, Fp8PerTensor(1.0), *formats, PACKED, Fp8PerGroup(32, "ue8m0", "col_tma_packed")]
    dtypes = (ml_dtypes.bfloat16, np.float16, np.float32)
    widths = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 512)
    sizes = ((3, 1), (64, 3), (64, 8), (600, 8), (4096, 8), (4096, 32), (4096, 128))
    for quant, dtype, width, count, size in itertools.product(quants, dtypes, widths, (1, 2, 4, 16), sizes):
        if width % getattr(quant, "group_size", 1) == 0:
            facts = {"tokens": size[0], "heads": size[1], "states": count, "stacked": count != 2}
            yield problem(dtype, quant, width=width, **facts)


class TestConfig:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (problem(tokens=16, heads=4), MergeConfig(128, 8)),
            (problem(), MergeConfig(128, 8)),
            (problem(tokens=1, heads=4), MergeConfig(128, 4, heads="never")),
            (problem(tokens=1, heads=8), MergeConfig(128, 4)),
            (problem(tokens=4096), MergeConfig(128, 8)),
            (problem(tokens=4096, heads=128), MergeConfig(128, 8)),
            (problem(tokens=1024, heads=64, quant=Fp8PerTensor(1.0)), MergeConfig(128, 8)),
            (problem(tokens=4096, heads=128, quant=Fp8PerTensor(1.0)), MergeConfig(128, 16)),
            (problem(np.float32, tokens=4096, heads=128, quant=Fp8PerTensor(1.0)), MergeConfig(128, 8)),
            (problem(tokens=4096, width=512), MergeConfig(128, 8)),
            (problem(tokens=4096, width=192), MergeConfig(64, 8)),
            (problem(tokens=4096, width=96), MergeConfig(32, 8)),
            (problem(tokens=4096, width=8), MergeConfig(8, 4)),
            (problem(quant=Fp8PerGroup.row_major(32)), MergeConfig(32, 4, rows=4, ahead=4)),
            (problem(tokens=4096, heads=128, quant=Fp8PerGroup.row_major(32)), MergeConfig(32, 4, rows=4, ahead=2)),
            (problem(quant=Fp8PerGroup.row_major(64)), MergeConfig(64, 4, rows=2, ahead=2)),
            (problem(tokens=4096, heads=128, quant=Fp8PerGroup.row_major(64)), MergeConfig(64, 8, rows=2, ahead=2)),
            (problem(quant=Fp8PerGroup.row_major(128)), MergeConfig(128, 8)),
            (problem(tokens=4096, heads=128, quant=Fp8PerGroup.row_major(128)), MergeConfig(128, 16)),
            (problem(tokens=4096, heads=16, quant=Fp8PerGroup.row_major(128)), MergeConfig(128, 16, heads="always")),
            (problem(tokens=4096, heads=16, quant=Fp8PerGroup.deepgemm_sm90()), MergeConfig(128, 16)),
            (problem(tokens=4096, heads=16, quant=PACKED), MergeConfig(128, 16, rows=4)),
            (problem(tokens=4096, heads=128, quant=Fp8PerGroup.deepgemm_sm90()), MergeConfig(128, 16)),
            (problem(quant=PACKED), MergeConfig(128, 4, rows=4, ahead=4)),
            (problem(tokens=4096, quant=PACKED), MergeConfig(128, 8, rows=4, ahead=2)),
            (problem(tokens=4096, heads=128, quant=PACKED), MergeConfig(128, 16, rows=4, ahead=2)),
            (problem(np.float32, PACKED, tokens=4096, heads=128), MergeConfig(128, 8, rows=4, ahead=2)),
            (problem(quant=PACKED, heads=2), MergeConfig(128, 4, rows=2, ahead=2)),
            (problem(tokens=4096, quant=PACKED, states=16, stacked=True), MergeConfig(128, 8, rows=4, ahead=1)),
        ],
    )
    def test_heuristics(self, given: MergeProblem, expected: MergeConfig) -> None:
        assert default_config(given) == expected

    def test_every_problem_has_a_fitting_configuration(self) -> None:
        for given in every_problem():
            config = default_config(given)
            assert given.width % config.width == 0 and config.tokens >= 4
            quant = given.output_quant
            if isinstance(quant, Fp8PerGroup):
                assert config.width == quant.group_size
            one_row = given.states * config.vector * given.dtype.itemsize / 4
            assert config.ahead * one_row <= max(32, one_row)  # registers of loads in flight
            merge_sm90.build(given, config)

    def test_words_and_places_need_fitting_rows(self) -> None:
        with pytest.raises(ValueError, match="packed word"):
            merge_sm90.build(problem(quant=PACKED), MergeConfig(128, 16, rows=2))
        with pytest.raises(ValueError, match="in place"):
            merge_sm90.build(problem(heads=3, in_place=True), MergeConfig(128, 16, rows=2))

    @pytest.mark.parametrize(
        "bad", [(96, 8), (128, 3), (128, 128), (128, 2), (64, 8, 4, 5), (64, 8, 4, 0), (64, 8, 1, 1, "all")]
    )
    def test_misfits_are_refused(self, bad: tuple[Any, ...]) -> None:
        with pytest.raises(ValueError, match="row"):
            MergeConfig(*bad)

    def test_the_gate_builds_every_configuration(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The calls of `compile` reach every configuration of two and of four states."""
        seen = set()
        monkeypatch.setattr(merge_sm90, "default_config", lambda p: seen.add(default_config(p)) or default_config(p))
        with dispatch.target_device(HOPPER):
            for call in gated.merge_calls():
                jax.eval_shape(call.function, *call.arguments)
        wanted = {default_config(p) for p in every_problem() if p.heads > 3 and p.states in (2, 4)}
        assert wanted - seen == set()


class TestLargestMagnitude:
    def test_same_as_the_largest_of_the_finite(self) -> None:
        """Also of subnormal, infinite and NaN elements of both signs and every payload, and of none that is finite."""
        edges = np.array([0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF])
        edges = np.concatenate([edges, edges | 1 << 31]).astype(np.uint32)
        pairs = np.stack(np.meshgrid(edges, edges), axis=-1).reshape(-1, 2)
        random = np.random.default_rng(0).integers(0, 1 << 32, (4096, 2), dtype=np.uint32)
        x = np.concatenate([pairs, random, random & 0x800FFFFF]).view(np.float32)
        expected = np.abs(np.where(np.isfinite(x), x, 0)).max(axis=1)
        assert_bitwise_equal(groups.largest_magnitude(jnp.asarray(x)), expected)


class TestSupport:
    @pytest.mark.parametrize(
        ("given", "device", "reason"),
        [
            (problem(), Device("cuda", "A100", (8, 0)), "compute capability"),
            (problem(width=20), HOPPER, "head width is 20"),
            (problem(width=520), HOPPER, "head width is 520"),
            (problem(quant=Fp8PerTensor(1.0, jnp.float8_e4m3fnuz)), HOPPER, "float8_e4m3fnuz"),
        ],
    )
    def test_reasons(self, given: MergeProblem, device: Device, reason: str) -> None:
        (found,) = merge_sm90.supports(given, device)
        assert reason in found

    def test_chosen_on_hopper_and_ada_and_blackwell(self) -> None:
        for capability in ((8, 9), (9, 0), (10, 0)):
            device = Device("cuda", "card", capability)
            assert dispatch.select("merge_attn_states", problem(), None, device) == "pallas"
        assert dispatch.select("merge_attn_states", problem(), None, Device("cuda", "A100", (8, 0))) == "xla"
        assert dispatch.select("merge_attn_states", problem(width=20), None, HOPPER) == "xla"

    def test_arrays_on_another_platform(self) -> None:
        """Traced where a GPU is the default device, run on a CPU: XLA's path. A strict name says that it cannot."""
        s = exact_states(32, 4, 64)
        expected = merge_attn_states(*s, return_lse=True, implementation="xla")
        cpu = jax.devices("cpu")[0]
        arrays = States(*(jax.device_put(x, cpu) for x in s))
        with dispatch.target_device(HOPPER):
            assert_bitwise_equal(merge_attn_states(*arrays, return_lse=True), expected)
            wish = ("pallas", "xla")
            assert_bitwise_equal(merge_attn_states(*arrays, return_lse=True, implementation=wish), expected)
            with pytest.raises(Exception, match=r"(?i)cpu|platform|interpret"):
                merge_attn_states(*arrays, return_lse=True, implementation="pallas")


class TestInPlace:
    @pytest.mark.parametrize("return_lse", [False, True])
    def test_same_bits(self, return_lse: bool) -> None:
        """Whatever runs it: the prefix of the caller stays as it was unless it is donated."""
        s = exact_states(37, 4, 64)
        arrays = States(*map(jnp.asarray, s))
        names = {"in_place": True, "return_lse": return_lse, "prefill_tokens_with_context": 33}
        expected = merge_attn_states(*arrays, **names | {"in_place": False})
        assert_bitwise_equal(merge_attn_states(*arrays, **names), expected)
        assert_bitwise_equal(arrays, s)
        run = lambda *four: merge_attn_states(*four, **names)
        assert_bitwise_equal(jax.jit(run, donate_argnums=0)(*(jnp.array(x) for x in s)), expected)
        stacked = [jnp.stack([x, x]) for x in s]
        assert_bitwise_equal(jax.tree.map(lambda x: x[1], jax.vmap(run)(*stacked)), expected)

    @pytest.mark.parametrize("options", [{"output_scale": 0.5}, {"output_quant": PACKED}, {"out_dtype": "bfloat16"}])
    def test_only_with_the_inputs_own_type(self, options: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError, match="in_place is True with"):
            merge_attn_states(*states(4, 2, 128), in_place=True, **options)

    @on_gpu
    def test_donated_memory_is_the_result(self) -> None:
        s = States(*(jnp.array(x) for x in exact_states(64, 8, 128)))
        run = jax.jit(lambda *four: merge_attn_states(*four, in_place=True, implementation="pallas"), donate_argnums=0)
        place = s.prefix_output.unsafe_buffer_pointer()
        out = run(*s)
        assert out.unsafe_buffer_pointer() == place and s.prefix_output.is_deleted()


@on_gpu
class TestHardware:
    @pytest.mark.sanitize
    @pytest.mark.parametrize("quant", [None, Fp8PerTensor(0.5), Fp8PerGroup.row_major(64), PACKED])
    @pytest.mark.parametrize(("tokens", "heads"), [(48, 4), (37, 3), (5, 6), (5, 8)])
    def test_edges_of_memory(self, tokens: int, heads: int, quant: Any) -> None:
        """Whole tiles, left-over tokens with and without tiles of heads, heads that do not fill a word: for the
        sanitizer, and equal to XLA.
        With float32 scales a code may move by one: amax / 448 is not a power of two."""
        s = exact_states(tokens, heads, 128, dtype=ml_dtypes.bfloat16)
        options = {"output_quant": quant, "return_lse": True, "prefill_tokens_with_context": tokens - 2}
        kernel = merge_attn_states(*s, **options, implementation="pallas")
        expected = merge_attn_states(*s, **options, implementation="xla")
        if isinstance(quant, Fp8PerGroup) and quant.scale_format == "float32":
            assert_codes_close(kernel[0].values, expected[0].values)
            np.testing.assert_allclose(kernel[0].scales, expected[0].scales, rtol=1e-6)
            assert_bitwise_equal(kernel[1], expected[1])
        else:
            assert_bitwise_equal(kernel, expected)

    @pytest.mark.parametrize("quant", [Fp8PerTensor(0.05), PACKED, Fp8PerGroup.row_major(64)])
    def test_a_thousand_repeats(self, quant: Any) -> None:
        """R8: 4111 tokens, 16 heads, mixed counts; the same bits every time."""
        s = States(*map(jnp.asarray, states(4111, 16, 128, dtype=ml_dtypes.bfloat16)))
        options = {"output_quant": quant, "return_lse": True, "prefill_tokens_with_context": 4000}
        run = jax.jit(lambda *four: merge_attn_states(*four, **options, implementation="pallas"))
        first = run(*s)
        bits = lambda x: jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 4: jnp.uint32}[x.dtype.itemsize])
        same = jax.jit(
            lambda a, b: jax.tree.reduce(jnp.logical_and, jax.tree.map(lambda x, y: (bits(x) == bits(y)).all(), a, b))
        )
        assert bool(jnp.stack([same(run(*s), first) for _ in range(1000)]).all())
        changed = dataclasses.replace(first[0], values=first[0].values.at[4110, 15, 127].set(1))
        assert not bool(same((changed, first[1]), first))

    def test_more_than_two_to_the_31_elements(self) -> None:
        """R5, group 11: rows that straddle 2^31 and the last row; 16 GiB of inputs."""
        tokens, heads, width = 131072 + 40, 128, 128
        make = jax.jit(lambda seed: jax.random.normal(jax.random.key(seed), (tokens, heads, width), jnp.bfloat16))
        lses = jax.random.normal(jax.random.key(9), (2, heads, tokens), jnp.float32)
        s = States(make(1), lses[0], make(2), lses[1])
        count = tokens - 7
        out = merge_attn_states(
            *s, output_scale=0.05, prefill_tokens_with_context=count, implementation="pallas"
        ).values  # fmt: skip
        for first in (0, 65536 - 8, 131072 - 8, tokens - 24):
            rows = slice(first, first + 24)
            piece = (s.prefix_output[rows], s.prefix_lse[:, rows], s.suffix_output[rows], s.suffix_lse[:, rows])
            local = max(0, min(24, count - first))
            alone = merge_attn_states(
                *piece, output_scale=0.05, prefill_tokens_with_context=local, implementation="pallas"
            )  # fmt: skip
            assert_bitwise_equal(out[rows], alone.values)

    def test_strict_name_refuses(self) -> None:
        with pytest.raises(UnsupportedError, match="head width is 20"):
            merge_attn_states(*states(4, 2, 20), implementation="pallas")

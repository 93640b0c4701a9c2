"""Wrong calls and wrong values: static checks while tracing, value checks on request."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jax_fp8attn as fp8attn
from jax_fp8attn import Fp8PerGroup, Fp8PerTensor, InvalidInputError, checks

T, H, D, B = 6, 4, 32, 2


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


GOOD: dict[str, dict[str, Any]] = {
    "merge_attn_states": {
        "prefix_output": array(T, H, D),
        "prefix_lse": array(H, T),
        "suffix_output": array(T, H, D),
        "suffix_lse": array(H, T),
    },
    "merge_attn_states_n": {"outputs": array(3, T, H, D), "lses": array(3, H, T)},
    "mask_empty_context_lse": {
        "lse": array(H, T),
        "query_start_loc": array(B + 1, dtype=jnp.int32),
        "context_start_loc": array(B + 1, dtype=jnp.int32),
    },
    "quantize_fp8": {"x": array(T, H, D), "spec": Fp8PerGroup(32)},
}


class Listed:
    """A value that is passed as it is, not traced."""

    def __init__(self, value: Any):
        self.value = value


# op, argument that changes, its wrong value, further changes, what the message must hold besides the argument's name
BAD = [
    ("merge_attn_states", "prefix_output", array(T, D), {}, ["float32[6,32]", "[T, H, D]"]),
    ("merge_attn_states", "prefix_output", array(1, T, H, D), {}, ["float32[1,6,4,32]", "[T, H, D]"]),
    ("merge_attn_states", "prefix_output", array(T, H, D, dtype=jnp.int32), {}, ["int32[6,4,32]", "bfloat16"]),
    ("merge_attn_states", "prefix_output", array(T, H, D, dtype=jnp.float8_e4m3fn), {}, ["float8_e4m3fn", "bfloat16"]),
    ("merge_attn_states", "prefix_output", Listed([[[1.0]]]), {}, ["a list", "[T, H, D]"]),
    ("merge_attn_states", "prefix_output", Listed(None), {}, ["a NoneType", "[T, H, D]"]),
    ("merge_attn_states", "prefix_output", Listed(np.ones((T, H, D))), {}, ["float64[6,4,32]", "float32"]),
    ("merge_attn_states", "suffix_output", array(T + 1, H, D), {}, ["float32[7,4,32]", "[6, 4, 32]"]),
    ("merge_attn_states", "suffix_output", array(T, H, D, dtype=jnp.bfloat16), {}, ["bfloat16[6,4,32]", "float32"]),
    ("merge_attn_states", "suffix_output", array(T, H), {}, ["float32[6,4]", "[6, 4, 32]", "alike"]),
    ("merge_attn_states", "prefix_lse", array(T, H), {}, ["float32[6,4]", "[4, 6]", "lse_layout='TH'"]),
    ("merge_attn_states", "prefix_lse", array(H, T), {"lse_layout": "TH"}, ["[6, 4]", "lse_layout='HT'"]),
    ("merge_attn_states", "suffix_lse", array(H, T + 1), {}, ["float32[4,7]", "[4, 6]"]),
    ("merge_attn_states", "suffix_lse", array(H, T, dtype=jnp.bfloat16), {}, ["bfloat16[4,6]", "float32"]),
    ("merge_attn_states", "prefix_lse", array(H, T, dtype=jnp.int32), {}, ["int32[4,6]", "float32"]),
    ("merge_attn_states", "prefix_lse", array(H, T, 1), {}, ["float32[4,6,1]", "[4, 6]"]),
    ("merge_attn_states", "prefix_lse", Listed(None), {}, ["a NoneType", "float32 [4, 6]"]),
    ("merge_attn_states", "prefill_tokens_with_context", Listed(-1), {}, ["-1", "0 to T = 6"]),
    ("merge_attn_states", "prefill_tokens_with_context", Listed(T + 1), {}, ["7", "0 to T = 6"]),
    ("merge_attn_states", "prefill_tokens_with_context", Listed(np.int64(99)), {}, ["99", "0 to T = 6"]),
    ("merge_attn_states", "prefill_tokens_with_context", Listed(np.array([9])), {}, ["9", "0 to T = 6"]),
    ("merge_attn_states", "prefill_tokens_with_context", Listed(True), {}, ["True", "int"]),
    ("merge_attn_states", "prefill_tokens_with_context", Listed(3.0), {}, ["3.0", "int"]),
    ("merge_attn_states", "prefill_tokens_with_context", Listed("3"), {}, ["'3'", "int"]),
    ("merge_attn_states", "prefill_tokens_with_context", array(2, dtype=jnp.int32), {}, ["int32[2]", "one-element"]),
    ("merge_attn_states", "prefill_tokens_with_context", array(), {}, ["float32[]", "integer"]),
    ("merge_attn_states", "output_quant", Listed("fp8"), {}, ["'fp8'", "Fp8PerTensor", "Fp8PerGroup"]),
    ("merge_attn_states", "output_quant", Listed(Fp8PerGroup), {}, ["Fp8PerGroup", "Fp8PerTensor(scale)"]),
    ("merge_attn_states", "output_quant", Listed(jnp.float8_e4m3fn), {}, ["Fp8PerTensor(scale)"]),
    ("merge_attn_states", "output_quant.group_size", Listed(Fp8PerGroup(64)), {}, ["64", "32 columns", "multiple"]),
    ("merge_attn_states", "output_quant.scale", Listed(Fp8PerTensor(None)), {}, ["None", "one number"]),
    ("merge_attn_states", "output_quant.scale", Listed(Fp8PerTensor(np.ones(3))), {}, ["one number", "Fp8PerGroup"]),
    ("merge_attn_states", "output_quant.scale", Listed(Fp8PerTensor("0.5")), {}, ["'0.5'", "one number"]),
    ("merge_attn_states", "output_quant.scale", Listed(Fp8PerTensor(True)), {}, ["True", "one number"]),
    ("merge_attn_states", "output_scale", Listed(0.5), {"output_quant": Fp8PerGroup(32)}, ["output_quant", "one of"]),
    ("merge_attn_states", "output_scale", array(H), {}, ["float32[4]", "one element"]),
    ("merge_attn_states", "output_scale", Listed("0.5"), {}, ["'0.5'", "a number"]),
    ("merge_attn_states", "output_scale", Listed(False), {}, ["False", "a number"]),
    ("merge_attn_states", "output_scale", array(dtype=jnp.complex64), {}, ["complex64[]", "a number"]),
    ("merge_attn_states", "lse_layout", Listed("ht"), {}, ["'ht'", "'HT'", "'TH'"]),
    ("merge_attn_states", "lse_layout", Listed(None), {}, ["None", "'HT'"]),
    ("merge_attn_states", "lse_base", Listed(2), {}, ["2", "'e', '2'"]),
    ("merge_attn_states", "lse_base", Listed("10"), {}, ["'10'", "'e', '2'"]),
    ("merge_attn_states", "return_lse", Listed(1), {}, ["1", "True or False"]),
    ("merge_attn_states", "return_lse", array(dtype=jnp.bool_), {}, ["bool[]", "static"]),
    ("merge_attn_states", "out_dtype", Listed(jnp.float8_e4m3fn), {}, ["float8_e4m3fn", "output_quant"]),
    ("merge_attn_states", "out_dtype", Listed("double"), {}, ["double", "float32"]),
    ("merge_attn_states", "out_dtype", Listed("nonsense"), {}, ["'nonsense'", "float32"]),
    ("merge_attn_states", "out_dtype", Listed(jnp.bfloat16), {"output_scale": 0.5}, ["bfloat16", "output_quant"]),
    ("merge_attn_states", "implementation", Listed("cuda"), {}, ["'cuda'", "'xla'"]),
    ("merge_attn_states", "implementation", Listed(0), {}, ["0", "'xla'"]),
    ("merge_attn_states_n", "outputs", array(T, H, D), {}, ["float32[6,4,32]", "[N, T, H, D]"]),
    ("merge_attn_states_n", "outputs", array(0, T, H, D), {}, ["float32[0,6,4,32]", "N >= 1"]),
    ("merge_attn_states_n", "outputs", Listed((1, 2)), {}, ["a tuple", "[N, T, H, D]"]),
    ("merge_attn_states_n", "lses", array(2, H, T), {}, ["float32[2,4,6]", "[3, 4, 6]"]),
    ("merge_attn_states_n", "lses", array(3, T, H), {}, ["float32[3,6,4]", "[3, 4, 6]", "lse_layout='TH'"]),
    ("merge_attn_states_n", "lses", array(3, H, T, dtype=jnp.float16), {}, ["float16[3,4,6]", "float32"]),
    ("merge_attn_states_n", "lses", array(H, T), {}, ["float32[4,6]", "[3, 4, 6]"]),
    ("merge_attn_states_n", "output_quant.group_size", Listed(Fp8PerGroup(128)), {}, ["128", "32 columns"]),
    ("mask_empty_context_lse", "lse", array(T), {}, ["float32[6]", "[H, T]"]),
    ("mask_empty_context_lse", "lse", array(H, T, dtype=jnp.bfloat16), {}, ["bfloat16[4,6]", "float32"]),
    ("mask_empty_context_lse", "query_start_loc", array(B + 1), {}, ["float32[3]", "int32"]),
    ("mask_empty_context_lse", "query_start_loc", array(1, B, dtype=jnp.int32), {}, ["int32[1,2]", "[B+1]"]),
    ("mask_empty_context_lse", "query_start_loc", Listed([0, 3, 6]), {}, ["a list", "int32"]),
    ("mask_empty_context_lse", "context_start_loc", array(B, dtype=jnp.int32), {}, ["int32[2]", "[3]"]),
    (
        "mask_empty_context_lse",
        "query_start_loc",
        array(0, dtype=jnp.int32),
        {"context_start_loc": array(0, dtype=jnp.int32)},
        ["int32[0]", "[B+1]", "[0]"],
    ),
    ("quantize_fp8", "x", array(T), {}, ["float32[6]", "[T, K] or [T, H, D]"]),
    ("quantize_fp8", "x", array(1, T, H, D), {}, ["float32[1, 6, 4, 32]", "[T, K] or [T, H, D]"]),
    ("quantize_fp8", "x", array(T, D, dtype=jnp.int32), {}, ["int32[6, 32]", "float array"]),
    ("quantize_fp8", "x", array(T, D, dtype=jnp.float8_e4m3fn), {}, ["float8_e4m3fn[6, 32]", "float array"]),
    ("quantize_fp8", "x", Listed([[1.0]]), {}, ["a list", "float array"]),
    ("quantize_fp8", "spec", Listed(None), {}, ["None", "Fp8PerTensor(scale)"]),
    ("quantize_fp8", "spec", Listed(0.5), {}, ["0.5", "Fp8PerTensor(scale)"]),
    ("quantize_fp8", "spec.group_size", Listed(Fp8PerGroup(64)), {}, ["64", "32 columns", "multiple"]),
    ("quantize_fp8", "spec.scale", Listed(Fp8PerTensor(np.ones((2, 2)))), {}, ["one number", "Fp8PerGroup"]),
]


def call(op: str, arguments: dict[str, Any], transform: Callable[..., Any]) -> Any:
    """Traces the op with the shapes as operands and the rest as written."""
    traced = {name: x for name, x in arguments.items() if isinstance(x, jax.ShapeDtypeStruct)}
    static = {n: x.value if isinstance(x, Listed) else x for n, x in arguments.items() if n not in traced}
    return transform(lambda **operands: getattr(fp8attn, op)(**operands, **static), **traced)


class TestWrongCalls:
    """R15: InvalidInputError while tracing: the argument, what came, what was expected."""

    def test_the_good_calls_are_good(self) -> None:
        for op, arguments in GOOD.items():
            call(op, arguments, jax.eval_shape)
        assert len(BAD) >= 60

    @pytest.mark.parametrize(("op", "argument", "value", "changes", "texts"), BAD)
    def test_the_message(self, op: str, argument: str, value: Any, changes: Any, texts: list[str]) -> None:
        arguments = {**GOOD[op], **changes, argument.split(".")[0]: value}
        with pytest.raises(InvalidInputError) as caught:
            call(op, arguments, jax.eval_shape)
        message = str(caught.value)
        assert message.startswith(f"{op}: {argument} is ") and "; expected " in message and message.endswith(".")
        for text in texts:
            assert text in message, message

    def test_under_jit_and_eagerly(self) -> None:
        """The same error from a compiled function and from a plain call."""
        output, lse = np.ones((T, H, D), np.float32), np.zeros((T, H), np.float32)
        for transform in (lambda f: f, jax.jit, jax.vmap):
            arguments = [output, lse, output, lse]
            if transform is jax.vmap:
                arguments = [x[None] for x in arguments]
            with pytest.raises(InvalidInputError, match="merge_attn_states: prefix_lse is float32"):
                transform(fp8attn.merge_attn_states)(*arguments)

    def test_square_lse_of_a_wrong_type_is_not_called_transposed(self) -> None:
        output, lse = np.ones((H, H, D), np.float32), np.zeros((H, H), np.float16)
        with pytest.raises(InvalidInputError) as caught:
            fp8attn.merge_attn_states(output, lse, output, lse)
        assert "looks like" not in str(caught.value)

    @pytest.mark.parametrize(
        ("build", "texts"),
        [
            (lambda: Fp8PerGroup(0), ["group_size is 0", "32, 64 or 128"]),
            (lambda: Fp8PerGroup(16), ["group_size is 16", "32, 64 or 128"]),
            (lambda: Fp8PerGroup("128"), ["group_size is '128'", "32, 64 or 128"]),
            (lambda: Fp8PerGroup(128, "e8m0"), ["scale_format is 'e8m0'", "'ue8m0'"]),
            (lambda: Fp8PerGroup(128, "float32", "column"), ["scale_layout is 'column'", "'col_tma_packed'"]),
            (lambda: Fp8PerGroup(128, "float32", "col_tma_packed"), ["col_tma_packed", "scale_format='ue8m0'"]),
            (lambda: Fp8PerGroup(64, "ue8m0", "col_tma_packed"), ["col_tma_packed", "32 and 128"]),
            (lambda: Fp8PerGroup(eps=0.0), ["eps is 0.0", "1e-30"]),
            (lambda: Fp8PerGroup(eps=-1.0), ["eps is -1.0", "1e-30"]),
            (lambda: Fp8PerGroup(eps=float("nan")), ["eps is nan", "1e-30"]),
            (lambda: Fp8PerGroup(eps=float("inf")), ["eps is inf", "1e30"]),
            (lambda: Fp8PerGroup(eps=1e-45), ["eps is 1e-45", "1e-30"]),
            (lambda: Fp8PerGroup(eps="1e-10"), ["eps is '1e-10'", "float"]),
            (lambda: Fp8PerTensor(1.0, jnp.float8_e5m2), ["dtype is", "float8_e5m2", "float8_e4m3fn"]),
            (lambda: Fp8PerTensor(1.0, "e4m3"), ["dtype is 'e4m3'", "float8_e4m3fn"]),
            (lambda: Fp8PerTensor(1.0, jnp.bfloat16), ["bfloat16", "float8_e4m3fnuz"]),
            (lambda: fp8attn.explain("merge"), ["op is 'merge'", "merge_attn_states"]),
        ],
    )
    def test_specs_and_explain(self, build: Callable[[], Any], texts: list[str]) -> None:
        """R15, group 26."""
        with pytest.raises(InvalidInputError) as caught:
            build()
        for text in texts:
            assert text in str(caught.value)


class TestReport:
    """The one place that raises or checks a value."""

    def test_names_the_first_bad_position(self) -> None:
        bad = np.zeros((2, 3, 4), bool)
        checks.report("op", "x", bad, "is bad")
        bad[1, 2, 0] = bad[1, 2, 3] = True
        with pytest.raises(InvalidInputError, match=r"^op: x\[1, 2, 0\] is bad$"):
            checks.report("op", "x", bad, "is bad")
        with pytest.raises(InvalidInputError, match=r"^op: x is bad$"):
            checks.report("op", "x", np.bool_(True), "is bad")
        checks.report("op", "x", False, "is bad")

    def test_under_checkify(self) -> None:
        checked = checkify.checkify(jax.jit(lambda x: checks.report("op", "x", x < 0, "is negative")))
        checked(jnp.ones((2, 3)))[0].throw()
        error, _ = checked(jnp.ones((2, 3)).at[1, 1].set(-1))
        with pytest.raises(checkify.JaxRuntimeError, match=r"op: x\[4\] \(flattened\) is negative"):
            error.throw()

    def test_nothing_to_check(self) -> None:
        checks.report("op", "x", np.zeros(0, bool), "is bad")
        checkify.checkify(lambda x: checks.report("op", "x", x < 0, "is bad"))(jnp.zeros(0))[0].throw()


@functools.cache
def compiled(check: Callable[..., None]) -> Callable[..., Any]:
    return jax.jit(checkify.checkify(check))


def outcomes(check: Callable[..., None], *arguments: Any) -> tuple[str | None, str | None]:
    """The message on the host, for numpy and jax arrays, and the one under checkify and jit."""
    messages: list[str | None] = []
    for arrays in (arguments, tuple(map(jnp.asarray, arguments))):
        try:
            check(*arrays)
            messages.append(None)
        except InvalidInputError as error:
            messages.append(str(error))
    assert messages[0] == messages[1]
    return messages[0], compiled(check)(*arguments)[0].get()


def check_offsets(x: Any) -> None:
    checks.offsets("op", "cu", x, 8)


def check_scale(x: Any) -> None:
    checks.scale("op", "s", x)


def check_merge(count: Any, scale: Any) -> None:
    output, lse = np.ones((T, H, D), np.float32), np.zeros((H, T), np.float32)
    options = {"prefill_tokens_with_context": count, "output_scale": scale, "return_lse": True}
    checks.merge_attn_states(output, lse, output, lse, **options)


class TestValues:
    """R4, R7, R15: what the ops make harmless, as errors on demand."""

    @pytest.mark.parametrize(
        ("offsets", "message"),
        [
            ([0, 3, 8], None),
            ([0, 0, 0], None),
            ([2, 2, 5], None),
            ([0], None),
            ([0, -1, 3], "op: cu[1] is negative"),
            ([0, 4, 3], "op: cu[2] is smaller than the offset before it"),
            ([0, 4, 9], "op: cu[2] is larger than 8, the rows there are"),
            ([-(2**31), 2**31 - 1], "op: cu[0] is negative"),
        ],
    )
    def test_offsets(self, offsets: list[int], message: str | None) -> None:
        host, traced = outcomes(check_offsets, np.int32(offsets))
        assert host == message
        assert (traced is None) == (message is None)
        if message:
            assert traced.startswith(message.replace("]", "] (flattened)"))
        checks.offsets("op", "cu", None, 8)

    @pytest.mark.parametrize("value", [0.0, -1.0, np.inf, -np.inf, np.nan])
    def test_scales(self, value: float) -> None:
        for good in (1.0, 1e-30, 3e38):
            assert outcomes(check_scale, np.float32(good)) == (None, None)
        host, traced = outcomes(check_scale, np.float32(value))
        assert host == "op: s is not a positive finite number"
        assert traced.startswith("op: s[0] (flattened) is not a positive finite number")
        with pytest.raises(InvalidInputError, match="not a positive finite number"):
            checks.scale("op", "s", value)
        checks.scale("op", "s", None)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({}, None),
            ({"count": 0}, None),
            ({"count": T}, None),
            ({"count": -1}, "prefill_tokens_with_context is not in 0 to T = 6"),
            ({"count": T + 1}, "prefill_tokens_with_context is not in 0 to T = 6"),
            ({"scale": 0.0}, "output_scale is not a positive finite number"),
            ({"scale": -0.5}, "output_scale is not a positive finite number"),
            ({"scale": np.nan}, "output_scale is not a positive finite number"),
        ],
    )
    def test_merge_attn_states(self, changes: dict[str, Any], message: str | None) -> None:
        count, scale = np.int32(changes.get("count", 3)), np.float32(changes.get("scale", 0.5))
        host, traced = outcomes(check_merge, count, scale)
        assert (host is None) == (traced is None) == (message is None)
        if message:
            name, _, rest = message.partition(" ")
            assert host == f"merge_attn_states: {message}"
            assert traced.startswith(f"merge_attn_states: {name}[0] (flattened) {rest}")

    def test_merge_attn_states_with_a_spec(self) -> None:
        output, lse = np.ones((T, H, D), np.float32), np.zeros((H, T), np.float32)
        checks.merge_attn_states(output, lse, output, lse, output_quant=Fp8PerGroup(32))
        checks.merge_attn_states(output, lse, output, lse, output_quant=Fp8PerTensor(0.5))
        with pytest.raises(InvalidInputError, match=r"output_quant\.scale is not a positive finite number"):
            checks.merge_attn_states(output, lse, output, lse, output_quant=Fp8PerTensor(np.inf))

    def test_together_with_the_op(self) -> None:
        """Under one checkify: the check reports, the op stays harmless."""
        output, lse = jnp.ones((T, H, D)), jnp.zeros((H, T))

        def step(count: jax.Array) -> jax.Array:
            checks.merge_attn_states(output, lse, output, lse, prefill_tokens_with_context=count)
            return fp8attn.merge_attn_states(output, lse, output, lse, prefill_tokens_with_context=count)

        error, out = jax.jit(checkify.checkify(step))(jnp.int32(99))
        assert "prefill_tokens_with_context" in error.get() and out.shape == (T, H, D)
        error, _ = jax.jit(checkify.checkify(step))(jnp.int32(4))
        assert error.get() is None


class TestHelpers:
    def test_describe(self) -> None:
        assert checks.describe(np.zeros((2, 3), np.int8)) == "int8[2,3]"
        assert checks.describe(array(4, dtype=jnp.bfloat16)) == "bfloat16[4]"
        assert checks.describe("text") == "'text'"

    def test_scalar(self) -> None:
        for x in (2, 2.0, np.float16(2), np.array([[2]]), jnp.full((1,), 2, jnp.bfloat16)):
            value = checks.scalar("op", "x", x)
            assert value.shape == () and value.dtype == jnp.float32 and value == 2
        assert checks.scalar("op", "x", None, default=0.5) == 0.5
        for x in (None, "2", True, np.ones(2), np.zeros(0), 1j, [2.0]):
            with pytest.raises(InvalidInputError, match="op: x is "):
                checks.scalar("op", "x", x)

    def test_option_distinguishes_types(self) -> None:
        checks.option("op", "x", "a", ("a", 1))
        for x in ("b", True, 1.0, None):
            with pytest.raises(InvalidInputError, match=r"op: x is .*; expected one of 'a', 1\."):
                checks.option("op", "x", x, ("a", 1))

    def test_array(self) -> None:
        x = np.ones((2, 3), np.float32)
        assert isinstance(checks.array("op", "x", x, ("T", 3), [jnp.float32]), jax.Array)
        for shape in (("T",), ("T", 4), (2, 3, 1), ()):
            with pytest.raises(InvalidInputError, match="op: x is float32"):
                checks.array("op", "x", x, shape, [jnp.float32])

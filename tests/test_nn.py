"""The Flax modules against naive models of the published layers, step by step, and their checkpoints."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import nn_models
import numpy as np
import pytest
from gdn_cases import quick_jit

from jax_fp8attn import Fp8Array, Fp8PerGroup, Fp8PerTensor
from jax_fp8attn.errors import InvalidInputError, UnsupportedError
from jax_fp8attn.testing import relative_error

pytest.importorskip("flax", minversion="0.12", reason="jax_fp8attn.nn needs flax 0.12 or newer")
from flax import nnx

from jax_fp8attn import nn

HIDDEN, TOKENS = 48, 40
LENGTHS = (17, 0, 14)  # nine tokens of no request follow
YARN = {
    "type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 1.0,
}  # fmt: skip
STEPS = [[(5, 0, 3), (12, 0, 0), (0, 0, 11)], [(1, 0, 13), (9, 0, 1), (7, 0, 0)]]  # tokens a call of each request


def offsets(lengths: Any) -> jax.Array:
    return jnp.asarray(np.cumsum([0, *lengths]), jnp.int32)


def numbered(lengths: Any, total: int) -> tuple[jax.Array, jax.Array]:
    """Request (-1: none) and position of each token."""
    rest = total - sum(lengths)
    owner = np.concatenate([np.repeat(np.arange(len(lengths)), lengths), np.full(rest, -1)])
    position = np.concatenate([*[np.arange(n) for n in lengths], np.zeros(rest)])
    return jnp.asarray(owner, jnp.int32), jnp.asarray(position, jnp.int32)


def inputs(total: int, lengths: Any, seed: int = 7) -> jax.Array:
    """Random; NaN in tokens of no request."""
    x = np.random.default_rng(seed).standard_normal((total, HIDDEN)).astype(np.float32)
    x[sum(lengths) :] = np.nan
    return jnp.asarray(x)


def weights(shapes: dict[str, tuple[int, ...]], seed: int = 3) -> dict[str, np.ndarray]:
    """A random checkpoint: matrices keep sizes, everything else lies around 1."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, shape in shapes.items():
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        result[name] = (rng.standard_normal(shape) * scale + (len(shape) == 1)).astype(np.float32)
    return result


def compiled(module: nnx.Module) -> SimpleNamespace:
    """The module as a jitted function of its own, that counts its traces."""
    graph, state = nnx.split(module)
    counter = SimpleNamespace(traces=0)

    @quick_jit
    def step(state: Any, *arguments: Any) -> Any:
        counter.traces += 1
        return nnx.merge(graph, state)(*arguments)

    return SimpleNamespace(module=module, counter=counter, step=functools.partial(step, state))


def in_steps(call: Any, x: jax.Array, lengths: Any, steps: Any, cache: Any, seed: int = 0) -> np.ndarray:
    """All tokens of x, as calls with some tokens of each request; ``call(x, lengths, before, cache)``."""
    start, before = np.cumsum([0, *lengths])[:-1], np.zeros(len(lengths), int)
    result = np.full((x.shape[0], HIDDEN), np.nan, np.float32)
    for counts in steps:
        index = np.concatenate([np.arange(s + b, s + b + n) for s, b, n in zip(start, before, counts, strict=True)])
        packed = np.full(x.shape, np.nan, np.float32)
        packed[: len(index)] = np.asarray(x)[index]
        out, cache = call(jnp.asarray(packed), counts, before, cache)
        result[index] = np.asarray(out)[: len(index)]
        before = before + np.asarray(counts)
    assert tuple(before) == tuple(lengths)
    return result


def int32(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.int32)


MLA_SHAPES = {
    "q_a_proj.weight": (24, HIDDEN), "q_a_layernorm.weight": (24,), "q_b_proj.weight": (2 * 192, 24),
    "kv_a_proj_with_mqa.weight": (32 + 64, HIDDEN), "kv_a_layernorm.weight": (32,),
    "kv_b_proj.weight": (2 * 256, 32), "o_proj.weight": (HIDDEN, 2 * 128),
}  # fmt: skip
MLA_CONFIG = {
    "hidden_size": HIDDEN, "num_attention_heads": 2, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "rope_theta": 10000, "rope_scaling": YARN, "rms_norm_eps": 1e-6,
    "attention_bias": False,
}  # fmt: skip
TABLES = [[6, 1, 4], [0, 3, 9], [2, 8, 5]]  # blocks of 8 positions


def make_mla(tensors: Any, config: Any, dtype: Any = jnp.float32, **options: Any) -> nn.MLAttention:
    options = {"compute": "bf16", "workspace_tokens": 8, **options}
    module = nn.MLAttention(
        nn.MLAConfig.from_config(config), dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0), **options
    )
    nn.load_checkpoint(module, tensors)
    return module


def mla_call(step: Any, tables: Any = TABLES) -> Any:
    def call(x: jax.Array, counts: Any, before: Any, cache: Any) -> Any:
        return step(x, nn.PagedBatch(offsets(counts), int32(before), int32(tables)), cache)

    return call


@pytest.fixture(scope="module")
def mla() -> SimpleNamespace:
    tensors = weights(MLA_SHAPES)
    made = compiled(make_mla(tensors, MLA_CONFIG))
    x = inputs(TOKENS, LENGTHS)
    cache = jnp.full_like(made.module.init_cache(10, 8), jnp.nan)
    expected = quick_jit(lambda w, x: nn_models.mla(w, x, *numbered(LENGTHS, TOKENS), 2, 1e4, YARN))(tensors, x)
    expected = np.asarray(expected)[: sum(LENGTHS)]
    return SimpleNamespace(**vars(made), tensors=tensors, x=x, cache=cache, expected=expected)


class TestMLAttention:
    def test_one_shot(self, mla: SimpleNamespace) -> None:
        """The model's outputs out of a cache full of NaN; zeros for tokens of no request, NaN inputs or not."""
        out, cache = mla_call(mla.step)(mla.x, LENGTHS, (0, 0, 0), mla.cache)
        assert relative_error(out[: sum(LENGTHS)], mla.expected) < 1e-5
        assert not np.asarray(out)[sum(LENGTHS) :].any()
        written = ~np.isnan(np.asarray(cache)).any(-1)
        assert written.sum() == sum(LENGTHS) and written[6].all() and not written[[0, 3, 9]].any()

    @pytest.mark.parametrize("steps", STEPS)
    def test_in_steps(self, mla: SimpleNamespace, steps: Any) -> None:
        """Any split into calls gives the one shot's result; a cache row that no context has is never read."""
        out = in_steps(mla_call(mla.step), mla.x, LENGTHS, steps, mla.cache)
        assert relative_error(out[: sum(LENGTHS)], mla.expected) < 1e-5

    def test_alone(self, mla: SimpleNamespace) -> None:
        """A request among others is the request alone."""
        alone = jnp.full_like(mla.x, jnp.nan).at[:14].set(mla.x[17:31])
        out, _ = mla_call(mla.step)(alone, (14, 0, 0), (0, 0, 0), mla.cache)
        assert relative_error(out[:14], mla.expected[17:]) < 1e-5

    @pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1, -(2**31)])
    def test_hostile(self, mla: SimpleNamespace, bad: int) -> None:
        """Bad blocks and context lengths of one request change no result of another, and no bit of its cache."""
        call = mla_call(mla.step)
        _, cache = call(mla.x, LENGTHS, (0, 0, 0), mla.cache)
        good, good_cache = call(mla.x, (3, 4, 2), (17, 0, 14), cache)
        tables = [TABLES[0], [bad] * 3, TABLES[2]]
        out, bad_cache = mla_call(mla.step, tables)(mla.x, (3, 4, 2), (17, bad, 14), cache)
        others = np.r_[0:3, 7:9]
        np.testing.assert_allclose(np.asarray(out)[others], np.asarray(good)[others], rtol=1e-4, atol=1e-5)
        touched = np.asarray(TABLES)[[0, 2]].ravel()
        np.testing.assert_array_equal(np.asarray(bad_cache)[touched], np.asarray(good_cache)[touched])
        np.testing.assert_array_equal(np.asarray(bad_cache)[TABLES[1]], np.asarray(cache)[TABLES[1]])

    def test_one_trace(self, mla: SimpleNamespace) -> None:
        """Lengths, contexts and tables are traced."""
        call = mla_call(mla.step)
        for counts, before in (((40, 0, 0), (0, 0, 0)), ((1, 1, 1), (5, 6, 7)), ((0, 0, 0), (0, 0, 0))):
            call(mla.x, counts, before, mla.cache)
        assert mla.counter.traces == 1

    def test_without_lora_and_cache(self) -> None:
        """The form of DeepSeek-V2-Lite, and biases; new tokens alone."""
        shapes = {n: s for n, s in MLA_SHAPES.items() if not n.startswith("q_")}
        shapes |= {"q_proj.weight": (2 * 192, HIDDEN), "o_proj.bias": (HIDDEN,), "kv_a_proj_with_mqa.bias": (96,)}
        tensors = weights(shapes)
        config = {**MLA_CONFIG, "q_lora_rank": None, "rope_scaling": None, "attention_bias": True}
        x = inputs(TOKENS, LENGTHS)
        out, cache = compiled(make_mla(tensors, config)).step(x, nn.PagedBatch(offsets(LENGTHS)))
        model = quick_jit(lambda w, x: nn_models.mla(w, x, *numbered(LENGTHS, TOKENS), 2, 1e4, None))
        expected = model(tensors, x)
        assert cache is None
        assert relative_error(out[: sum(LENGTHS)], expected[: sum(LENGTHS)]) < 1e-5

    def test_fp8(self, mla: SimpleNamespace) -> None:
        """bf16 weights, FP8 attention, FP8 output a group into o_proj, in steps: what the model has in FP8."""
        seen = []

        class Recording(nn.MLAttention):
            def project_output(self, out: Any) -> jax.Array:
                seen.append(out)
                return super().project_output(out)

        config = nn.MLAConfig.from_config(MLA_CONFIG)
        spec = Fp8PerGroup.deepgemm_sm90()
        module = Recording(config, compute="fp8", output_quant=spec, workspace_tokens=8, rngs=nnx.Rngs(0))
        nn.load_checkpoint(module, mla.tensors)
        made = compiled(module)
        cache = jnp.full_like(module.init_cache(10, 8), jnp.nan)
        assert cache.dtype == jnp.bfloat16
        out = in_steps(mla_call(made.step), mla.x, LENGTHS, STEPS[0], cache)[: sum(LENGTHS)]
        assert isinstance(seen[0], Fp8Array) and seen[0].spec == spec and made.counter.traces == 1
        assert relative_error(out, mla.expected) > 0.03
        model = quick_jit(lambda w, x: nn_models.mla(w, x, *numbered(LENGTHS, TOKENS), 2, 1e4, YARN, fp8=True))
        assert relative_error(out, model(mla.tensors, mla.x)[: sum(LENGTHS)]) < 0.02

    def test_bf16(self, mla: SimpleNamespace) -> None:
        """bf16 throughout."""
        made = compiled(make_mla(mla.tensors, MLA_CONFIG, jnp.bfloat16))
        out, _ = made.step(mla.x, nn.PagedBatch(offsets(LENGTHS)))
        assert relative_error(out[: sum(LENGTHS)], mla.expected) < 0.015

    def test_config(self) -> None:
        config = nn.MLAConfig.from_config(MLA_CONFIG)
        assert config.rope == nn.Rope(1e4, nn.Yarn(40.0, 64, 32.0, 1.0, 0.707, 1.0))
        newer = {k: v for k, v in MLA_CONFIG.items() if not k.startswith("rope_")}
        newer["rope_parameters"] = {"rope_theta": 5e4, "rope_type": "default"}
        assert nn.MLAConfig.from_config(newer).rope == nn.Rope(5e4)
        with pytest.raises(UnsupportedError, match=r"\(192, 64, 256\)"):
            nn.MLAConfig.from_config({**MLA_CONFIG, "qk_nope_head_dim": 192, "v_head_dim": 256})
        with pytest.raises(UnsupportedError, match="longrope"):
            nn.MLAConfig.from_config({**MLA_CONFIG, "rope_scaling": {"type": "longrope"}})

    def test_wrong_calls(self, mla: SimpleNamespace) -> None:
        call, batch = mla.module, nn.PagedBatch(offsets(LENGTHS), int32([0, 0, 0]), int32(TABLES))
        with pytest.raises(InvalidInputError, match="cache is None while batch has context_lengths"):
            call(mla.x, batch)
        with pytest.raises(InvalidInputError, match=r"batch\.block_tables"):
            call(mla.x, nn.PagedBatch(offsets(LENGTHS), int32([0, 0, 0])), mla.cache)
        with pytest.raises(InvalidInputError, match=r"cache is bfloat16\[10,8,96\]; expected float32"):
            call(mla.x, batch, mla.cache.astype(jnp.bfloat16))
        with pytest.raises(InvalidInputError, match="output_quant"):
            nn.MLAttention(mla.module.config, output_quant=Fp8PerTensor(1.0), rngs=nnx.Rngs(0))


GDN_SHAPES = {
    "in_proj_qkvz.weight": (2 * (16 + 16 + 32 + 32), HIDDEN), "in_proj_ba.weight": (8, HIDDEN),
    "conv1d.weight": (128, 1, 4), "A_log": (4,), "dt_bias": (4,), "norm.weight": (16,), "out_proj.weight": (HIDDEN, 64),
}  # fmt: skip
GDN_CONFIG = {
    "hidden_size": HIDDEN, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6,
}  # fmt: skip
GDN_LENGTHS, GDN_TOKENS = (75, 0, 14), 96
GDN_STEPS = [[(1, 0, 2), (2, 0, 1), (64, 0, 0), (8, 0, 11)], [(70, 0, 13), (0, 0, 1), (5, 0, 0)]]
SLOTS = (4, 0, 2)


def make_gdn(tensors: Any, dtype: Any = jnp.float32) -> nn.GatedDeltaNet:
    config = nn.GatedDeltaNetConfig.from_config(GDN_CONFIG)
    module = nn.GatedDeltaNet(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    nn.load_checkpoint(module, tensors)
    return module


def gdn_call(step: Any, slots: Any = SLOTS) -> Any:
    def call(x: jax.Array, counts: Any, before: Any, cache: Any) -> Any:
        return step(x, nn.SlotBatch(offsets(counts), int32(slots), jnp.asarray(before) > 0), cache)

    return call


@pytest.fixture(scope="module")
def gdn() -> SimpleNamespace:
    tensors = weights(GDN_SHAPES)
    made = compiled(make_gdn(tensors))
    x = inputs(GDN_TOKENS, GDN_LENGTHS)
    cache = jax.tree.map(lambda z: jnp.full_like(z, jnp.nan), made.module.init_cache(5))
    model = quick_jit(lambda w, x: nn_models.gated_delta_net(w, x, *numbered(GDN_LENGTHS, GDN_TOKENS), 2, 4, 16, 16))
    expected = np.asarray(model(tensors, x))[: sum(GDN_LENGTHS)]
    return SimpleNamespace(**vars(made), tensors=tensors, x=x, cache=cache, model=model, expected=expected)


class TestGatedDeltaNet:
    def test_one_shot(self, gdn: SimpleNamespace) -> None:
        """The model's outputs out of a pool full of NaN; rows of the pool that no request has keep their bits."""
        out, cache = gdn_call(gdn.step)(gdn.x, GDN_LENGTHS, (0, 0, 0), gdn.cache)
        assert relative_error(out[: sum(GDN_LENGTHS)], gdn.expected) < 1e-5
        assert not np.asarray(out)[sum(GDN_LENGTHS) :].any()
        for pool in (cache.conv, cache.state):
            assert np.isnan(np.asarray(pool)[[1, 3]]).all() and np.isfinite(np.asarray(pool)[list(SLOTS)]).all()
            assert not np.asarray(pool)[0].any()  # an empty request starts anew

    @pytest.mark.parametrize("steps", GDN_STEPS)
    def test_in_steps(self, gdn: SimpleNamespace, steps: Any) -> None:
        """Any split into calls, of fewer tokens than the convolution is wide, too."""
        out = in_steps(gdn_call(gdn.step), gdn.x, GDN_LENGTHS, steps, gdn.cache)
        assert relative_error(out[: sum(GDN_LENGTHS)], gdn.expected) < 1e-5

    def test_alone(self, gdn: SimpleNamespace) -> None:
        alone = jnp.full_like(gdn.x, jnp.nan).at[:14].set(gdn.x[75:89])
        out, _ = gdn_call(gdn.step)(alone, (14, 0, 0), (0, 0, 0), gdn.cache)
        assert relative_error(out[:14], gdn.expected[75:]) < 1e-5

    @pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31)])
    def test_slots_out_of_range(self, gdn: SimpleNamespace, bad: int) -> None:
        """They start anew and keep nothing."""
        slots = (4, bad, 2)
        _, cache = gdn_call(gdn.step)(gdn.x, GDN_LENGTHS, (0, 0, 0), gdn.cache)
        out, after = gdn_call(gdn.step, slots)(gdn.x, (2, 60, 1), (1, 1, 1), cache)
        fresh, _ = gdn_call(gdn.step)(gdn.x, (2, 60, 1), (1, 0, 1), cache)
        np.testing.assert_array_equal(np.asarray(out), np.asarray(fresh))
        for old, new in ((cache.conv, after.conv), (cache.state, after.state)):
            np.testing.assert_array_equal(np.asarray(old)[[0, 1, 3]], np.asarray(new)[[0, 1, 3]])

    def test_one_trace(self, gdn: SimpleNamespace) -> None:
        gdn_call(gdn.step, (0, 1, 2))(gdn.x, (1, 1, 1), (0, 1, 0), gdn.cache)
        assert gdn.counter.traces == 1

    def test_bf16(self, gdn: SimpleNamespace) -> None:
        made = compiled(make_gdn(gdn.tensors, jnp.bfloat16))
        out, _ = gdn_call(made.step)(gdn.x, GDN_LENGTHS, (0, 0, 0), made.module.init_cache(5))
        assert relative_error(out[: sum(GDN_LENGTHS)], gdn.expected) < 0.015

    def test_qwen3_5(self, gdn: SimpleNamespace) -> None:
        """Four projections instead of two."""
        shapes = {n: s for n, s in GDN_SHAPES.items() if not n.startswith("in_proj")}
        shapes |= {"in_proj_qkv.weight": (128, HIDDEN), "in_proj_z.weight": (64, HIDDEN)}
        shapes |= {"in_proj_b.weight": (4, HIDDEN), "in_proj_a.weight": (4, HIDDEN)}
        tensors = weights(shapes)
        nn.load_checkpoint(gdn.module, tensors)
        state = nnx.state(gdn.module)
        nn.load_checkpoint(gdn.module, gdn.tensors)
        out, _ = gdn_call(functools.partial(gdn.step.func, state))(gdn.x, GDN_LENGTHS, (0, 0, 0), gdn.cache)
        expected = gdn.model(tensors, gdn.x)[: sum(GDN_LENGTHS)]
        assert relative_error(out[: sum(GDN_LENGTHS)], expected) < 1e-5
        assert gdn.counter.traces == 1

    def test_wrong_calls(self, gdn: SimpleNamespace) -> None:
        batch = nn.SlotBatch(offsets(GDN_LENGTHS), int32([0, 1]), jnp.array([False] * 3))
        with pytest.raises(InvalidInputError, match=r"batch\.slots is int32\[2\]; expected int32 \[3\]"):
            gdn.module(gdn.x, batch, gdn.cache)
        with pytest.raises(InvalidInputError, match=r"x is float32\[96,47\]"):
            gdn.module(gdn.x[:, :-1], batch, gdn.cache)

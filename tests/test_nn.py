"""The Flax modules against naive models of the published layers, step by step, and their checkpoints."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import nn_models
import numpy as np
import pytest
from gdn_cases import quick_jit

from jax_fp8attn import Fp8Array, Fp8PerGroup, Fp8PerTensor, gdn_metadata
from jax_fp8attn.errors import InvalidInputError, UnsupportedError
from jax_fp8attn.testing import assert_relative_error, relative_error

pytest.importorskip("flax", minversion="0.12.12", reason="jax_fp8attn.nn needs flax 0.12.12 or newer")
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


def loaded(kind: Any, config: Any, tensors: Any, dtype: Any, **options: Any) -> Any:
    """A module whose parameters are the checkpoint's; random ones are never made."""
    module = nnx.eval_shape(lambda: kind(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0), **options))
    nn.load_checkpoint(module, tensors)
    return module


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


def make_mla(
    tensors: Any, config: Any, dtype: Any = jnp.float32, kind: Any = nn.MLAttention, **options: Any
) -> nn.MLAttention:
    options = {"compute": "bf16", "workspace_tokens": 8, **options}
    return loaded(kind, nn.MLAConfig.from_config(config), tensors, dtype, **options)


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
        assert_relative_error(out[: sum(LENGTHS)], mla.expected, 1e-5)
        assert not np.asarray(out)[sum(LENGTHS) :].any()
        written = ~np.isnan(np.asarray(cache)).any(-1)
        assert written.sum() == sum(LENGTHS) and written[6].all() and not written[[0, 3, 9]].any()

    @pytest.mark.parametrize("steps", STEPS)
    def test_in_steps(self, mla: SimpleNamespace, steps: Any) -> None:
        """Any split into calls gives the one shot's result; a cache row that no context has is never read."""
        out = in_steps(mla_call(mla.step), mla.x, LENGTHS, steps, mla.cache)
        assert_relative_error(out[: sum(LENGTHS)], mla.expected, 1e-5)

    def test_alone(self, mla: SimpleNamespace) -> None:
        """A request among others is the request alone."""
        alone = jnp.full_like(mla.x, jnp.nan).at[:14].set(mla.x[17:31])
        out, _ = mla_call(mla.step)(alone, (14, 0, 0), (0, 0, 0), mla.cache)
        assert_relative_error(out[:14], mla.expected[17:], 1e-5)

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
        assert_relative_error(out[: sum(LENGTHS)], expected[: sum(LENGTHS)], 1e-5)

    def test_fp8(self, mla: SimpleNamespace) -> None:
        """FP8 attention and FP8 output a group into o_proj, in steps: exactly what the model rounds."""
        seen = []

        class Recording(nn.MLAttention):
            def project_output(self, out: Any) -> jax.Array:
                seen.append(out)
                return super().project_output(out)

        spec = Fp8PerGroup.deepgemm_sm90()
        made = compiled(make_mla(mla.tensors, MLA_CONFIG, kind=Recording, compute="fp8", output_quant=spec))
        out = in_steps(mla_call(made.step), mla.x, LENGTHS, STEPS[0], mla.cache)[: sum(LENGTHS)]
        assert isinstance(seen[0], Fp8Array) and seen[0].spec == spec and made.counter.traces == 1
        assert relative_error(out, mla.expected) > 0.03
        model = quick_jit(lambda w, x: nn_models.mla(w, x, *numbered(LENGTHS, TOKENS), 2, 1e4, YARN, fp8=True))
        assert_relative_error(out, model(mla.tensors, mla.x)[: sum(LENGTHS)], 2e-3)

    @pytest.mark.parametrize(("compute", "bound"), [("bf16", 0.015), ("fp8", 0.07)])
    def test_bf16(self, mla: SimpleNamespace, compute: str, bound: float) -> None:
        """Weights, activations and cache in bf16."""
        made = compiled(make_mla(mla.tensors, MLA_CONFIG, jnp.bfloat16, compute=compute))
        assert made.module.init_cache(1, 8).dtype == made.module.q_b_proj.kernel.dtype == jnp.bfloat16
        out, _ = made.step(mla.x, nn.PagedBatch(offsets(LENGTHS)))
        assert_relative_error(out[: sum(LENGTHS)], mla.expected, bound)

    @pytest.mark.slow
    def test_heads_on_two_devices(self, mla: SimpleNamespace) -> None:
        """Tensor parallel under shard_map: a module of a rank's heads, one sum after o_proj, the cache on both."""
        config = nn.MLAConfig.from_config({**MLA_CONFIG, "num_attention_heads": 1})
        rank = nn.MLAttention(
            config, compute="bf16", workspace_tokens=8, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
        )
        state = nnx.state(mla.module)
        axes = {"q_b_proj": jax.P(None, "tp"), "kv_b_proj": jax.P(None, "tp"), "o_proj": jax.P("tp")}
        specs = jax.tree.map_with_path(lambda path, x: axes.get(path[0].key, jax.P()), state)

        def step(state: Any, x: jax.Array, batch: Any, cache: jax.Array) -> Any:
            out, cache = nnx.merge(nnx.graphdef(rank), state)(x, batch, cache)
            return jax.lax.psum(out, "tp"), cache

        auto = (jax.sharding.AxisType.Auto,)
        mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2], axis_types=auto)
        sharded = jax.shard_map(
            step, mesh=mesh, in_specs=(specs, jax.P(), jax.P(), jax.P()), out_specs=jax.P(), check_vma=False
        )
        call = mla_call(functools.partial(quick_jit(sharded), state))
        out = in_steps(call, mla.x, LENGTHS, STEPS[0], mla.cache)
        assert_relative_error(out[: sum(LENGTHS)], mla.expected, 1e-5)

    def test_config(self) -> None:
        config = nn.MLAConfig.from_config(MLA_CONFIG)
        assert config.rope == nn.Rope(1e4, nn.Yarn(40.0, 64, 32.0, 1.0, 0.707, 1.0))
        newer = {k: v for k, v in MLA_CONFIG.items() if not k.startswith("rope_")}
        newer["rope_parameters"] = {"rope_theta": 5e4, "rope_type": "default"}
        assert nn.MLAConfig.from_config(newer).rope == nn.Rope(5e4)
        with pytest.raises(UnsupportedError, match=r"\(192, 64, 256\)"):
            nn.MLAConfig.from_config({**MLA_CONFIG, "qk_nope_head_dim": 192, "v_head_dim": 256})
        with pytest.raises(UnsupportedError, match="rope_interleave"):
            nn.MLAConfig.from_config({**MLA_CONFIG, "rope_interleave": False})
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
    return loaded(nn.GatedDeltaNet, nn.GatedDeltaNetConfig.from_config(GDN_CONFIG), tensors, dtype)


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
        assert_relative_error(out[: sum(GDN_LENGTHS)], gdn.expected, 1e-5)
        assert not np.asarray(out)[sum(GDN_LENGTHS) :].any()
        for pool in (cache.conv, cache.state):
            assert np.isnan(np.asarray(pool)[[1, 3]]).all() and np.isfinite(np.asarray(pool)[list(SLOTS)]).all()
            assert not np.asarray(pool)[0].any()  # an empty request starts anew

    @pytest.mark.parametrize("steps", GDN_STEPS)
    def test_in_steps(self, gdn: SimpleNamespace, steps: Any) -> None:
        """Any split into calls, of fewer tokens than the convolution is wide, too."""
        out = in_steps(gdn_call(gdn.step), gdn.x, GDN_LENGTHS, steps, gdn.cache)
        assert_relative_error(out[: sum(GDN_LENGTHS)], gdn.expected, 1e-5)

    def test_alone(self, gdn: SimpleNamespace) -> None:
        alone = jnp.full_like(gdn.x, jnp.nan).at[:14].set(gdn.x[75:89])
        out, _ = gdn_call(gdn.step)(alone, (14, 0, 0), (0, 0, 0), gdn.cache)
        assert_relative_error(out[:14], gdn.expected[75:], 1e-5)

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
        """With metadata computed once."""
        made = compiled(make_gdn(gdn.tensors, jnp.bfloat16))
        batch = nn.SlotBatch(offsets(GDN_LENGTHS), int32(SLOTS), jnp.array([False] * 3))
        metadata = gdn_metadata(batch.cu_seqlens, GDN_TOKENS, 4)
        out, _ = made.step(gdn.x, batch, made.module.init_cache(5), metadata)
        assert_relative_error(out[: sum(GDN_LENGTHS)], gdn.expected, 0.025)

    def test_qwen3_5(self, gdn: SimpleNamespace) -> None:
        """Four projections instead of two."""
        shapes = {n: s for n, s in GDN_SHAPES.items() if not n.startswith("in_proj")}
        shapes |= {"in_proj_qkv.weight": (128, HIDDEN), "in_proj_z.weight": (64, HIDDEN)}
        shapes |= {"in_proj_b.weight": (4, HIDDEN), "in_proj_a.weight": (4, HIDDEN)}
        tensors = weights(shapes)
        state = nnx.state(make_gdn(tensors))
        out, _ = gdn_call(functools.partial(gdn.step.func, state))(gdn.x, GDN_LENGTHS, (0, 0, 0), gdn.cache)
        expected = gdn.model(tensors, gdn.x)[: sum(GDN_LENGTHS)]
        assert_relative_error(out[: sum(GDN_LENGTHS)], expected, 1e-5)
        assert gdn.counter.traces == 1

    def test_wrong_calls(self, gdn: SimpleNamespace) -> None:
        batch = nn.SlotBatch(offsets(GDN_LENGTHS), int32([0, 1]), jnp.array([False] * 3))
        with pytest.raises(InvalidInputError, match=r"batch\.slots is int32\[2\]; expected int32 \[3\]"):
            gdn.module(gdn.x, batch, gdn.cache)
        with pytest.raises(InvalidInputError, match=r"x is float32\[96,47\]"):
            gdn.module(gdn.x[:, :-1], batch, gdn.cache)


WINDOW, HEADS, GROUPS = 8, 4, 2
SPARSE_SHAPES = {
    "wq_a.weight": (24, HIDDEN), "q_norm.weight": (24,), "wq_b.weight": (HEADS * 512, 24), "wkv.weight": (512, HIDDEN),
    "kv_norm.weight": (512,), "attn_sink": (HEADS,), "wo_a.weight": (GROUPS * 16, HEADS // GROUPS * 512),
    "wo_b.weight": (HIDDEN, GROUPS * 16),
}  # fmt: skip


def sparse_shapes(ratio: int) -> dict[str, tuple[int, ...]]:
    columns = 1024 if ratio == 4 else 512
    made = {"wkv.weight": (columns, HIDDEN), "wgate.weight": (columns, HIDDEN), "ape": (ratio, columns)}
    made["norm.weight"] = (512,)
    return SPARSE_SHAPES | ({f"compressor.{name}": shape for name, shape in made.items()} if ratio else {})


def make_sparse(tensors: Any, ratio: int, dtype: Any = jnp.float32) -> nn.SparseMLAttention:
    config = nn.SparseMLAConfig(HIDDEN, HEADS, 24, 16, GROUPS, WINDOW, ratio, nn.Rope(4e4))
    return loaded(nn.SparseMLAttention, config, tensors, dtype)


def sparse_call(step: Any, slots: Any = SLOTS, tables: Any = TABLES) -> Any:
    """All compressed rows: as the default for ratio 128, by ``selected`` for ratio 4."""

    def call(x: jax.Array, counts: Any, before: Any, cache: Any, selected: Any = None) -> Any:
        batch = nn.WindowBatch(offsets(counts), int32(before), int32(slots), int32(tables))
        if cache.kv.shape[1] != 8:
            return step(x, batch, cache)
        every = np.broadcast_to(np.arange(24), (x.shape[0], 24))
        return step(x, batch, cache, int32(every if selected is None else selected))

    return call


def poisoned(cache: nn.SparseMLACache) -> nn.SparseMLACache:
    """NaN everywhere: byte 0x7F is one in e4m3, byte 255 one in E8M0."""
    fill = lambda z: jnp.full(z.shape, 255, z.dtype) if z.dtype == jnp.uint8 else jnp.full_like(z, jnp.nan)
    return jax.tree.map(fill, cache)


SPARSE_CASES = {
    0: ((17, 0, 14), 40, STEPS),
    4: ((17, 0, 14), 40, STEPS),
    128: ((9, 0, 270), 288, [[(7, 0, 1), (2, 0, 126), (0, 0, 2), (0, 0, 141)]]),
}


@pytest.fixture(scope="module", params=[0, 4, 128], ids=["window", "ratio4", "ratio128"])
def sparse(request: pytest.FixtureRequest) -> SimpleNamespace:
    ratio = request.param
    lengths, total, steps = SPARSE_CASES[ratio]
    tensors = weights(sparse_shapes(ratio))
    made = compiled(make_sparse(tensors, ratio))
    x = inputs(total, lengths)
    cache = poisoned(made.module.init_cache(5, 10, 8))

    @quick_jit
    def model(w: Any, x: Any, chosen: Any = None) -> jax.Array:
        args = (*numbered(lengths, total), lengths, HEADS, GROUPS, WINDOW, ratio, 4e4, chosen)
        return nn_models.sparse_mla(w, x, *args)

    expected = np.asarray(model(tensors, x))[: sum(lengths)]
    fields = {"ratio": ratio, "lengths": lengths, "total": total, "steps": steps, "tensors": tensors, "x": x}
    return SimpleNamespace(**vars(made), **fields, cache=cache, model=model, expected=expected)


class TestSparseMLAttention:
    """Bounds leave room for codes that fall on the other side of a rounding step: 6 % of one number each."""

    def test_one_shot(self, sparse: SimpleNamespace) -> None:
        """The model's outputs out of a cache full of NaN."""
        out, cache = sparse_call(sparse.step)(sparse.x, sparse.lengths, (0, 0, 0), sparse.cache)
        assert_relative_error(out[: sum(sparse.lengths)], sparse.expected, 1e-3)
        assert not np.asarray(out)[sum(sparse.lengths) :].any()
        rows = np.asarray(cache.rows.scale)[:, 0] != 255  # written
        windows = rows[: 5 * WINDOW].reshape(5, WINDOW)
        assert windows[[4, 2]].all() and not windows[[0, 1, 3]].any()
        made = sum(n // sparse.ratio for n in sparse.lengths) if sparse.ratio else 0
        assert rows[5 * WINDOW :].sum() == made

    def test_in_steps(self, sparse: SimpleNamespace) -> None:
        """Any split into calls, within windows and within compressed rows, is the one shot."""
        for steps in sparse.steps:
            out = in_steps(sparse_call(sparse.step), sparse.x, sparse.lengths, steps, sparse.cache)
            assert_relative_error(out[: sum(sparse.lengths)], sparse.expected, 1e-3)
        assert sparse.counter.traces == 1  # of this test and the one before

    def test_selected(self, sparse: SimpleNamespace) -> None:
        """A choice of compressed rows; numbers below 0 and rows to come are skipped."""
        if sparse.ratio != 4:
            pytest.skip("one compress_ratio shows it")
        rng = np.random.default_rng(1)
        choice = np.full((sparse.total, 24), -1)
        choice[:, 5:8] = [rng.permutation(6)[:3] - 1 for _ in range(sparse.total)]  # -1..4
        chosen = (choice[:, :, None] == np.arange(4)).any(1)  # the longest request has four rows
        out, _ = sparse_call(sparse.step)(sparse.x, sparse.lengths, (0, 0, 0), sparse.cache, choice)
        expected = sparse.model(sparse.tensors, sparse.x, chosen)[: sum(sparse.lengths)]
        assert relative_error(expected, sparse.expected) > 0.05
        assert_relative_error(out[: sum(sparse.lengths)], expected, 1e-3)

    @pytest.mark.parametrize("bad", [-1, 10, 2**31 - 1, -(2**31)])
    def test_hostile(self, sparse: SimpleNamespace, bad: int) -> None:
        """A bad slot, table or context length of one request changes no bit of another's result and cache."""
        if sparse.ratio == 128 and bad > 0:
            pytest.skip("two values show it")
        call = sparse_call(sparse.step)
        _, cache = call(sparse.x, sparse.lengths, (0, 0, 0), sparse.cache)
        before = (sparse.lengths[0], 0, sparse.lengths[2])
        good, good_cache = call(sparse.x, (3, 4, 2), before, cache)
        tables, slots = [TABLES[0], [bad] * 3, TABLES[2]], (SLOTS[0], bad, SLOTS[2])
        hostile = sparse_call(sparse.step, slots, tables)
        out, bad_cache = hostile(sparse.x, (3, 4, 2), (before[0], bad, before[2]), cache)
        others = np.r_[0:3, 7:9]
        np.testing.assert_array_equal(np.asarray(out)[others], np.asarray(good)[others])
        owned = np.r_[*[np.arange(s * WINDOW, (s + 1) * WINDOW) for s in (4, 2)]]
        owned = np.r_[owned, *[5 * WINDOW + np.arange(b * 8, (b + 1) * 8) for b in np.ravel(TABLES[0] + TABLES[2])]]
        for new, old in zip(jax.tree.leaves(bad_cache.rows), jax.tree.leaves(good_cache.rows), strict=True):
            np.testing.assert_array_equal(np.asarray(new)[owned].view(np.uint8), np.asarray(old)[owned].view(np.uint8))
        np.testing.assert_array_equal(bad_cache.kv[jnp.array([4, 2])], good_cache.kv[jnp.array([4, 2])])
        # a context without a slot: nothing is read in its place
        out, _ = sparse_call(sparse.step, slots)(sparse.x, (3, 4, 2), (0, 3, 0), sparse.cache)
        assert np.isfinite(np.asarray(out)[:9]).all()

    def test_bf16(self, sparse: SimpleNamespace) -> None:
        """Codes of rows that were rounded to bf16 first are often the next ones: FP8's error, not bf16's."""
        if sparse.ratio:
            pytest.skip("one compress_ratio shows it")
        made = compiled(make_sparse(sparse.tensors, 0, jnp.bfloat16))
        out, _ = sparse_call(made.step)(sparse.x, sparse.lengths, (0, 0, 0), made.module.init_cache(5, 10, 8))
        assert_relative_error(out[: sum(sparse.lengths)], sparse.expected, 0.05)

    def test_wrong_calls(self) -> None:
        with pytest.raises(InvalidInputError, match="compress_ratio is 8; expected one of 0, 4, 128"):
            nn.SparseMLAConfig(HIDDEN, HEADS, compress_ratio=8)
        with pytest.raises(InvalidInputError, match="num_heads is 4; expected a multiple of 8"):
            nn.SparseMLAConfig(HIDDEN, HEADS)


MAKERS = {
    "mla": (MLA_SHAPES, lambda tensors: make_mla(tensors, MLA_CONFIG)),
    "gated_delta_net": (GDN_SHAPES, make_gdn),
    "sparse_mla": (sparse_shapes(4), lambda tensors: make_sparse(tensors, 4)),
}


class TestCheckpoint:
    @pytest.mark.parametrize("layer", MAKERS)
    def test_round_trip(self, layer: str) -> None:
        """In and out under the published names; tensors of other layers, and what is no parameter, are passed over."""
        shapes, make = MAKERS[layer]
        module = make(weights(shapes, seed=8))
        tensors = {f"model.layers.1.{name}": x for name, x in weights(shapes).items()}
        others = {"model.layers.10.x": np.zeros(3), "model.layers.1.rotary_emb.inv_freq": np.zeros(32)}
        if layer == "sparse_mla":
            others["model.layers.1.indexer.wq_b.weight"] = np.zeros((8, 8))
        nn.load_checkpoint(module, tensors | others, "model.layers.1.")
        again = nn.to_checkpoint(module, "model.layers.1.")
        assert again.keys() == tensors.keys()
        for name, x in tensors.items():
            np.testing.assert_array_equal(again[name], x, err_msg=name)

    @pytest.mark.parametrize(
        ("name", "suffix", "dtype"), [("mla", "weight_scale_inv", "float32"), ("sparse_mla", "scale", "float8_e8m0fnu")]
    )
    def test_fp8_weights(self, name: str, suffix: str, dtype: str) -> None:
        """Blocks of 128 x 128 with a scale each, also where the last block is smaller."""
        shapes, make = MAKERS[name]
        tensors, rng = weights(shapes), np.random.default_rng(2)
        expected = dict(tensors)
        for key in [key for key, shape in shapes.items() if len(shape) == 2 and key.endswith("weight")]:
            codes = tensors[key].astype(ml_dtypes.float8_e4m3fn)
            rows, columns = (-(-n // 128) for n in codes.shape)
            scale = (2.0 ** rng.integers(-3, 3, (rows, columns))).astype(np.float32)
            expected[key] = np.array(codes, np.float32)
            for i, j in np.ndindex(rows, columns):
                expected[key][i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] *= scale[i, j]
            tensors[key] = codes
            tensors[f"{key.removesuffix('.weight')}.{suffix}"] = scale.astype(getattr(ml_dtypes, dtype, None) or dtype)
        loaded = nn.to_checkpoint(make(tensors))
        for key, x in expected.items():
            np.testing.assert_array_equal(loaded[key], x, err_msg=key)
        with pytest.raises(InvalidInputError, match="one scale a 128 x 128 block"):
            make({key: x[:0] if key.endswith(suffix) else x for key, x in tensors.items()})

    def test_refused(self) -> None:
        """Names and shapes are checked before anything is written."""
        tensors = weights(GDN_SHAPES)
        module = make_gdn(tensors)
        other = weights(GDN_SHAPES, seed=9)
        wrong = {
            "lack \\['A_log'\\] and have \\[\\]": {k: x for k, x in other.items() if k != "A_log"},
            "lack \\[\\] and have \\['bias'\\]": other | {"bias": np.zeros(3)},
            r"out_proj.weight is \[64, 48\]; expected \[48, 64\]": other | {"out_proj.weight": np.zeros((64, 48))},
            r"in_proj_qkvz.weight is \[190, 48\]; expected \[192, 48\]": other
            | {"in_proj_qkvz.weight": np.zeros((190, 48))},
        }
        for message, given in wrong.items():
            with pytest.raises(InvalidInputError, match=message):
                nn.load_checkpoint(module, given)
        for name, x in nn.to_checkpoint(module).items():
            np.testing.assert_array_equal(x, tensors[name])

    @pytest.mark.parametrize("layer", MAKERS)
    def test_random_parameters(self, layer: str) -> None:
        """Without a checkpoint parameters are random, finite numbers."""
        kind = {"mla": nn.MLAttention, "gated_delta_net": nn.GatedDeltaNet, "sparse_mla": nn.SparseMLAttention}[layer]
        shapes, make = MAKERS[layer]
        config = make(weights(shapes)).config
        state = jax.jit(lambda: nnx.state(kind(config, rngs=nnx.Rngs(0))))()
        for path, x in nnx.to_flat_state(state):
            assert np.isfinite(np.asarray(x[...], np.float32)).all(), path

    def test_sharding_stays(self, mla: SimpleNamespace) -> None:
        module = make_mla(mla.tensors, MLA_CONFIG)
        mesh = jax.make_mesh((2,), ("heads",), devices=jax.devices()[:2])
        sharding = jax.NamedSharding(mesh, jax.P(None, "heads"))
        module.q_b_proj.kernel.set_value(jax.device_put(module.q_b_proj.kernel[...], sharding))
        nn.load_checkpoint(module, mla.tensors)
        assert module.q_b_proj.kernel[...].sharding == sharding


def test_caches_are_donated(mla: SimpleNamespace, gdn: SimpleNamespace) -> None:
    """Every array of a donated cache is the memory of a result; those of MLA and gated delta nets are not copied."""
    sparse = make_sparse(weights(SPARSE_SHAPES), 0)
    windows = sparse.init_cache(5)
    calls = [
        (
            mla.module,
            nn.PagedBatch(offsets(LENGTHS), int32([0] * 3), int32(TABLES)),
            mla.x,
            jax.eval_shape(lambda: mla.module.init_cache(10**5, 8)),
        ),
        (
            gdn.module,
            nn.SlotBatch(offsets(GDN_LENGTHS), int32(SLOTS), jnp.array([False] * 3)),
            gdn.x,
            jax.eval_shape(lambda: gdn.module.init_cache(10**5)),
        ),
        (sparse, nn.WindowBatch(offsets(LENGTHS), int32([0] * 3), int32(SLOTS)), mla.x, windows),
    ]
    for module, batch, x, cache in calls:
        graph, state = nnx.split(module)
        step = quick_jit(lambda state, x, batch, cache: nnx.merge(graph, state)(x, batch, cache), donate_argnums=3)
        lowered = step.lower(state, x, batch, cache)
        assert lowered.as_text().count("tf.aliasing_output") == len(jax.tree.leaves(cache))
        if module is not sparse:
            assert lowered.compile().memory_analysis().temp_size_in_bytes < 10**7  # the caches: 3 * 10**8 and more
    step(state, x, batch, cache)
    assert windows.rows.nope.is_deleted()


def test_public_names() -> None:
    assert sorted(nn.__all__) == list(nn.__all__)
    for name in nn.__all__:
        assert len(getattr(nn, name).__doc__ or "") > 20, name

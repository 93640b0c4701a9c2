"""The benchmark of sparse_prefill on tiny shapes, the oracle in the kernels' place. Nothing here is timed."""

import dataclasses
import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_fp8attn.benchmarks import models, peers, sparse, trial
from jax_fp8attn.benchmarks.models import WINDOW

from jax_fp8attn import dispatch
from jax_fp8attn.latent import Fp8Latent
from jax_fp8attn.quantize import E4M3

ONE = {"T": 12, "H": 3, "D": 512, "topk": 20, "P": 2 * WINDOW + 2 * 64}
TWO = ONE | {"S": 12, "topk": 20 + WINDOW}
POSITIONS = TWO | {"B": 2, "C": 200}


def tried(shape: dict[str, int], variant: str = "exact") -> trial.Trial:
    return sparse.trial(models.Case("sparse_prefill", "tiny", shape, variant), None)


@functools.cache
def with_the_oracle(kind: str) -> trial.Trial:
    shape, variant = {
        "one": (ONE, "exact bf16 rows"),
        "two": (TWO, "exact byte scales"),
        "positions": (POSITIONS, "exact"),
    }[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparse, "offered", lambda op, problem: ["reference"])
        return tried(shape, variant)


class TestGate:
    @pytest.mark.parametrize("kind", [*(pytest.param(x, marks=pytest.mark.slow) for x in ("one", "two")), "positions"])
    def test_right_results_pass(self, kind) -> None:
        """And those of other inputs do not."""
        made = with_the_oracle(kind)
        (contender,) = made.contenders
        errors = [made.error(contender, contender.call(number)) for number in range(made.sets)]
        assert 0 < errors[0] <= made.bound(contender) < errors[1]

    def test_faults(self) -> None:
        made = with_the_oracle("positions")
        (contender,) = made.contenders
        right, bound = np.asarray(contender.call(0)), made.bound(contender)
        assert bound < made.bound(dataclasses.replace(contender, is_peer=True)) <= 0.01
        last = np.max(sparse._checked_tokens(12))
        one = lambda where, value: [where, np.asarray(value, right.dtype)]
        faults = [
            one(np.s_[:], right[:, ::-1]),  # heads in another order
            one((last, 1), 0),
            one((last, 2), 1.02 * right[last, 2]),
            one(np.s_[:, 0, 7], np.nan),
            one(5, np.inf),
        ]
        for where, value in faults:
            wrong = right.copy()
            wrong[where] = value
            assert made.error(contender, jnp.asarray(wrong)) > bound

    @pytest.mark.parametrize("fault", ["last row", "sink", "scale", "extend"])
    def test_a_kernel_with_a_fault(self, fault, monkeypatch) -> None:
        execute = dispatch.execute

        def faulty(op, problem, names, arrays):
            prefix, extend = arrays.prefix, arrays.extend
            changes = {
                "last row": {"prefix": prefix._replace(end=prefix.end - 1)},
                "sink": {"sink": arrays.sink - 1},
                "scale": {"softmax_scale": arrays.softmax_scale * 0.9},
                "extend": {"extend": extend._replace(end=extend.start)},
            }
            return execute(op, problem, names, arrays._replace(**changes[fault]))

        made = with_the_oracle("positions")
        (contender,) = made.contenders
        monkeypatch.setattr(dispatch, "execute", faulty)
        assert made.error(contender, contender.call(0)) > made.bound(contender)

    def test_first_and_last_token_are_checked(self) -> None:
        for tokens in (1, 12, 4096):
            checked = sparse._checked_tokens(tokens)
            assert checked[0] == 0 and checked[-1] == tokens - 1 and len(checked) >= min(tokens, sparse.CHECKED)


class TestModel:
    @staticmethod
    def bytes_and_flops(shape: dict[str, int], variant: str) -> tuple[int, int]:
        operands = sparse._operands(shape, sparse.STORED[variant], 0)
        problem = sparse._problem(operands.arrays)
        return sparse._bytes(problem, operands), sparse._flops(problem)

    def test_bytes_and_flops(self, monkeypatch) -> None:
        """Three tokens, two heads: rows 5, 5, 9 and 9 of the prefix, and three of the extend rows."""
        prefix, extend = [[5, 5], [9, -1], [9, -1]], [[0, 1], [1, -1], [2, 0]]
        listed = sparse.Lists(*(np.array(x, np.int32) for x in (prefix, extend)))
        monkeypatch.setattr(sparse, "lists", lambda shape, seed: listed)
        size, flops = self.bytes_and_flops({"T": 3, "H": 2, "D": 512, "topk": 4, "P": 16, "S": 3}, "exact")
        row = 448 + 128 + 7 * 4
        index = 4 * (4 + 5) + 2 * 2 * 3 * 4  # entries, and where 3 lists start and end in two pools
        assert size == 2 * (3 * 2 * 512 * 2) + 2 * 4 + (2 + 3) * row + index
        assert flops == 2 * 2 * 512 * 2 * (4 + 5)
        assert with_the_oracle("positions").flops == 4 * 512 * 3 * 12 * 148

    def test_rows_of_other_forms(self, monkeypatch) -> None:
        every = np.arange(16, dtype=np.int32)[None]
        monkeypatch.setattr(sparse, "lists", lambda shape, seed: sparse.Lists(every, None))
        sizes = [self.bytes_and_flops({"T": 1, "H": 1, "topk": 16, "P": 16}, variant)[0] for variant in sparse.STORED]
        assert [size - sizes[0] for size in sizes] == [0, -16 * 21, 16 * (1024 - 604)]

    @pytest.mark.parametrize("case", models.cases("sparse_prefill"), ids=lambda case: f"{case.name} {case.variant}")
    def test_every_case_builds(self, case) -> None:
        """Each with few heads, tokens and rows."""
        selected = min(24, case.shape["topk"] - WINDOW * ("S" in case.shape))  # 0 where there is a window alone
        every = case.shape["topk"] - WINDOW == case.shape["P"]
        small = {"T": 8, "H": 2, "P": selected if every else 2 * WINDOW + 128, "S": 8, "C": 200}
        shape = case.shape | {name: value for name, value in small.items() if name in case.shape}
        shape["topk"] = selected + WINDOW * ("S" in shape)
        problems = set()
        for seed in range(2):
            operands = functools.partial(sparse._operands, shape, sparse.STORED[case.variant], seed)
            jax.eval_shape(lambda operands=operands: problems.add(sparse._problem(operands().arrays)))
            for name, matrix in zip("PS", sparse.lists(shape, seed), strict=True):
                assert (matrix is None) == (name not in shape)
                assert matrix is None or -1 <= matrix.min() <= matrix.max() < shape[name]
        (problem,) = problems
        assert problem.prefix.rows == shape["P"] and problem.has_sink and problem.heads == 2
        assert (problem.extend is None) == ("S" not in shape)
        assert sparse._entries(problem) == 8 * shape["topk"]


class TestLists:
    def test_by_position(self) -> None:
        """Each token has its window, and rows of its own request's past that it may see."""
        shape = POSITIONS
        listed = sparse.lists(shape, 0)
        blocks = []
        for token in range(12):
            request, number = divmod(token, 6)
            position = 200 + number
            prefix = [row for row in listed.prefix[token] if row >= 0]
            extend = [row for row in listed.extend[token] if row >= 0]
            old, compressed = [r for r in prefix if r < 2 * WINDOW], [r for r in prefix if r >= 2 * WINDOW]
            assert sorted(extend) == [request * 6 + n for n in range(number + 1)]
            seen = range(position - WINDOW + 1, 200)
            assert sorted(old) == sorted(request * WINDOW + p % WINDOW for p in seen)
            assert len(set(compressed)) == len(compressed) == shape["topk"] - WINDOW
            assert len(prefix) + len(extend) == shape["topk"]
            blocks.append({(r - 2 * WINDOW) // 64 for r in compressed})
        first, second = (set().union(*blocks[n : n + 6]) for n in (0, 6))
        assert not first & second and len(first) == len(second) == 1  # 51 compressed rows lie in one block

    def test_the_future_is_not_selected(self) -> None:
        listed = sparse.lists(POSITIONS | {"C": 128, "topk": WINDOW + 40}, 0)
        for token in range(12):
            compressed = listed.prefix[token][listed.prefix[token] >= 2 * WINDOW]
            assert sorted((compressed - 2 * WINDOW) % 64) == list(range((128 + token % 6 + 1) // 4))

    def test_fewer_than_asked_for(self) -> None:
        chosen = sparse._distinct(np.random.default_rng(0), np.array([0, 2, 9]), 4)
        assert (np.sort(chosen[0]) == -1).all() and sorted(chosen[1])[2:] == [0, 1]
        assert len(set(chosen[2])) == 4 and chosen[2].min() >= 0 and chosen[2].max() < 9

    def test_all_rows_of_a_pool(self) -> None:
        listed = sparse.lists({"T": 5, "H": 1, "topk": 7 + WINDOW, "P": 7, "S": 5}, 0)
        assert (np.sort(listed.prefix, axis=1) == np.arange(7)).all()

    def test_one_list_for_flashmla(self) -> None:
        operands = sparse._operands(POSITIONS, None, 0)
        one = sparse._one_list(operands, POSITIONS["P"])
        assert one.shape == (12, 256)  # 148, rounded up
        for token in range(12):
            prefix, extend = (x[token][x[token] >= 0] for x in operands.lists)
            assert sorted(one[token, :148]) == sorted([*prefix, *(extend + POSITIONS["P"])])
        assert (one[:, 148:] == -1).all()


class TestOffered:
    H200 = dispatch.Device("cuda", "NVIDIA H200", (9, 0))

    def test_kernels(self, monkeypatch) -> None:
        from jax_fp8attn.pallas import sparse_prefill_sm90

        problem = sparse._problem(sparse._operands(ONE, {"group": 64}, 0).arrays)
        with dispatch.target_device(self.H200):
            assert trial.offered("sparse_prefill", problem) == ["pallas", "xla"]
            monkeypatch.setattr(sparse_prefill_sm90, "supports", lambda problem, device: ("too wide",))
            assert trial.offered("sparse_prefill", problem) == ["xla"]

    def test_of_a_hopper_gpu(self) -> None:
        problem = sparse._problem(sparse._operands(ONE, {"group": 64}, 0).arrays)
        with dispatch.target_device(self.H200):
            assert "pallas" in trial.offered("sparse_prefill", problem)
            mixed = dataclasses.replace(problem, extend=sparse._problem(sparse._operands(ONE, None, 0).arrays).prefix)
            assert trial.offered("sparse_prefill", mixed) == ["xla"]

    def test_xla_only_where_it_is_quick(self) -> None:
        quick = [case.name for case in models.cases("sparse_prefill") if sparse._xla_is_quick(case.shape)]
        assert quick == ["DeepSeek-V4-Flash TP1 window, 2 x T=2048 after 8192"]


class TestPeers:
    """What FlashMLA is called with: functions of the oracle stand for its own, jax's arrays for PyTorch's."""

    @pytest.fixture(autouse=True)
    def flashmla(self, monkeypatch) -> None:
        self.calls = []

        def attend(name, q, rows, indices, sink):
            self.calls.append((name, q.shape, indices.shape))
            assert q.dtype == jnp.bfloat16 and indices.dtype == jnp.int32
            index = np.asarray(indices)
            assert ((index >= -1) & (index < len(rows))).all()
            return sparse._attention(q, rows[np.maximum(index, 0)].astype(jnp.float32), index >= 0, sink)

        def sparse_fwd(q, kv, indices, scale, width, sink):
            assert kv.dtype == jnp.bfloat16 and kv.shape[1:] == (1, 512) and (scale, width) == (512**-0.5, 512)
            return attend("bf16", q, kv[:, 0], indices[:, 0], sink), None, None

        def with_kvcache(q, pages, table, lengths, width, plan, *, softmax_scale, is_fp8_kvcache, indices, attn_sink):
            assert (table, lengths, width, plan, softmax_scale) == (None, None, 512, "plan", 512**-0.5)
            return attend("fp8", q[0], pages.dequantize(), indices[0], attn_sink)[None], None

        module = types.SimpleNamespace(
            flash_mla_sparse_fwd=sparse_fwd,
            flash_mla_with_kvcache=with_kvcache,
            get_mla_metadata=lambda: ("plan", None),
        )
        joined = lambda *pools: jax.tree.map(lambda *parts: jnp.concatenate(parts), *pools)
        monkeypatch.setattr(sparse, "_pages", joined)
        monkeypatch.setattr(peers, "to_torch", lambda x: x)
        monkeypatch.setattr(peers, "flashmla", lambda folder: module)
        monkeypatch.setattr(sparse, "offered", lambda op, problem: [])

    @pytest.mark.parametrize(
        ("shape", "variant", "names"),
        [
            pytest.param(ONE, "exact byte scales", ["bf16", "fp8"], marks=pytest.mark.slow),
            pytest.param(ONE, "exact bf16 rows", ["bf16"], marks=pytest.mark.slow),
            (POSITIONS, "exact", ["bf16", "bf16 dequantised", "fp8"]),
            pytest.param(ONE | {"H": 65, "T": 3}, "exact", ["bf16", "fp8"], marks=pytest.mark.slow),
            pytest.param(ONE | {"H": 129, "T": 3}, "exact", [], marks=pytest.mark.slow),
        ],
        ids=["byte scales", "bf16 rows", "positions", "65 heads", "129 heads"],
    )
    def test_calls(self, shape, variant, names) -> None:
        made = tried(shape, variant)
        assert [contender.name for contender in made.contenders] == [f"flashmla {name}" for name in names]
        for contender in made.contenders:
            assert contender.is_peer
            assert (
                made.error(contender, contender.call(0))
                <= made.bound(contender)
                < made.error(contender, contender.call(1))
            )
        heads, width = -(-shape["H"] // 64) * 64, 128 if "S" not in shape else 256
        assert {call[1:] for call in self.calls} <= {((shape["T"], heads, 512), (shape["T"], width))}


class TestFiles:
    def test_flashmla_is_found(self, tmp_path, monkeypatch) -> None:
        """Its module imports one of vLLM, and calls what the library registers."""
        loaded = []
        ops = types.SimpleNamespace(load_library=loaded.append)
        monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(ops=ops))
        for name in ("vllm", "vllm._flashmla_C", "flash_mla_interface"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        assert peers.flashmla(None) is None and peers.flashmla(tmp_path / "empty") is None
        (tmp_path / "flash_mla_interface.py").write_text(
            "import vllm._flashmla_C\nkernel = vllm._flashmla_C.__name__\n"
        )
        assert peers._flashmla.__wrapped__(tmp_path) is None  # the library is missing
        (tmp_path / "_flashmla_C.abi3.so").write_bytes(b"")
        module = peers.flashmla(tmp_path)
        assert module.kernel == "vllm._flashmla_C" and loaded == [str(tmp_path / "_flashmla_C.abi3.so")]
        assert peers.flashmla(tmp_path) is module
        for name in ("vllm", "vllm._flashmla_C", "flash_mla_interface"):
            monkeypatch.delitem(sys.modules, name)

    def test_pages(self) -> None:
        """The bytes of FlashMLA's cache, seen as it wants them: 64 rows a page, 584 bytes a row."""
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        pools = [sparse._operands(TWO, {"group": 64}, 0).arrays[n].rows for n in (1, 2)]
        pages = sparse._pages(*pools)
        assert pages.shape == (7, 64, 1, 584) and pages.stride()[0] == -(-64 * 584 // 576) * 576
        assert pages.dtype == torch.float8_e4m3fn and len(pools[0].nope) == 6 * 64
        raw = pages.reshape(7, -1).view(torch.uint8).numpy()
        codes = np.asarray(pools[1].nope).view(np.uint8)
        assert (raw[6, : 12 * 576].reshape(12, 576)[:, :448] == codes).all()
        scales = np.log2(np.asarray(pools[1].scale)) + 127
        assert (raw[6, 64 * 576 :].reshape(64, 8)[:12, :7] == scales).all()


def test_what_is_stored() -> None:
    rows = sparse._operands(ONE, sparse.STORED["exact byte scales"], 0).arrays.prefix.rows
    assert isinstance(rows, Fp8Latent) and rows.scale.dtype == jnp.uint8 and rows.group == 64
    form = sparse._problem(sparse._operands(ONE, sparse.STORED["exact"], 0).arrays).prefix.form
    assert (form.dtype, form.scale_group, form.scale_dtype) == (E4M3, 64, jnp.float32)

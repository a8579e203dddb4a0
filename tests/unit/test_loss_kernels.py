"""The loss's Triton kernels, run by Triton's interpreter on the CPU, beside torch's operations and fp64.

They run in worker processes (tests/interpreter.py): all cases in one, whose results the tests compare.

Not exercised here: what the compiled kernels do, and more logits than 2**31; tests/gpu/test_loss_kernels.py has both.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_megatron.compat import kernels
from mtp_megatron.loss import VocabShard, linear_cross_entropy
from mtp_megatron.loss_softmax import Softmax, TorchSoftmax, softmax_for
from mtp_megatron.targets import IGNORE_INDEX
from tests.distributed import test_loss_parallel as parallel
from tests.interpreter import needs_triton, run_compiled, run_interpreted

BLOCK = 16  # columns to a program in place of 2048, so that small vocabularies take several
SCALE = 0.75
GRADIENTS = ("loss", "hidden_grad", "weight_grad")


@dataclass
class Problem:
    """Inputs of `linear_cross_entropy`; rows of the unembedding from ``vocab`` on are padding."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    vocab: int
    chunk: int = 5
    block: int = BLOCK
    z_loss: float = 0.0


def random(dtype: torch.dtype, vocab: int = 37, tokens: int = 13, **settings: Any) -> Problem:
    """A quarter of the targets are ignored."""
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(tokens, 8, generator=generator).to(dtype)
    weight = torch.randn(vocab, 8, generator=generator).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.25] = IGNORE_INDEX
    return Problem(hidden, weight, targets, vocab, **settings)


def padded(dtype: torch.dtype) -> Problem:
    problem = random(dtype)
    problem.weight = torch.cat([problem.weight, torch.full((5, 8), torch.nan, dtype=dtype)])
    return problem


def none_valid(dtype: torch.dtype) -> Problem:
    problem = random(dtype)
    problem.targets[:] = IGNORE_INDEX
    return problem


def large(dtype: torch.dtype, sign: float) -> Problem:
    """One logit of +-1e4 in every row, and a row of equal ones."""
    problem = random(dtype)
    hidden, weight = problem.hidden.div_(4), problem.weight.div_(4)
    hidden[:, 0], weight[:, 0] = 100.0, 0.0
    weight[3, 0] = 100.0 * sign
    hidden[2], problem.targets[1] = 0.0, 3
    return problem


def tied(dtype: torch.dtype) -> Problem:
    """The largest logit of every row is there twice, in different blocks."""
    problem = random(dtype, 60)
    problem.weight[30:] = problem.weight[:30]
    best = (problem.hidden @ problem.weight.T).argmax(-1)
    problem.targets[::2] = best[::2]
    problem.targets[::4] = best[::4] + 30  # not the most likely one
    return problem


def outside(dtype: torch.dtype, target: int) -> Problem:
    """A target outside of the vocabulary."""
    problem = padded(dtype)
    problem.targets[4] = target
    return problem


OUTSIDE = (-1, -101, 37, 39, 1037)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAKERS: dict[str, Callable[[torch.dtype], Problem]] = {
    **{f"{vocab}-entries": functools.partial(random, vocab=vocab) for vocab in (1, 9, 16, 32, 37, 64)},
    "blocks-of-2048": functools.partial(random, vocab=5000, tokens=3, block=2048),
    "one-chunk": functools.partial(random, chunk=100),
    "no-token": functools.partial(random, tokens=0),
    "padded": padded,
    "none-valid": none_valid,
    "large": functools.partial(large, sign=1.0),
    "large-negative": functools.partial(large, sign=-1.0),
    "tied": tied,
    "z-loss": functools.partial(random, z_loss=0.05),
}
CASES = {f"{name}-{dtype}": (maker, DTYPES[dtype]) for name, maker in MAKERS.items() for dtype in DTYPES}
CASES |= {f"target-{target}": (functools.partial(outside, target=target), torch.bfloat16) for target in OUTSIDE}


def figures(problem: Problem, softmax: type[Softmax] | None) -> dict[str, Tensor]:
    shard = VocabShard.of(problem.vocab, problem.weight.shape[0], None)
    weight_grad = torch.zeros_like(problem.weight, dtype=torch.float32)
    sums, hidden_grad = linear_cross_entropy(
        problem.hidden,
        problem.weight,
        problem.targets,
        shard,
        grad_scale=torch.tensor(SCALE),
        weight_grad=weight_grad,
        chunk_tokens=problem.chunk,
        predictions=True,
        z_loss=problem.z_loss,
        softmax=softmax,
    )
    assert not weight_grad[problem.vocab :].any()
    return {**vars(sums), "hidden_grad": hidden_grad, "weight_grad": weight_grad[: problem.vocab]}


def exact(problem: Problem) -> dict[str, Tensor]:
    """In fp64, by autograd."""
    hidden, weight = (part.double().requires_grad_() for part in (problem.hidden, problem.weight[: problem.vocab]))
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits, problem.targets, ignore_index=IGNORE_INDEX, reduction="sum")
    log_z_squared = (logits.logsumexp(-1).square() * (problem.targets != IGNORE_INDEX)).sum()
    (loss + problem.z_loss * log_z_squared).backward(torch.tensor(SCALE, dtype=torch.float64))
    figures = {"loss": loss.detach(), "hidden_grad": hidden.grad, "weight_grad": weight.grad}
    return figures | ({"log_z_squared": log_z_squared.detach()} if problem.z_loss else {})


def distance(got: dict[str, Tensor], want: dict[str, Tensor], name: str) -> float:
    """Relative; NaN is infinitely far from a number."""
    value, right = got[name].double(), want[name].double()
    return float((value - right).norm().nan_to_num(nan=torch.inf)) / max(float(right.norm()), 1e-30)


# In the interpreter ---------------------------------------------------------------------------------------------------


def _all_cases(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    before = "triton" in sys.modules  # the package itself imports it for nobody
    from mtp_megatron import loss_kernels

    assert not before
    launched = []
    original = loss_kernels.TritonSoftmax.gradient
    loss_kernels.TritonSoftmax.gradient = lambda *args: launched.append(args[1].shape) or original(*args)
    results = {}
    for name, (maker, dtype) in CASES.items():
        problem = maker(dtype)
        loss_kernels.BLOCK = problem.block
        launched.clear()
        results[name] = figures(problem, None)  # the interpreter is chosen like a GPU
        assert len(launched) == -(-len(problem.targets) // problem.chunk), "the kernels did not run"
    return results


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, Tensor]]:
    return run_interpreted(_all_cases, 1)[0]


@needs_triton
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("target")])
def test_equals_fp64_as_closely_as_torchs_operations_do(name: str, interpreted: dict[str, dict[str, Tensor]]) -> None:
    maker, dtype = CASES[name]
    problem, got = maker(dtype), interpreted[name]
    want, torchs = exact(problem), figures(problem, TorchSoftmax)
    # To bf16 the interpreter cuts off, where a GPU rounds: every entry may lose as much as its last bit is worth.
    cut_off = 2**-7 if dtype == torch.bfloat16 else 0.0
    for figure in want:
        allowed = distance(torchs, want, figure) * 1.05 + 1e-5 + (cut_off if "grad" in figure else 0.0)
        assert distance(got, want, figure) <= allowed, figure
    assert torch.equal(got["predictions"], torchs["predictions"])
    assert got["correct"] == torchs["correct"]


@needs_triton
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("target")])
def test_a_target_outside_the_vocabulary_is_nan(name: str, interpreted: dict[str, dict[str, Tensor]]) -> None:
    got = interpreted[name]
    assert got["loss"].isnan()
    assert got["weight_grad"].isnan().all()
    assert got["hidden_grad"].isnan().any(dim=1).tolist() == [token == 4 for token in range(13)]


@needs_triton
def test_control_another_target_is_caught(interpreted: dict[str, dict[str, Tensor]]) -> None:
    problem = random(torch.float32)
    problem.targets = problem.targets.roll(1)
    want = exact(problem)
    assert min(distance(interpreted["37-entries-fp32"], want, figure) for figure in GRADIENTS) > 1e-3


def _tensor_parallel(rank: int, world: int) -> list:
    from mtp_megatron import loss_kernels

    loss_kernels.BLOCK = BLOCK
    _, vocab, rows = parallel.LAYOUTS["tp4-one-row-on-rank-2"]
    assert softmax_for(torch.zeros(1)) is loss_kernels.TritonSoftmax
    return [parallel._split(rank, world, vocab, rows, torch.float32, 0), parallel._ties(rank, world, torch.bfloat16)]


@needs_triton
def test_tensor_parallel() -> None:
    """Over ranks of 16, 16, 1 and no entries; and with ties across ranks."""
    splits, ties = zip(*run_interpreted(_tensor_parallel, 4), strict=True)
    for z_loss, ranks in parallel.by_way(splits):
        errors = parallel.deviation(ranks, parallel.whole(33, torch.float32, z_loss))
        assert max(errors.values()) <= 1e-5, errors
        assert errors["correct"] == errors["predictions"] == 0
    for predictions, unsplit, miscounted in ties:
        assert predictions == unsplit
        assert miscounted == 0


# The two steps alone --------------------------------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")
ROWS = {
    "plain": [0.5 * (i % 7) for i in range(37)],
    "a block of -inf": [-INF] * 16 + [1.0, 2.0] * 10 + [0.0],
    "all -inf but one": [-INF] * 36 + [3.0],
    "a nan": [NAN] + [1.0] * 36,
    "a nan in the last block": [1.0] * 36 + [NAN],
    "inf": [1.0] * 20 + [INF] + [1.0] * 16,
    "two of inf": [INF] + [1.0] * 35 + [INF],
    "all -inf": [-INF] * 37,
}


def both_ways(device: str = "cpu") -> list[dict[str, Tensor]]:
    """By torch's operations and by the kernels, for every row of `ROWS`; the target is column 20, then on no rank."""
    from mtp_megatron import loss_kernels

    loss_kernels.BLOCK, before = BLOCK, loss_kernels.BLOCK
    results = []
    for softmax in (TorchSoftmax, loss_kernels.TritonSoftmax):
        steps = softmax(torch.zeros(1, device=device), 2 * len(ROWS), 37)
        around = steps.logits if steps.logits._base is None else steps.logits._base
        around.fill_(7.0)
        logits = steps.logits.copy_(torch.tensor([*ROWS.values()] * 2))
        column = torch.tensor([20] * len(ROWS) + [-1] * len(ROWS), device=device)
        sums = steps.sums(logits, column)
        scale = torch.full((2 * len(ROWS),), SCALE, device=device)
        gradient = steps.gradient(logits, column, sums, sums, scale)
        result = {**vars(sums), "gradient": gradient, "beside": around[:, 37:]}
        results.append({name: value.cpu().clone() for name, value in result.items()})
    loss_kernels.BLOCK = before
    return results


def assert_alike(row: str, results: list[dict[str, Tensor]]) -> None:
    index = list(ROWS).index(row)
    for which in (index, index + len(ROWS)):
        torchs, ours = ({name: value[which] for name, value in result.items()} for result in results)
        losses = [result["total"].log() + (result["top"] - result["target_logit"]) for result in (torchs, ours)]
        torch.testing.assert_close(ours["gradient"], torchs["gradient"], equal_nan=True)
        if torchs["gradient"].isfinite().all():
            assert ours["best"] == torchs["best"]
            torch.testing.assert_close(losses[1], losses[0])
        else:
            assert not losses[0].isfinite()
            assert not losses[1].isfinite()


def _steps(rank: int, world: int) -> list[dict[str, Tensor]]:
    return both_ways()


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Tensor]]:
    return run_interpreted(_steps, 1)[0]


@needs_triton
@pytest.mark.parametrize("row", ROWS)
def test_infinite_and_nan_logits_do_what_they_do_in_torch(row: str, steps: list[dict[str, Tensor]]) -> None:
    assert_alike(row, steps)


@needs_triton
def test_nothing_is_written_beside_the_logits(steps: list[dict[str, Tensor]]) -> None:
    beside = steps[1]["beside"]
    assert beside.shape[1] == 64 - 37
    assert (beside == 7).all()


# Compiled for a GPU ---------------------------------------------------------------------------------------------------


def _compiled(rank: int, world: int, folder: str) -> dict[str, str]:
    """PTX of both kernels for logits of each type, by whether their rows are a multiple of 16 long, odd, or one."""
    import triton
    from triton.backends.compiler import GPUTarget

    from mtp_megatron import loss_kernels

    os.environ["TRITON_CACHE_DIR"] = folder
    aligned, texts = [["tt.divisibility", 16]], {}
    for dtype, kind in itertools.product(("bf16", "fp16", "fp32"), ("even", "odd", "one")):
        for kernel in (loss_kernels._sums, loss_kernels._gradient):
            types = {"column": "*i64", "best_out": "*i64", "logits": f"*{dtype}", "stride": "i32", "BLOCK": "constexpr"}
            types["rows"] = "constexpr" if kind == "one" else "i32"  # Triton takes an argument of 1 for a constant
            signature = {name: types.get(name, "*fp32") for name in kernel.arg_names}
            names = [name for name in signature if name != "rows" or kind == "even"]
            attributes = {(kernel.arg_names.index(name),): aligned for name in names if signature[name] != "constexpr"}
            constants = {"BLOCK": loss_kernels.BLOCK, "rows": 1}
            constants = {name: value for name, value in constants.items() if signature[name] == "constexpr"}
            source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
            options = {"num_warps": loss_kernels.WARPS}
            built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            texts[f"{kernel.__name__} {dtype} {kind}"] = built.asm["ptx"]
    return texts


@needs_triton
def test_they_compile_for_an_h100_and_move_whole_vectors(tmp_path: Path) -> None:
    """Of 16 bytes, also where rows are odd; what lies behind the last block goes one by one there."""
    texts = run_compiled(_compiled, str(tmp_path))
    assert len(texts) == 2 * 3 * 3
    for name, text in texts.items():
        vectors = {side: f"{side}.global.v4.b32" in text for side in ("ld", "st")}
        assert vectors["ld"] == (not name.endswith("one")), name
        assert vectors["st"] == (vectors["ld"] and name.startswith("_gradient")), name


# Which one is taken ---------------------------------------------------------------------------------------------------


def test_the_cpu_and_fp64_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_triton", lambda: True)
    assert kernels.why_no_triton(torch.device("cpu")) == "no CUDA device"
    assert softmax_for(torch.zeros(1)) is TorchSoftmax
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.why_no_triton(torch.device("cpu"), torch.float32) is None
    assert kernels.why_no_triton(torch.device("cpu"), torch.float64) == "logits of torch.float64"
    assert softmax_for(torch.zeros(1, dtype=torch.float64)) is TorchSoftmax


@pytest.mark.parametrize(
    ("triton", "capability", "no_compiler", "reason"),
    [
        (True, (9, 0), None, None),
        (False, (9, 0), None, "triton is not installed"),
        (True, (9, 0), "there is no C compiler", "there is no C compiler"),
        (True, (7, 5), None, "a GPU of compute capability below 8.0"),
    ],
)
def test_on_a_gpu(
    triton: bool,
    capability: tuple[int, int],
    no_compiler: str | None,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_has_triton", lambda: triton)
    monkeypatch.setattr(kernels, "why_no_compiler", lambda: no_compiler)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernels.why_no_triton(torch.device("cuda", 0)) == reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert kernels.slower_without_triton() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    said = kernels.slower_without_triton()
    compiled = {fusion.setting: fusion.why_not for fusion in kernels.FUSIONS if "triton" in fusion.needs}
    missing = no_compiler if triton else reason
    assert compiled == {"bias_activation_fusion": missing, "bias_dropout_fusion": missing}
    assert said == (reason and f"the loss is slower and needs more memory without its Triton kernels: {reason}.")


@pytest.mark.parametrize(
    ("programs", "chosen", "header", "says"),
    [
        (("gcc",), None, "include", None),
        (("clang",), None, "include", None),
        (("gcc",), None, "elsewhere", None),  # named by CPATH, which compilers read
        (("my-cc",), "my-cc", "include", None),
        ((), None, "include", "there is no C compiler for triton (apt install gcc python3-dev)"),
        (("gcc",), "my-cc", "include", "CC='my-cc' is no program here for triton (apt install gcc python3-dev)"),
        (("gcc",), None, "nowhere", "there is no Python.h in {include} for triton (apt install gcc python3-dev)"),
    ],
)
def test_what_triton_compiles_with(
    programs: tuple[str, ...],
    chosen: str | None,
    header: str,
    says: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("bin", "include", "elsewhere", "nowhere"):
        (tmp_path / name).mkdir()
    for name in programs:
        (tmp_path / "bin" / name).touch(mode=0o755)
    (tmp_path / header / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CPATH", str(tmp_path / "elsewhere"))
    monkeypatch.delenv("C_INCLUDE_PATH", raising=False)
    monkeypatch.setenv("CC", chosen) if chosen else monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "include")})
    assert kernels.why_no_compiler.__wrapped__() == (says and says.format(include=tmp_path / "include"))


@pytest.mark.parametrize(("dtype", "size"), [(torch.bfloat16, 6), (torch.float32, 4), (torch.float64, 8)], ids=str)
def test_memory_of_torchs_operations(dtype: torch.dtype, size: int) -> None:
    assert TorchSoftmax.bytes_per_logit(dtype) == size
    steps = TorchSoftmax(torch.zeros(1, dtype=dtype), 3, 7)
    buffers = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in (steps.logits, steps._softmax)}
    assert sum(buffers.values()) == size * 3 * 7

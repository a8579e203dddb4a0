"""The loss's Triton kernels on a GPU, beside torch's operations and fp64; their memory, and that they never wait.

tests/unit/test_loss_kernels.py has more awkward cases, in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_megatron.loss import VocabShard, linear_cross_entropy
from mtp_megatron.loss_softmax import Softmax, TorchSoftmax, softmax_for
from mtp_megatron.targets import IGNORE_INDEX
from tests.gpu.test_synchronisation import waiting_is_an_error
from tests.unit.test_loss_kernels import ROWS, assert_alike, both_ways, distance

pytestmark = pytest.mark.gpu
SCALE = 0.75
GRADIENTS = ("loss", "hidden_grad", "weight_grad")
# tokens, hidden size, vocabulary, tokens to a chunk, z-loss; sizes that no vector and no block divides, and usual ones
SHAPES = {
    "one-entry": (17, 24, 1, 5, 0.0),
    "less-than-a-block": (100, 64, 777, 33, 0.0),
    "a-block": (64, 64, 4096, 64, 0.0),
    "odd": (333, 128, 50257, 100, 0.0),
    "even": (512, 256, 32768, 256, 0.0),
    "large": (64, 128, 262144, 64, 0.0),
    "z-loss": (100, 64, 50257, 33, 0.05),
}


@pytest.fixture(scope="module", autouse=True)
def _triton_is_there() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    # TF32 in the matrix products would hide an error of 1e-6 behind one of 1e-3.
    assert torch.get_float32_matmul_precision() == "highest"


class TorchOnTheSameRows(TorchSoftmax):
    """On rows as long as the kernels' (a multiple of 64): cuBLAS may compute logits in another way on odd ones."""

    def __init__(self, hidden: Tensor, tokens: int, rows: int) -> None:
        from mtp_megatron.loss_kernels import TritonSoftmax

        super().__init__(hidden, tokens, rows)
        in_place = self._softmax is self.logits
        self.logits = TritonSoftmax(hidden, tokens, rows).logits
        self._softmax = self.logits if in_place else self._softmax


def inputs(tokens: int, size: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A quarter of the targets are ignored; the largest logit of many rows is there twice."""
    generator = torch.Generator("cuda").manual_seed(vocab)
    hidden = torch.randn(tokens, size, generator=generator, device="cuda").to(dtype)
    weight = torch.randn(vocab, size, generator=generator, device="cuda").mul_(3 * size**-0.5).to(dtype)
    weight[vocab // 2 :] = weight[: vocab - vocab // 2].clone()
    targets = torch.randint(0, vocab, (tokens,), generator=generator, device="cuda")
    targets[torch.rand(tokens, generator=generator, device="cuda") < 0.25] = IGNORE_INDEX
    return hidden, weight, targets


def figures(
    case: tuple[Tensor, Tensor, Tensor], chunk: int | None, softmax: type[Softmax] | None, z_loss: float = 0.0
) -> dict[str, Tensor]:
    vocab = len(case[1])
    weight_grad = torch.zeros_like(case[1], dtype=torch.float32)
    sums, hidden_grad = linear_cross_entropy(
        *(*case, VocabShard.of(vocab, vocab, None)),
        grad_scale=torch.tensor(SCALE, device="cuda"),
        weight_grad=weight_grad,
        chunk_tokens=chunk,
        predictions=True,
        z_loss=z_loss,
        softmax=softmax,
    )
    return {**vars(sums), "hidden_grad": hidden_grad, "weight_grad": weight_grad}


def exact(case: tuple[Tensor, Tensor, Tensor], z_loss: float = 0.0) -> dict[str, Tensor]:
    """In fp64, by autograd."""
    hidden, weight = (part.double().requires_grad_() for part in case[:2])
    logits = hidden @ weight.T
    loss = F.cross_entropy(logits, case[2], ignore_index=IGNORE_INDEX, reduction="sum")
    log_z_squared = (logits.logsumexp(-1).square() * (case[2] != IGNORE_INDEX)).sum()
    (loss + z_loss * log_z_squared).backward(torch.tensor(SCALE, dtype=torch.float64, device="cuda"))
    return {"loss": loss.detach(), "hidden_grad": hidden.grad, "weight_grad": weight.grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_fp64_as_closely_as_torchs_operations_do(shape: str, dtype: torch.dtype) -> None:
    *sizes, chunk, z_loss = SHAPES[shape]
    case = inputs(*sizes, dtype)
    ours, torchs = (figures(case, chunk, softmax, z_loss) for softmax in (None, TorchOnTheSameRows))
    want = exact(case, z_loss)
    for figure in GRADIENTS:
        allowed = distance(torchs, want, figure) * 1.05 + (1e-6 if dtype == torch.float32 else 1e-5)
        assert distance(ours, want, figure) <= allowed, figure
    assert torch.equal(ours["predictions"], torchs["predictions"])
    assert ours["correct"] == torchs["correct"]
    others = exact((*case[:2], case[2].roll(1)), z_loss)
    assert sizes[2] == 1 or distance(ours, others, "hidden_grad") > 0.1  # control


def test_triton_is_what_runs_here() -> None:
    from mtp_megatron.loss_kernels import TritonSoftmax

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert softmax_for(torch.zeros(1, dtype=dtype, device="cuda")) is TritonSoftmax
    assert softmax_for(torch.zeros(1, dtype=torch.float64, device="cuda")) is TorchSoftmax
    assert softmax_for(torch.zeros(1)) is TorchSoftmax


@pytest.mark.parametrize("target", [-1, -101, 50257, 50300])
def test_a_target_outside_the_vocabulary_is_nan(target: int) -> None:
    hidden, weight, targets = inputs(40, 64, 50257, torch.bfloat16)
    targets[4] = target
    got = figures((hidden, weight, targets), 16, None)
    assert got["loss"].isnan()
    assert got["weight_grad"].isnan().all()
    assert got["hidden_grad"].isnan().any(dim=1).tolist() == [token == 4 for token in range(40)]


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Tensor]]:
    return both_ways("cuda")


@pytest.mark.parametrize("row", ROWS)
def test_infinite_and_nan_logits_do_what_they_do_in_torch(row: str, steps: list[dict[str, Tensor]]) -> None:
    assert_alike(row, steps)
    assert (steps[1]["beside"] == 7).all()


def test_more_logits_than_32_bits_can_count() -> None:
    """In one chunk and in many; the products of matrices of other sizes round differently."""
    tokens, vocab = 16400, 131072
    assert tokens * vocab > 2**31
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    case = inputs(tokens, 16, vocab, torch.bfloat16)
    whole, parts = figures(case, tokens, None), figures(case, 1024, None)
    for figure in GRADIENTS:
        assert distance(whole, parts, figure) < 1e-2, figure
    last = slice(16384, None)
    tail = [{"hidden_grad": got["hidden_grad"][last]} for got in (whole, parts)]
    assert distance(*tail, "hidden_grad") < 1e-2
    assert float((whole["predictions"] == parts["predictions"]).float().mean()) > 0.99


def test_the_logits_in_their_own_type_are_all_that_is_kept() -> None:
    """Beside them in fp32 lies their softmax where torch's operations make it: the control."""
    case = inputs(1000, 16, 131072, torch.bfloat16)
    chunk, mib = 512, 2**20
    logits = chunk * 131072 * 2

    def peak(softmax: type[Softmax] | None) -> int:
        figures(case, chunk, softmax)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        figures(case, chunk, softmax)
        return torch.cuda.max_memory_allocated() - before

    # The unembedding's gradient, made here, and vectors of a number per token. No chunk's part of that gradient: it is
    # added to what is there by the product itself.
    others = 131072 * 16 * 4 + mib
    assert logits <= peak(None) <= logits + others
    assert 3 * logits <= peak(TorchSoftmax)


@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize("softmax", [None, TorchSoftmax], ids=["triton", "torch"])
def test_no_chunk_waits(softmax: type[Softmax] | None, z_loss: float) -> None:
    case = inputs(100, 64, 50257, torch.bfloat16)
    weight_grad, scale = torch.zeros_like(case[1], dtype=torch.float32), torch.ones((), device="cuda")
    shard = VocabShard.of(50257, 50257, None)

    def run() -> Tensor:
        return linear_cross_entropy(
            *(*case, shard),
            grad_scale=scale,
            weight_grad=weight_grad,
            chunk_tokens=32,
            predictions=True,
            z_loss=z_loss,
            softmax=softmax,
        )[0].loss

    run()  # compiles
    with waiting_is_an_error():
        loss = run()
    assert bool(loss.isfinite())

"""Linear cross entropy on one process against `F.cross_entropy` of the whole logits, gradients included."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtp_megatron import loss as loss_module
from mtp_megatron.loss import VocabShard, linear_cross_entropy, vocab_parallel_linear_cross_entropy
from mtp_megatron.loss_softmax import TorchSoftmax
from mtp_megatron.targets import IGNORE_INDEX

CHUNKS = (None, 1, 5, 13, 14, 1000)
TOKENS, SIZE, VOCAB = 13, 8, 37


@dataclass
class Result:
    loss: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor
    log_z_squared: Tensor | None = None


def inputs(dtype: torch.dtype, tokens: int = TOKENS, size: int = SIZE, vocab: int = VOCAB, seed: int = 0) -> tuple:
    """Hidden states, unembedding and targets, a quarter of which are ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, size, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, size, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(0, vocab, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < 0.25] = IGNORE_INDEX
    return hidden, weight, targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, scale: float = 1.0, z_loss: float = 0.0) -> Result:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    log_z_squared = (logits.logsumexp(-1).square() * (targets != IGNORE_INDEX)).sum()
    (loss + z_loss * log_z_squared).backward(torch.tensor(scale, dtype=loss.dtype))
    return Result(loss.detach(), hidden.grad, weight.grad, log_z_squared.detach() if z_loss else None)


def ours(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    scale: float = 1.0,
    vocab: int = 0,
    z_loss: float = 0.0,
) -> Result:
    shard = VocabShard.of(vocab or weight.shape[0], weight.shape[0], None)
    weight_grad = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
    sums, hidden_grad = linear_cross_entropy(
        hidden,
        weight,
        targets,
        shard,
        grad_scale=torch.tensor(scale),
        weight_grad=weight_grad,
        chunk_tokens=chunk,
        z_loss=z_loss,
    )
    return Result(sums.loss, hidden_grad, weight_grad, sums.log_z_squared)


def error(got: Result, want: Result) -> float:
    """Largest deviation of loss and gradients, each relative to its largest entry; NaN counts as infinite."""
    worst = 0.0
    assert (got.log_z_squared is None) == (want.log_z_squared is None)
    names = ("loss", "hidden_grad", "weight_grad", *(["log_z_squared"] if want.log_z_squared is not None else []))
    for name in names:
        value, right = getattr(got, name).double(), getattr(want, name).double()
        assert value.shape == right.shape
        if right.numel():
            scale = right.abs().max().clamp_min(1e-30)
            worst = max(worst, float(((value - right).abs().max() / scale).nan_to_num(nan=torch.inf)))
    return worst


# Equality -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("z_loss", [0.0, 0.05])
def test_equals_cross_entropy_whatever_the_chunk(
    dtype: torch.dtype, tolerance: float, chunk: int | None, z_loss: float
) -> None:
    case = inputs(dtype)
    got, want = ours(*case, chunk=chunk, scale=0.75, z_loss=z_loss), plain(*case, scale=0.75, z_loss=z_loss)
    assert error(got, want) <= tolerance


def test_control_a_rolled_target_and_a_lost_chunk_are_caught() -> None:
    hidden, weight, targets = inputs(torch.float64)
    want = plain(hidden, weight, targets)
    assert error(ours(hidden, weight, targets.roll(1)), want) > 1e-3
    lost = targets.clone()
    lost[-3:] = IGNORE_INDEX
    assert error(ours(hidden, weight, lost), want) > 1e-3


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 20),
    size=st.integers(1, 9),
    vocab=st.integers(1, 40),
    padding=st.integers(0, 7),
    chunk=st.none() | st.integers(1, 23),
    seed=st.integers(0, 1000),
    z_loss=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_random_shapes(
    tokens: int, size: int, vocab: int, padding: int, chunk: int | None, seed: int, z_loss: float
) -> None:
    hidden, weight, targets = inputs(torch.float64, tokens, size, vocab + padding, seed)
    targets = torch.where(targets >= 0, targets % vocab, targets)
    want = plain(hidden, weight[:vocab], targets, z_loss=z_loss)
    got = ours(hidden, weight, targets, chunk, vocab=vocab, z_loss=z_loss)
    assert not got.weight_grad[vocab:].any()
    got.weight_grad = got.weight_grad[:vocab]
    # Of a certain target the z-loss's part is all that is left of a difference of ones.
    assert error(got, want) <= (1e-9 if z_loss else 1e-12)


def test_weight_gradient_is_added_to_what_is_there() -> None:
    hidden, weight, targets = inputs(torch.float64)
    buffer = torch.ones_like(weight)
    shard = VocabShard.of(VOCAB, VOCAB, None)
    for _ in range(2):
        linear_cross_entropy(hidden, weight, targets, shard, grad_scale=torch.tensor(0.5), weight_grad=buffer)
    torch.testing.assert_close(buffer, 1 + plain(hidden, weight, targets).weight_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_loses_no_more_than_the_plain_path(dtype: torch.dtype) -> None:
    """The yardstick: how far the plain path in the same precision is from fp32."""
    case = inputs(dtype, tokens=200, size=64, vocab=500)
    hidden, weight, targets = case
    exact = plain(hidden.float(), weight.float(), targets)
    lost, got = plain(*case), ours(*case, chunk=48)
    for name in ("loss", "hidden_grad", "weight_grad"):
        right = getattr(exact, name)
        allowed, found = ((getattr(result, name).float() - right).norm() for result in (lost, got))
        assert found <= allowed * 1.05 + 1e-6 * right.norm(), name
        if name != "loss":
            assert allowed > 0  # the yardstick measures something


def test_fp16_loss_scale_arrives_before_the_cast() -> None:
    """Divided by 2**20 tokens a gradient does not exist in fp16; with the loss scale of 2**16 it does."""
    hidden, weight, targets = inputs(torch.float16, size=16, vocab=500)
    division, loss_scale = 2.0**-20, 2.0**16
    right = plain(hidden.double(), weight.double(), targets, division * loss_scale)
    found = ours(hidden, weight, targets, scale=division * loss_scale)
    late = ours(hidden, weight, targets, scale=division)
    late.hidden_grad = late.hidden_grad.double() * loss_scale
    distances = [float((r.hidden_grad.double() - right.hidden_grad).norm()) for r in (found, late)]
    assert distances[0] <= 5e-3 * right.hidden_grad.norm()
    assert distances[1] > 5e-2 * right.hidden_grad.norm()  # control: the scale came after the cast


# Awkward inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
def test_zero_tokens(chunk: int | None) -> None:
    hidden, weight, targets = inputs(torch.float32, tokens=0)
    got = ours(hidden, weight, targets, chunk)
    assert got.loss == 0
    assert got.hidden_grad.shape == (0, SIZE)
    assert not got.weight_grad.any()


@pytest.mark.parametrize("chunk", CHUNKS)
def test_no_valid_token(chunk: int | None) -> None:
    hidden, weight, targets = inputs(torch.float32)
    got = ours(hidden, weight, torch.full_like(targets, IGNORE_INDEX), chunk, z_loss=0.1)
    for value in (got.loss, got.hidden_grad, got.weight_grad, got.log_z_squared):
        assert (value == 0).all()  # neither a number nor NaN


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("sign", "z_loss"), [(1.0, 0.0), (-1.0, 0.0), (1.0, 1e-4), (-1.0, 1e-4)])
def test_logits_of_ten_thousand(dtype: torch.dtype, sign: float, z_loss: float) -> None:
    """One logit of +-1e4 in every row, and rows of nothing but 1e4."""
    hidden, weight, targets = inputs(dtype)
    hidden, weight = hidden / 4, weight / 4
    hidden[:, 0], weight[:, 0] = 100.0, 0.0
    weight[3, 0] = 100.0 * sign
    weight[7] = weight[8]
    hidden[2], targets[1] = 0.0, 3
    got, want = ours(hidden, weight, targets, 5, z_loss=z_loss), plain(hidden, weight, targets, z_loss=z_loss)
    assert want.loss.isfinite()
    assert want.loss > 9e3  # so the large logits do take part
    assert error(got, want) <= {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]


def test_ignored_tokens_get_no_gradient_and_do_not_count() -> None:
    hidden, weight, targets = inputs(torch.float64)
    got = ours(hidden, weight, targets, z_loss=0.1)
    ignored = targets == IGNORE_INDEX
    assert ignored.any()
    assert not got.hidden_grad[ignored].any()
    assert got.hidden_grad[~ignored].any(dim=1).all()
    kept = ours(hidden[~ignored], weight, targets[~ignored], z_loss=0.1)
    torch.testing.assert_close(got.loss, kept.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.log_z_squared, kept.log_z_squared, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.weight_grad, kept.weight_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise", [1e4, torch.inf, torch.nan])
def test_padding_rows_take_no_part(noise: float) -> None:
    hidden, weight, targets = inputs(torch.float64)
    padded = torch.cat([weight, torch.full((5, SIZE), noise, dtype=weight.dtype)])
    got = ours(hidden, padded, targets, vocab=VOCAB)
    assert (got.weight_grad[VOCAB:] == 0).all()
    got.weight_grad = got.weight_grad[:VOCAB]
    assert error(got, plain(hidden, weight, targets)) <= 1e-12
    sums, _ = linear_cross_entropy(hidden, padded, targets, VocabShard.of(VOCAB, VOCAB + 5, None), predictions=True)
    assert torch.equal(sums.predictions, (hidden @ weight.T).argmax(-1))


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("target", [-1, -101, VOCAB, VOCAB + 2, VOCAB + 1000])
def test_target_outside_the_vocabulary_is_nan_not_a_number(target: int, z_loss: float) -> None:
    """Also one that names a padding row; loss and gradients, since a training loop may watch either."""
    hidden, weight, targets = inputs(torch.float32)
    weight = torch.cat([weight, weight[:5]])
    targets[4] = target
    got = ours(hidden, weight, targets, vocab=VOCAB, z_loss=z_loss)
    assert got.loss.isnan()
    assert got.log_z_squared is None or got.log_z_squared.isnan()
    assert got.hidden_grad[4].isnan().all()
    assert got.weight_grad[:VOCAB].isnan().all()
    assert got.hidden_grad[:4].isfinite().all()


def test_shapes_that_do_not_match_are_refused() -> None:
    hidden, weight, targets = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"targets have shape \(12,\), hidden states \(13, 8\)"):
        ours(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match="vocab_size=38 does not fit into 1 shards of 37 rows; pad the unembedding"):
        VocabShard.of(38, 37, None)


@pytest.mark.parametrize(("logit", "gradient"), [(3.0, 0.75), (-4.0, -1.0), (0.0, 0.0)])
def test_z_loss_of_a_single_entry_by_hand(logit: float, gradient: float) -> None:
    """Its cross entropy is 0 and log(Z) its logit: dL/dlogit = 2/8 * logit. At -4 the softmax's part vanishes."""
    one = torch.ones(1, 1, dtype=torch.float64)
    got = ours(one * logit, one, torch.zeros(1, dtype=torch.int64), z_loss=0.125)
    assert (float(got.loss), float(got.hidden_grad), float(got.weight_grad)) == (0.0, gradient, gradient * logit)
    assert got.log_z_squared == logit**2


# Accuracy -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_counts_and_predictions_equal_argmax(dtype: torch.dtype, chunk: int | None) -> None:
    """`torch.argmax` returns the first of several largest; in bf16 (8 bits) ties are common, here in every row."""
    hidden, weight, targets = inputs(dtype, tokens=60, vocab=300)
    weight[150:] = weight[:150]
    logits = hidden @ weight.T
    best = logits.argmax(-1)
    targets[::2] = best[::2]
    targets[::4] = best[::4] + 150  # the second of the tied entries is not the most likely one
    sums, gradient = linear_cross_entropy(
        hidden, weight, targets, VocabShard.of(300, 300, None), chunk_tokens=chunk, predictions=True
    )
    assert gradient is None
    assert torch.equal(sums.predictions, best)
    assert best.max() < 150
    assert int(sums.correct) == int((best == targets).sum())
    assert 15 <= int(sums.correct) <= 30


@pytest.mark.parametrize("chunk", CHUNKS)
def test_the_loss_of_every_position(chunk: int | None) -> None:
    hidden, weight, targets = inputs(torch.float64)
    assert (targets == IGNORE_INDEX).any()
    sums, _ = linear_cross_entropy(
        hidden, weight, targets, VocabShard.of(VOCAB, VOCAB, None), chunk_tokens=chunk, predictions=True
    )
    each = F.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE_INDEX, reduction="none")
    torch.testing.assert_close(sums.losses, each, rtol=1e-12, atol=1e-12)
    with_z_loss, _ = linear_cross_entropy(
        hidden, weight, targets, VocabShard.of(VOCAB, VOCAB, None), chunk_tokens=chunk, predictions=True, z_loss=0.1
    )
    assert torch.equal(with_z_loss.losses, sums.losses)
    assert torch.equal(with_z_loss.predictions, sums.predictions)
    torch.testing.assert_close(sums.loss, each.sum(), rtol=1e-12, atol=0)


# Default chunks -------------------------------------------------------------------------------------------------------


def test_default_chunk_bounds_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 20 * VOCAB)
    widths = []
    sums = TorchSoftmax.sums
    monkeypatch.setattr(TorchSoftmax, "sums", lambda *a: widths.append(tuple(a[1].shape)) or sums(*a))
    case = inputs(torch.float64, tokens=50)
    assert error(ours(*case), plain(*case)) <= 1e-12
    assert widths == [(20, VOCAB), (20, VOCAB), (10, VOCAB)]


def test_on_a_gpu_its_memory_bounds_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens(gibibytes: float, rows: int, index: int) -> int:
        properties = SimpleNamespace(total_memory=int(gibibytes * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return loss_module.chunk_tokens_for(VocabShard.of(rows, rows, None), None, torch.device("cuda", index))

    shard = VocabShard.of(131072, 131072, None)
    assert loss_module.chunk_tokens_for(shard, None, torch.device("cpu")) == 128
    assert loss_module.chunk_tokens_for(shard, 40, torch.device("cuda", 0)) == 40
    a_gpu = tokens(79.1, 131072, 90)
    assert a_gpu * 131072 * 6 <= 64 * 2**30 / 32 < (a_gpu + 16) * 131072 * 6
    assert tokens(79.6, 131072, 91) == a_gpu, "ranks on GPUs of one model have to agree"
    assert tokens(139.8, 131072, 92) > a_gpu
    assert tokens(139.8, 32768, 93) == loss_module.CUDA_MAX_CHUNK_TOKENS
    assert tokens(3.9, 131072, 94) == 128, "never shorter than on a CPU"


# The autograd form ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", ["none", "hidden", "weight", "both"])
def test_autograd_form(frozen: str) -> None:
    hidden, weight, targets = inputs(torch.float64)
    want = plain(hidden, weight, targets, scale=3.0)
    hidden.requires_grad_(frozen not in ("hidden", "both"))
    weight.requires_grad_(frozen not in ("weight", "both"))
    loss, correct = vocab_parallel_linear_cross_entropy(hidden, weight, targets, chunk_tokens=4)
    torch.testing.assert_close(loss.detach(), want.loss, rtol=1e-12, atol=0)
    assert not correct.requires_grad
    assert loss.requires_grad == (frozen != "both")
    if frozen == "both":
        return
    (3.0 * loss).backward()
    for leaf, right in ((hidden, want.hidden_grad), (weight, want.weight_grad)):
        assert (leaf.grad is None) == (not leaf.requires_grad)
        if leaf.requires_grad:
            torch.testing.assert_close(leaf.grad, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_autograd_form_by_finite_differences(z_loss: float) -> None:
    """Its value is the objective, z-loss included. Not by `gradcheck`, which goes backward a second time."""
    hidden, weight, targets = inputs(torch.float64, vocab=11)

    def objective() -> Tensor:
        return vocab_parallel_linear_cross_entropy(hidden, weight, targets, chunk_tokens=4, z_loss=z_loss)[0]

    for leaf in (hidden, weight):
        leaf.requires_grad_()
        objective().backward()
        found, leaf.grad = leaf.grad, None
        leaf.requires_grad_(False)
        slopes = torch.empty_like(leaf)
        for place in range(leaf.numel()):
            entry, step = leaf.view(-1)[place], 1e-5
            entry += step
            above = objective()
            entry -= 2 * step
            slopes.view(-1)[place] = (above - objective()) / (2 * step)
            entry += step
        torch.testing.assert_close(found, slopes, rtol=1e-6, atol=1e-6)
    want = plain(hidden, weight, targets, z_loss=z_loss)
    value = want.loss if want.log_z_squared is None else want.loss + z_loss * want.log_z_squared
    torch.testing.assert_close(objective(), value, rtol=1e-12, atol=0)


def test_second_backward_is_refused() -> None:
    hidden, weight, targets = inputs(torch.float64)
    loss, _ = vocab_parallel_linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time: its gradients were freed"):
        loss.backward()


def test_gradient_of_the_gradient_is_refused() -> None:
    """It would silently lack the loss's own curvature."""
    hidden, weight, targets = inputs(torch.float64)
    loss, _ = vocab_parallel_linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    (gradient,) = torch.autograd.grad(loss.square(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()

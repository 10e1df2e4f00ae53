"""The fused output layer and loss, against the plain ones in torch."""

import pytest
import torch
import torch.nn.functional as F
from distributed import GlooPool
from torch import Tensor

from megatron_core_impl.config import Layout
from megatron_core_impl.layers import blocks, cross_entropy
from megatron_core_impl.layers.cross_entropy import vocab_parallel_linear_cross_entropy
from megatron_core_impl.layers.parameter import ShardedParameter
from megatron_core_impl.mesh import init_mesh

TOKENS, HIDDEN, VOCAB, NUM_REAL = 12, 6, 40, 33
LABELS = torch.tensor([0, 32, -100, 7, 7, 19, 20, 31, -100, 3, 25, 11])
WEIGHTS = torch.tensor([0.5, 1, 0, 2, 1, 1, 0.25, 1, 0, 1, 0, 3], dtype=torch.float64) / 9


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ShardedParameter]:
    return random(TOKENS, HIDDEN, dtype=dtype).requires_grad_(), ShardedParameter(random(VOCAB, HIDDEN, dtype=dtype))


def plain(x: Tensor, weight: Tensor, labels: Tensor = LABELS, num_real: int = NUM_REAL) -> Tensor:
    return F.cross_entropy((x @ weight.t())[:, :num_real], labels, reduction="none", ignore_index=-100) @ WEIGHTS


@pytest.fixture(params=[1 << 25, 5 * VOCAB], ids=["one-block", "blocks-of-4"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", request.param)
    monkeypatch.setattr(cross_entropy, "CACHED", 3 * VOCAB)


@pytest.mark.usefixtures("_blocks")
def test_loss_and_gradients_are_those_of_the_plain_layers() -> None:
    x, weight = inputs()
    loss = vocab_parallel_linear_cross_entropy(x, weight, LABELS, WEIGHTS, NUM_REAL, None)
    (1e3 * loss).backward()  # a loss scale
    got, x.grad, got_weight, weight.grad = x.grad, None, weight.grad, None
    want = plain(x, weight)
    (1e3 * want).backward()
    torch.testing.assert_close(loss, want, rtol=1e-13, atol=0)
    torch.testing.assert_close(got, x.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_weight, weight.grad, rtol=1e-12, atol=1e-12)
    assert got is not None
    assert not got[2].any()
    assert got_weight is not None
    assert not got_weight[NUM_REAL:].any()


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_less_precision_gives_nearly_the_same(dtype: torch.dtype, close: float) -> None:
    x, weight = inputs(dtype)
    tiny = WEIGHTS * 1e-7  # in fp16 such numbers would be 0, or half of their digits
    loss = vocab_parallel_linear_cross_entropy(x, weight, LABELS, tiny, NUM_REAL, None)
    (1e7 * loss).backward()
    assert loss.dtype == torch.float32
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    logits = exact_x @ exact_weight.t()
    want = plain(exact_x, exact_weight)
    want.backward()
    loss = loss.detach()
    assert 1e7 * loss.item() == pytest.approx(want.item(), rel=close, abs=float(logits.detach().abs().max()) * close)
    for got, exact in ((x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert got is not None
        assert exact is not None
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=float(exact.abs().max()) * close)


def test_an_evaluation_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "add_product_", None)  # would fail
    x, weight = inputs()
    with torch.no_grad():
        loss = vocab_parallel_linear_cross_entropy(x, weight, LABELS, WEIGHTS, NUM_REAL, None)
    torch.testing.assert_close(loss, plain(x, weight).detach(), rtol=1e-13, atol=0)


def test_a_micro_batch_without_targets_has_no_loss_and_no_gradient() -> None:
    x, weight = inputs()
    loss = vocab_parallel_linear_cross_entropy(x, weight, torch.full((TOKENS,), -100), torch.zeros(TOKENS), NUM_REAL, None)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert not x.grad.any()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_the_sink_of_the_weight_takes_its_gradient_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 5 * VOCAB)
    x, weight = inputs(torch.bfloat16)
    grads: list[Tensor] = []

    class Sink:
        def add(self, grad: Tensor) -> None:
            grads.append(grad.clone())

        def add_product(self, grad_output: Tensor, x: Tensor) -> None:
            raise AssertionError

    loss = vocab_parallel_linear_cross_entropy(x, weight, LABELS, WEIGHTS, NUM_REAL, None)
    loss.backward(retain_graph=True)
    weight.sink, plain_grad, weight.grad = Sink(), weight.grad, None
    vocab_parallel_linear_cross_entropy(x, weight, LABELS, WEIGHTS, NUM_REAL, None).backward()
    (grad,) = grads
    assert grad.dtype == torch.float32, "blocks add up in single precision"
    assert weight.grad is None
    assert plain_grad is not None
    assert torch.equal(grad.bfloat16(), plain_grad)
    with pytest.raises(RuntimeError, match="went backward a second time"):
        loss.backward()


def test_enormous_logits_and_certain_labels_keep_their_digits() -> None:
    weight = ShardedParameter(torch.tensor([[1e4], [-1e4], [0.0]]))
    x = torch.ones(2, 1, requires_grad=True)
    loss = vocab_parallel_linear_cross_entropy(x, weight, torch.tensor([1, 0]), torch.ones(2), 3, None)
    loss.backward()
    assert loss.item() == 2e4
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [1.0, -1.0, 0.0]
    certain = ShardedParameter(torch.tensor([[0.0], [-9.0]], dtype=torch.bfloat16))  # p is 1 in bf16, p - 1 is not 0
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    vocab_parallel_linear_cross_entropy(x, certain, torch.tensor([0]), torch.ones(1), 2, None).backward()
    assert certain.grad is not None
    assert certain.grad[0].item() == pytest.approx(-(1 - torch.tensor(9.0).sigmoid().item()), rel=1e-2)


def test_logits_far_from_zero_keep_the_gradient_of_their_differences() -> None:
    """Of a token's logits only the differences count, though single precision rounds their sum with what is common to all."""
    x, weight = random(64, 8, dtype=torch.float32), ShardedParameter(random(1000, 8, dtype=torch.float32))
    x[:, 0], weight.data[:, 0] = 1, 1000
    exact = x.double().requires_grad_()
    labels, weights = torch.arange(64), torch.ones(64)
    F.cross_entropy(exact @ weight.detach().double().t(), labels, reduction="sum").backward()
    x.requires_grad_()
    vocab_parallel_linear_cross_entropy(x, weight, labels, weights, 1000, None).backward()
    assert x.grad is not None
    assert exact.grad is not None
    error = (x.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 2e-3, "the logits themselves are rounded by 6e-5"


def test_in_fp16_sums_over_a_vocabulary_do_not_overflow() -> None:
    x = torch.zeros(2, 1, dtype=torch.float16, requires_grad=True)
    weight = ShardedParameter(torch.full((4000, 1), 20.0, dtype=torch.float16))  # Σ e W is 80000
    vocab_parallel_linear_cross_entropy(x, weight, torch.tensor([1, 2]), torch.ones(2), 4000, None).backward()
    assert x.grad is not None
    assert x.grad.abs().max() < 0.1


def test_what_belongs_to_a_label_is_added_in_single_precision() -> None:
    x, weight = torch.full((1, 1), 1.0078125, dtype=torch.bfloat16), torch.zeros(1000, 1, dtype=torch.bfloat16)
    parameter, grads = ShardedParameter(weight), list[Tensor]()

    class Sink:
        def add(self, grad: Tensor) -> None:
            grads.append(grad)

    parameter.sink = Sink()  # type: ignore[assignment]
    vocab_parallel_linear_cross_entropy(x, parameter, torch.tensor([3]), torch.ones(1), 1000, None).backward()
    assert grads[0][3].item() == pytest.approx(-0.999 * 1.0078125, rel=1e-6)


def loss_rank(num_real: int, dtype: torch.dtype, lower: float = 0.0) -> list[Tensor]:
    """`lower` is taken from all logits of the second rank."""
    mesh = init_mesh(Layout(tp=2), "cpu")
    x, weight = inputs(dtype)
    x.data[:, 0] = 1
    weight.data[VOCAB // 2 :, 0] -= lower
    x = x.detach().chunk(2)[mesh.tp_rank].requires_grad_()
    part = ShardedParameter(weight.detach().chunk(2)[mesh.tp_rank].clone())
    own_real = min(max(num_real - mesh.tp_rank * len(part), 0), len(part))
    with pytest.MonkeyPatch.context() as patch:  # the worker goes on to other tests
        patch.setattr(blocks, "BLOCK", 5 * VOCAB // 2)
        loss = vocab_parallel_linear_cross_entropy(x, part, LABELS % num_real, WEIGHTS, own_real, mesh.tp_group)
    (3 * loss).backward()
    assert x.grad is not None
    assert part.grad is not None
    return [loss.detach(), x.grad, part.grad]


@pytest.mark.parametrize("num_real", [33, 20], ids=["both", "the-second-rank-has-none"])
def test_over_two_ranks_it_is_the_plain_loss(pool: GlooPool, num_real: int) -> None:
    first, second = pool.run(loss_rank, 2, num_real, torch.float64)
    x, weight = inputs()
    x.data[:, 0] = 1
    want = plain(x, weight, LABELS % num_real, num_real)
    (3 * want).backward()
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[0], want, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat([first[1], second[1]]), x.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([first[2], second[2]]), weight.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lower", [0.0, 50.0], ids=["alike", "the-second-hardly-counts"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_over_two_ranks_in_less_precision(pool: GlooPool, dtype: torch.dtype, close: float, lower: float) -> None:
    first, second = pool.run(loss_rank, 2, NUM_REAL, dtype, lower)
    x, weight = (tensor.detach().double() for tensor in inputs(dtype))
    x[:, 0] = 1
    weight[VOCAB // 2 :, 0] -= lower
    x.requires_grad_(), weight.requires_grad_()
    want = plain(x, weight, LABELS % NUM_REAL)
    (3 * want).backward()
    assert first[0].item() == pytest.approx(want.item(), rel=close)
    for got, exact in ((torch.cat([first[1], second[1]]), x.grad), (torch.cat([first[2], second[2]]), weight.grad)):
        assert exact is not None
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=float(exact.abs().max()) * close)

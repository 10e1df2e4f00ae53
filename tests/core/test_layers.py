"""The hand-written gradients against finite differences, and each layer against its plain formula."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from megatron_core_impl.layers.attention import attend
from megatron_core_impl.layers.cross_entropy import vocab_parallel_cross_entropy
from megatron_core_impl.layers.linear import column_linear
from megatron_core_impl.layers.mlp import swiglu
from megatron_core_impl.layers.norm import _RMSNorm
from megatron_core_impl.layers.rope import rotate, rotation


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (
        torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).to(dtype).requires_grad_()
    )


def test_gradients_of_the_functions_are_those_of_finite_differences() -> None:
    turn = rotation(torch.arange(3), 4, 10000.0, torch.float64)
    assert gradcheck(lambda x: rotate(x, turn), random(2, 3, 2, 4))
    assert gradcheck(swiglu, (random(3, 4), random(3, 4) + 1))
    assert gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-5), (random(3, 4), random(4)))
    assert gradcheck(lambda x, *w: column_linear(x, *w, group=None), (random(5, 3), random(4, 3), random(2, 3)))


def test_cross_entropy_masks_tokens_and_padded_rows() -> None:
    logits, plain_logits = random(4, 7), random(4, 7)
    labels, weights = torch.tensor([0, 4, -100, 2]), torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    loss = vocab_parallel_cross_entropy(logits, labels, weights, 5, None)
    plain = F.cross_entropy(plain_logits[:, :5], labels, reduction="none", ignore_index=-100) @ weights
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
    (3 * loss).backward()
    (3 * plain).backward()
    torch.testing.assert_close(logits.grad, plain_logits.grad, rtol=1e-12, atol=1e-15)
    assert logits.grad is not None
    assert not logits.grad[:, 5:].any()
    assert not logits.grad[2].any()


def test_cross_entropy_of_half_precision_is_computed_in_single() -> None:
    logits = random(4, 1000, dtype=torch.bfloat16)
    labels, weights = torch.tensor([0, 4, 999, 2]), torch.ones(4)
    loss = vocab_parallel_cross_entropy(logits, labels, weights, 1000, None)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(F.cross_entropy(logits.float(), labels, reduction="sum").item(), rel=1e-6)


def test_cross_entropy_survives_enormous_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([1]), torch.ones(1), 3, None)
    loss.backward()
    assert loss.item() == 2e4
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1.0, -1.0, 0.0]]


def test_cross_entropy_does_not_see_padded_rows_even_as_the_highest() -> None:
    logits = random(4, 7, dtype=torch.float32).detach() - 1000
    logits[:, 5:] = 0  # what padded rows, which are zero, give
    labels, weights = torch.tensor([0, 4, 1, 2]), torch.ones(4)
    loss = vocab_parallel_cross_entropy(logits, labels, weights, 5, None)
    assert loss.item() == pytest.approx(F.cross_entropy(logits[:, :5], labels, reduction="sum").item(), rel=1e-6)


def test_a_second_backward_pass_through_the_loss_is_an_error_not_a_wrong_number() -> None:
    logits = random(4, 7)
    loss = vocab_parallel_cross_entropy(logits, torch.tensor([0, 1, 2, 3]), torch.ones(4), 7, None)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_attention_is_causal_and_shares_heads_in_order() -> None:
    q, k, v = random(2, 5, 4, 6), random(2, 5, 2, 6), random(2, 5, 2, 6)
    keys, values = (x.repeat_interleave(2, dim=2) for x in (k, v))  # query heads 0, 1 look at head 0; 2, 3 at head 1
    scores = torch.einsum("bsnd,btnd->bnst", q, keys) / 6**0.5
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
    expected = torch.einsum("bnst,btnd->bsnd", scores.softmax(-1), values)
    torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-12, atol=1e-12)


def test_rotation_pairs_the_halves_of_a_head() -> None:
    x = random(1, 3, 1, 4)
    turned = rotate(x, rotation(torch.tensor([0, 1, 7]), 4, 100.0, torch.float64))
    for row, position in enumerate((0, 1, 7)):
        for pair, speed in enumerate((1.0, 0.1)):
            a, b = x[0, row, 0, pair].item(), x[0, row, 0, pair + 2].item()
            angle = torch.tensor(position * speed, dtype=torch.float64)
            got = (turned[0, row, 0, pair].item(), turned[0, row, 0, pair + 2].item())
            assert got == pytest.approx(
                ((a * angle.cos() - b * angle.sin()).item(), (b * angle.cos() + a * angle.sin()).item()), rel=1e-12
            )

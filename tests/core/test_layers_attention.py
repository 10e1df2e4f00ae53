"""Attention: windows, documents, uneven heads, biases, dropout, and what the kernels for CUDA are told.

The oracle, `plain`, makes every number of the S × S scores and masks them, in float64. The kernels for CUDA cannot run here:
stand-ins that follow their documentation take their place, so that what is passed to them is checked, not they.
"""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed import GlooPool
from torch import Tensor

from megatron_core_impl.config import Layout, ModelConfig, TensorSpec
from megatron_core_impl.layers import attention
from megatron_core_impl.layers.attention import SelfAttention, Sequences, attend, choose_kernel
from megatron_core_impl.layers.parameter import ParameterFactory, ShardedParameter
from megatron_core_impl.layers.rope import frequencies, rotation
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.models.tensors import tensors

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def config_of(**changes: Any) -> ModelConfig:
    numbers: dict[str, Any] = {
        "family": "llama", "vocab_size": 131, "hidden_size": 20, "intermediate_size": 20,
        "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64, "qkv_bias": True, "o_bias": True,
    }  # fmt: skip
    return ModelConfig(**(numbers | changes))


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()


def sequences(batch_size: int, length: int, lengths: tuple[int, ...] | None = None) -> Sequences:
    return Sequences(
        batch_size, rotation(torch.arange(length), frequencies(config_of(), torch.float64), torch.float64), lengths
    )


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | None, window: int | None) -> Tensor:
    """[B, S, heads, D] each; the mask as transformers writes it: key ≤ query, key > query - window, same document."""
    batch_size, length = q.shape[:2]
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    numbers = torch.repeat_interleave(torch.tensor(lengths or (length,) * batch_size)).view(batch_size, length)
    at = torch.arange(length)
    mask = (at <= at[:, None]) & (numbers[:, :, None] == numbers[:, None, :])  # [B, query, key]
    if window is not None:
        mask &= at > at[:, None] - window
    scores = torch.einsum("bsnd,btnd->bnst", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bnst,btnd->bsnd", scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window", [None, 1, 3, 9, 50])
@pytest.mark.parametrize("lengths", [None, (4, 16, 1, 19), (20, 20)], ids=["plain", "documents", "two"])
def test_attention_sees_its_window_of_its_document(
    lengths: tuple[int, ...] | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "WINDOW_BLOCK", 7)
    inputs = random(2, 20, 4, 6), random(2, 20, 2, 6), random(2, 20, 2, 6)
    got = attend(*inputs, sequences(2, 20, lengths), window=window)
    want = plain(*inputs, lengths, window)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grad = random(2, 20, 4, 6).detach()
    for ours, theirs in zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_a_document_may_go_on_from_one_sequence_of_the_micro_batch_to_the_next() -> None:
    q, k, v = random(2, 8, 4, 6), random(2, 8, 2, 6), random(2, 8, 2, 6)
    got = attend(q, k, v, sequences(2, 8, (5, 11)))
    flat = (x.reshape(1, 16, *x.shape[2:]) for x in (q, k, v))
    torch.testing.assert_close(got, plain(*flat, (5, 11), None).view_as(q), rtol=1e-12, atol=1e-12)


def test_attention_in_half_precision_stays_close_under_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WINDOW_BLOCK", 16)
    inputs = [random(1, 40, heads, 32, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    got = attend(*inputs, sequences(1, 40), window=11)
    torch.testing.assert_close(got.double(), plain(*(x.double() for x in inputs), None, 11), rtol=0, atol=0.02)


def test_dropout_zeroes_weights_in_training_only() -> None:
    config, mesh = config_of(), Mesh.single()
    layer, x = layer_of(config, mesh, whole_weights(config), attention_dropout=0.5), random(10, 20)
    without = layer_of(config, mesh, whole_weights(config))
    torch.manual_seed(0)
    first = layer(x, sequences(2, 5))
    assert not torch.allclose(first, without(x, sequences(2, 5)))
    torch.manual_seed(0)
    assert torch.equal(layer(x, sequences(2, 5)), first)
    assert torch.equal(layer.eval()(x, sequences(2, 5)), without(x, sequences(2, 5)))
    ones = torch.ones(1, 2000, 1, 2, dtype=torch.float64)  # rows of weights sum to 1 on average, and to 1 ± a little each
    assert attend(ones, ones, ones, sequences(1, 2000), dropout=0.5).mean().item() == pytest.approx(1, abs=0.02)


# --- the layer, its heads cut over tp


def whole_weights(config: ModelConfig) -> dict[str, Tensor]:
    return {spec.name: random(*spec.shape).detach() for spec in specs_of(config)}


def specs_of(config: ModelConfig) -> list[TensorSpec]:
    return [spec for spec in tensors(config) if ".self_attn." in spec.name]


def layer_of(config: ModelConfig, mesh: Mesh, weights: dict[str, Tensor], **options: Any) -> SelfAttention:
    factory = ParameterFactory({spec.name: spec for spec in specs_of(config)}, mesh, torch.float64, CPU)
    layer = SelfAttention(config, mesh.tp_group, factory, "model.layers.0.self_attn", **options)
    for parameter in layer.parameters():
        assert isinstance(parameter, ShardedParameter)
        parameter.data.copy_(weights[parameter.spec.name][tuple(slice(*r) for r in parameter.piece)])
    return layer


def attention_rank(config: ModelConfig, weights: dict[str, Tensor], x: Tensor, grad: Tensor) -> list[Any]:
    """Output, gradient of the input, and for each weight its slice and gradient."""
    mesh = init_mesh(Layout(tp=2), "cpu", kv_replicas=Layout(tp=2).kv_replicas(config))
    layer = layer_of(config, mesh, weights)
    x = x.detach().chunk(2)[mesh.tp_rank].requires_grad_()
    y = layer(x, sequences(2, 7, (3, 4, 5, 2)))
    y.backward(grad.chunk(2)[mesh.tp_rank])
    return [y.detach(), x.grad, {p.spec.name: (p.piece, p.grad) for p in layer.parameters()}]


@pytest.mark.parametrize("heads", [(4, 2), (7, 1)], ids=["grouped", "uneven"])  # 7 heads on 2 ranks are 4 and 3
def test_attention_over_two_ranks_is_the_whole_one(pool: GlooPool, heads: tuple[int, int]) -> None:
    config = config_of(num_attention_heads=heads[0], num_key_value_heads=heads[1], sliding_window=4)
    weights, x, grad = whole_weights(config), random(14, 20), random(14, 20).detach()
    ranks = pool.run(attention_rank, 2, config, weights, x, grad)

    parameters = {name: value.clone().requires_grad_() for name, value in weights.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        prefix = f"model.layers.0.self_attn.{name}_proj"
        return F.linear(x, parameters[f"{prefix}.weight"], parameters[f"{prefix}.bias"])

    q, k, v = (linear(name, x).view(2, 7, -1, 6) for name in "qkv")
    turn = sequences(2, 7).rotation
    q, k = (y * turn.cos + torch.cat((y[..., 3:], y[..., :3]), -1) * turn.sin for y in (q, k))
    y = linear("o", plain(q, k, v, (3, 4, 5, 2), 4).reshape(14, -1))
    y.backward(grad)

    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]), x.grad, rtol=1e-11, atol=1e-11)
    for name, parameter in parameters.items():
        total = torch.zeros_like(parameter)
        for rank in ranks:
            piece, part = rank[2][name]
            total[tuple(slice(*r) for r in piece)] += part  # replicated parts are partial sums, all others meet once
        torch.testing.assert_close(total, parameter.grad, rtol=1e-11, atol=1e-11, msg=name)


# --- the choice of the kernel


def test_the_fastest_kernel_that_fits_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(device: torch.device, dtype: torch.dtype, *, is_plain: bool = True, has_dropout: bool = False) -> str:
        return choose_kernel(device, dtype, is_plain=is_plain, has_dropout=has_dropout, wanted=None)

    monkeypatch.setitem(sys.modules, "flash_attn", None)  # not installed
    assert chosen(CPU, torch.bfloat16, is_plain=False) == "sdpa"
    assert chosen(CUDA, torch.float32, is_plain=False) == "sdpa"
    assert chosen(CUDA, torch.bfloat16) == "sdpa"
    assert chosen(CUDA, torch.float16, is_plain=False) == "varlen"
    assert chosen(CUDA, torch.bfloat16, is_plain=False, has_dropout=True) == "sdpa"
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))  # all that flash-attn-4 has of that name
    assert chosen(CUDA, torch.bfloat16) == "sdpa"
    monkeypatch.setitem(sys.modules, "flash_attn", PretendFlashAttention())
    assert chosen(CUDA, torch.bfloat16) == chosen(CUDA, torch.float16, is_plain=False, has_dropout=True) == "flash-attn"
    assert chosen(CPU, torch.bfloat16) == chosen(CUDA, torch.float64) == "sdpa"


def test_a_kernel_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    x = random(1, 4, 1, 6, dtype=torch.bfloat16)
    told = r"^attention_kernel='varlen' computes on CUDA in bf16 or fp16, not on cpu in torch\.bfloat16\."
    with pytest.raises(ValueError, match=told):
        attend(x, x, x, sequences(1, 4), kernel="varlen")
    with pytest.raises(ValueError, match=r"^attention_kernel='flash-attn' needs the package flash-attn, which is not inst"):
        choose_kernel(CUDA, torch.bfloat16, is_plain=True, has_dropout=False, wanted="flash-attn")
    with pytest.raises(ValueError, match=r"^attention_kernel='varlen' has no attention dropout"):
        choose_kernel(CUDA, torch.bfloat16, is_plain=True, has_dropout=True, wanted="varlen")


class PretendFlashAttention(ModuleType):
    """The two functions of the flash-attn package by their documentation: query i sees keys i - left … i + right."""

    def __init__(self) -> None:
        super().__init__("flash_attn")

    def flash_attn_func(
        self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float, causal: bool, window_size: tuple[int, int]
    ) -> Tensor:
        assert causal
        assert dropout_p == 0
        assert window_size[1] in (-1, 0)
        return plain(q, k, v, None, None if window_size[0] == -1 else window_size[0] + 1)

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
        dropout_p: float, causal: bool, window_size: tuple[int, int],
    ) -> Tensor:  # fmt: skip
        lengths = cu_q.diff()
        assert cu_q.dtype == torch.int32
        assert torch.equal(cu_q, cu_k)
        assert max_q == max_k == lengths.max()
        parts = zip(*(x.split(lengths.tolist()) for x in (q, k, v)), strict=True)
        return torch.cat([self.flash_attn_func(*(x[None] for x in part), dropout_p, causal, window_size)[0] for part in parts])


@pytest.mark.parametrize(("kernel", "version"), [("flash-attn", ""), ("varlen", "2.11"), ("varlen", "2.12")])
@pytest.mark.parametrize(("lengths", "window"), [(None, None), (None, 3), ((4, 6, 7, 3), None), ((4, 6, 7, 3), 3)])
def test_kernels_for_cuda_get_windows_and_documents_in_their_own_terms(
    kernel: attention.Kernel, version: str, lengths: tuple[int, ...] | None, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend = PretendFlashAttention()
    monkeypatch.setitem(sys.modules, "flash_attn", pretend)

    def of_2_11(*args: Any, window_size: tuple[int, int]) -> Tensor:
        return pretend.flash_attn_varlen_func(*args, dropout_p=0, causal=True, window_size=window_size)

    def of_2_12(*args: Any, window_size: tuple[int, int], enable_gqa: bool = False) -> Tensor:
        assert enable_gqa, "there are fewer key/value heads"
        return of_2_11(*args, window_size=window_size)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", of_2_12 if version == "2.12" else of_2_11)
    monkeypatch.setattr(attention, "choose_kernel", lambda *args, **kwargs: kernel)
    q, k, v = random(2, 10, 4, 6), random(2, 10, 2, 6), random(2, 10, 2, 6)
    got = attend(q, k, v, replace(sequences(2, 10), document_lengths=lengths), window=window)
    torch.testing.assert_close(got, plain(q, k, v, lengths, window), rtol=1e-12, atol=1e-12)

"""Models on meshes that do not go with them."""

from dataclasses import replace

import pytest
import tiny
import torch

from megatron_core_impl.config import Kernel, Layout, ModelConfig
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models.transformer import DecoderLayer
from megatron_core_impl.parallel.parallelize import load_weights, parallelize


def test_a_mesh_that_knows_nothing_of_shared_heads() -> None:
    mesh = replace(Mesh.single("meta"), layout=Layout(tp=4))
    text = r"at tp=4, 2 ranks hold each key/value head .*: init_mesh needs kv_replicas=2"
    with pytest.raises(AssertionError, match=text):
        parallelize(tiny.GROUPED, mesh, dtype=torch.float32)
    parallelize(tiny.TIED, mesh, dtype=torch.float32)  # a head for each rank


@pytest.mark.parametrize("config", [tiny.GROUPED, tiny.BIASED], ids=["plain", "window"])
def test_a_kernel_that_is_asked_for_is_the_one(config: ModelConfig) -> None:
    """On the CPU, what is chosen is sdpa."""
    found = []
    for kernel in kernels:
        model = parallelize(config, Mesh.single(), dtype=torch.float32, kernel=kernel)
        load_weights(model, tiny.MemoryReader(tiny.random_weights(config)))
        assert {layer.self_attn.kernel for layer in model.model.layers.values() if isinstance(layer, DecoderLayer)} == {kernel}
        batch = tiny.micro_batches(config, 0)[0]
        loss = model.loss(batch.tokens, batch.labels, batch.weights)
        loss.backward()  # type: ignore[no-untyped-call]
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


kernels: tuple[Kernel | None, ...] = (None, "sdpa")


@pytest.mark.parametrize("kernel", ["flash-attn", "varlen"])
def test_a_kernel_that_cannot_compute_here_is_refused(kernel: Kernel) -> None:
    text = rf"attention_kernel='{kernel}' computes on CUDA in bf16 or fp16, not on cpu in torch\.bfloat16\. Use 'sdpa'$"
    with pytest.raises(ValueError, match=text):
        parallelize(tiny.GROUPED, Mesh.single(), dtype=torch.bfloat16, kernel=kernel)

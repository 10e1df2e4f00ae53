"""What only a GPU can show: its attention kernels, training in half precision, batches that arrive while it computes.

Run by `make test-gpu`; skipped where there is none. The oracles are the plain formula of attention and the same training on the
CPU, both in float64.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_layers_attention import plain, random, sequences
from tiny import BIASED, FALCON, GROUPED, LR, SETTINGS, STEPS, loaded, micro_batches, random_weights, reference
from tiny_job import changed, losses_of, make_job, stop_after, tensors_of
from torch import Tensor

from megatron_core_impl.batches import on_device, training_batches
from megatron_core_impl.config import Kernel, ModelConfig, Recompute
from megatron_core_impl.layers.attention import Sequences, attend, flash_attn_package
from megatron_core_impl.layers.rope import Rotation
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.parallel.parallelize import parallelize
from megatron_core_impl.parallel.pipeline import Pipeline
from megatron_core_impl.parallel.zero import ZeroOptimizer
from megatron_core_impl.train_config import Job
from megatron_core_impl.trainer import train
from megatron_core_impl.training_data import open_data, prepare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

GPU = torch.device("cuda")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path)


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Refuse whatever makes the host wait for the GPU."""
    yield
    torch.cuda.set_sync_debug_mode("default")


# --- attention


@pytest.mark.parametrize("kernel", ["sdpa", "varlen", "flash-attn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("window", [None, 1, 50, 1000])
@pytest.mark.parametrize("lengths", [None, (100, 1, 411)], ids=["plain", "documents"])
def test_every_kernel_computes_attention_and_its_gradients(
    kernel: Kernel, dtype: torch.dtype, window: int | None, lengths: tuple[int, ...] | None
) -> None:
    if kernel == "flash-attn" and flash_attn_package() is None:
        pytest.skip("flash-attn is not installed")
    exact = random(2, 256, 8, 64), random(2, 256, 2, 64), random(2, 256, 2, 64)
    grad = random(2, 256, 8, 64).detach()
    ours = [x.detach().to(GPU, dtype).requires_grad_() for x in exact]
    on_cpu = sequences(2, 256, lengths)
    turn = on_cpu.rotation
    here = Sequences(2, Rotation(turn.cos.to(GPU), turn.sin.to(GPU)), lengths)

    got = attend(*ours, here, window=window, kernel=kernel)
    flat = [x if lengths is None else x.reshape(1, 512, *x.shape[2:]) for x in exact]  # a document may end in the next row
    want = plain(*flat, lengths, window).view_as(exact[0])
    tolerance = {"rtol": 0, "atol": 0.02 if dtype == torch.bfloat16 else 0.004}
    torch.testing.assert_close(got.double().cpu(), want, **tolerance)
    gradients = torch.autograd.grad(got, ours, grad.to(got))
    for mine, other in zip(gradients, torch.autograd.grad(want, exact, grad), strict=True):
        error, size = ((x.square().mean().sqrt().item()) for x in (mine.double().cpu() - other, other))
        assert error < (0.01 if dtype == torch.bfloat16 else 0.002) * size + 1e-6  # of a single key, dq is 0


# --- a training step


@pytest.mark.parametrize("recompute", [None, Recompute(mode="selective"), Recompute(mode="full")], ids=["keep", "some", "all"])
@pytest.mark.parametrize("config", [GROUPED, FALCON, BIASED], ids=["grouped", "falcon", "biased"])
def test_steps_in_float64_are_those_of_the_cpu(config: ModelConfig, recompute: Recompute | None) -> None:
    weights = random_weights(config)
    want = reference(config, weights)
    model = loaded(config, Mesh.single(GPU), weights, recompute=recompute)
    optimizer, pipeline = ZeroOptimizer(model, Mesh.single(GPU), SETTINGS), Pipeline(model)
    for step in range(STEPS):
        batches = on_device(micro_batches(config, step), GPU)
        optimizer.begin_step(len(batches))
        assert pipeline.forward_backward(batches, scale=1.0).item() == pytest.approx(want.losses[step], rel=1e-9)
        gradients = optimizer.complete_gradients()
        for name, (_, gradient) in gradients.items():
            torch.testing.assert_close(gradient.cpu(), want.grads[step][name], rtol=1e-8, atol=1e-10, msg=name)
        assert optimizer.step(LR) == pytest.approx(want.norms[step], rel=1e-9)
    optimizer.wait_for_weights()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.detach().cpu()[: len(want.weights[name])], want.weights[name], rtol=1e-8, atol=1e-10
        )


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "documents"])
def test_the_host_never_waits_within_a_step(packed: bool, no_waiting: None) -> None:
    config = ModelConfig(
        family="llama", vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=256,
    )  # fmt: skip
    model = parallelize(config, Mesh.single(GPU), dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.02)
    optimizer, pipeline = ZeroOptimizer(model, Mesh.single(GPU), SETTINGS), Pipeline(model)
    batch = micro_batches(config, 0)[0]
    rows = [x.repeat(1, 8).pin_memory() for x in (batch.tokens, batch.labels.clamp(min=0), batch.weights.float())]
    lengths = (50, 100, 42) if packed else None
    batches = [batch._replace(tokens=rows[0], labels=rows[1], weights=rows[2], document_lengths=lengths)] * 2
    for step in range(3):
        moved = on_device(batches, GPU)
        optimizer.begin_step(len(moved))
        if step:  # kernels are loaded by now
            torch.cuda.set_sync_debug_mode("error")
        pipeline.forward_backward(moved, scale=1.0)
        torch.cuda.set_sync_debug_mode("default")
        optimizer.step(LR)


# --- a whole training


def losses(job: Job, kind: str) -> list[float]:
    return [value for _, found, value in losses_of(job) if found == kind]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_learns_what_it_learns_on_the_cpu_in_float64(job: Job, precision: Any) -> None:
    train(job, Mesh.single())
    here = changed(job, "gpu", precision=precision, initial_loss_scale=2.0**10)
    state = train(here, Mesh.single(GPU))
    assert state.skipped_steps == 0
    tolerance = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 1e-2}[precision]
    assert losses(here, "loss") == pytest.approx(losses(job, "loss"), rel=tolerance)
    assert losses(here, "valid_loss") == pytest.approx(losses(job, "valid_loss"), rel=tolerance)


def test_a_checkpoint_goes_on_on_the_other_kind_of_device(job: Job) -> None:
    train(job, Mesh.single())
    there, back = changed(job, "gpu-first"), changed(job, "cpu-first")
    for other, (first, then) in ((there, (GPU, "cpu")), (back, ("cpu", GPU))):
        assert train(other, Mesh.single(first), should_stop=stop_after(3)).step == 3
        train(other, Mesh.single(then))
        assert losses(other, "loss") == pytest.approx(losses(job, "loss"), rel=1e-9)
        for name, values in tensors_of(other, 6).items():
            torch.testing.assert_close(values, tensors_of(job, 6)[name], rtol=1e-7, atol=1e-9, msg=name)


def test_batches_lie_in_memory_that_the_gpu_copies_from_by_itself(job: Job) -> None:
    prepare(job)
    batches = next(training_batches(open_data(job).train, job, Mesh.single(GPU), 0))
    held: list[Tensor | None] = [values for batch in batches for values in (batch.tokens, batch.labels, batch.weights)]
    assert all(values is not None and values.is_pinned() for values in held)

"""Passes of a pipeline over real processes, in float64, against the plain loop over micro batches in one process.

The model is a stand-in: an embedding, linear layers with tanh, and a weighted sum of squares as the loss.
"""

from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from distributed import GlooPool
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_core_impl.checkpoint.slicing import chunk_layers
from megatron_core_impl.config import Layout
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.models.transformer import MicroBatch
from megatron_core_impl.parallel.pipeline import Pipeline
from megatron_core_impl.parallel.schedule import plan, schedule, simulate

HIDDEN, VOCABULARY, LAYERS = 5, 11, 13  # 13 layers: chunks are of unequal length
SCALE = 0.125
TOLERANCE = 1e-12
Case = tuple[int, int]  # vpp, micro batches
Gradients = dict[str, Tensor]


class StandIn(nn.Module):
    """This rank's chunks, and a count of the activations that they hold for the backward pass."""

    dtype = torch.float64

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.chunks = [range(*layers) for layers in chunk_layers(LAYERS, mesh.layout, mesh.pp_rank)]
        generator = torch.Generator().manual_seed(7)
        embedding = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=self.dtype)
        weights = torch.randn(LAYERS, HIDDEN, HIDDEN, generator=generator, dtype=self.dtype) * 0.6
        self.embed = nn.Parameter(embedding) if mesh.pp_rank == 0 else None
        self.layers = nn.ParameterDict({str(layer): weights[layer].clone() for chunk in self.chunks for layer in chunk})
        self.held = self.most_held = 0  # passes that were not undone by a backward pass
        self.inputs: list[StorageWeakRef] = []
        self.outputs: list[StorageWeakRef] = []
        self.most_inputs = self.most_outputs = 0  # whose numbers were in memory at a time

    def hidden_shape(self, batch: MicroBatch) -> tuple[int, int]:
        return batch.tokens.numel(), HIDDEN

    def forward_chunk(self, index: int, x: Tensor | None, batch: MicroBatch) -> Tensor:
        assert (x is None) == (self.mesh.pp_rank == 0 and index == 0)
        if x is not None:
            self.inputs.append(StorageWeakRef(x.untyped_storage()))
            self.most_inputs = max(self.most_inputs, sum(not tensor.expired() for tensor in self.inputs))
        else:
            assert self.embed is not None
            x = self.embed[batch.tokens.reshape(-1)]
        for layer in self.chunks[index]:
            x = torch.tanh(x)
            weight = self.layers[str(layer)]  # a product comes last: its backward pass does not need what it gave
            x = x @ weight if layer % 2 else (weight.T @ x.T).T  # contiguous, or not
        if self.chunks[index].stop == LAYERS:
            x = (x.square().sum(-1) * batch.weights.reshape(-1)).sum()
        self._count(x)
        return x

    def _count(self, output: Tensor) -> None:
        if output.requires_grad:
            self.held += 1
            self.most_held = max(self.most_held, self.held)
            output.register_hook(self._release)
        if output.ndim:
            self.outputs.append(StorageWeakRef(output.untyped_storage()))
        self.most_outputs = max(self.most_outputs, sum(not tensor.expired() for tensor in self.outputs))

    def _release(self, grad: Tensor) -> None:
        self.held -= 1


def micro_batches(count: int, dp_rank: int = 0) -> list[MicroBatch]:
    """Of different lengths."""
    generator = torch.Generator().manual_seed(100 * dp_rank + count)
    batches = []
    for number in range(count):
        shape = (1 + number % 2, 2 + number % 3)
        tokens = torch.randint(VOCABULARY, shape, generator=generator)
        batches.append(MicroBatch(tokens, tokens, torch.rand(shape, generator=generator, dtype=torch.float64)))
    return batches


def gradients(model: StandIn) -> Gradients:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys()
    return found


def plain(batches: Sequence[MicroBatch]) -> tuple[float, Gradients]:
    """The loop over micro batches. Knows nothing of what is tested."""
    model = StandIn(Mesh.single())
    losses = [model.forward_chunk(0, None, batch) for batch in batches]
    for loss in losses:
        (loss * SCALE).backward()
    return float(sum(loss.item() for loss in losses)), gradients(model)


def run_cases(pp: int, dp: int, cases: Sequence[Case]) -> None:
    """On one rank: every case gives the loss and gradients of the plain loop, with as many activations as `simulate` says."""
    for vpp, count in cases:
        mesh = init_mesh(Layout(pp=pp, dp=dp, vpp=vpp), "cpu")
        model = StandIn(mesh)
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
            pipeline = Pipeline(model)
        assert pp == 1 or all_reduce.call_args.kwargs["group"] is mesh.pp_group, "messages need a collective before them"
        batches = micro_batches(count, mesh.dp_rank)
        want_loss, want = plain(batches)
        want_loss *= mesh.pp_rank == pp - 1

        loss = pipeline.forward_backward(batches, scale=SCALE)
        what = f"pp={pp} dp={dp} vpp={vpp}, {count} micro batches, rank {mesh.rank}"
        torch.testing.assert_close(loss, torch.tensor(want_loss, dtype=torch.float64), rtol=TOLERANCE, atol=0, msg=what)
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, want[name], rtol=TOLERANCE, atol=TOLERANCE, msg=f"{what}: {name}")

        plans = plan([schedule(pp, vpp, rank, count) for rank in range(pp)], vpp)
        in_flight = simulate(plans, vpp, count).in_flight[mesh.pp_rank]
        assert (model.held, model.most_held) == (0, in_flight), what
        assert model.most_inputs <= in_flight, f"{what}: inputs are kept after their backward pass"
        assert model.most_outputs <= 2, f"{what}: outputs are kept though they have been sent"

        before = {name: grad.clone() for name, grad in gradients(model).items()}
        assert torch.equal(pipeline.forward(batches), loss), what
        pipeline.forward(micro_batches(count + 1))
        assert model.most_outputs <= 2, f"{what}: outputs are kept in evaluation"
        assert model.held == 0, f"{what}: evaluation must not build a graph"
        assert all(torch.equal(grad, before[name]) for name, grad in gradients(model).items()), what


@pytest.mark.parametrize(
    ("pp", "dp", "cases"),
    [
        (2, 1, [(1, 1), (1, 2), (1, 5), (2, 2), (2, 4), (3, 4)]),
        (3, 1, [(1, 1), (1, 2), (1, 7), (2, 3), (3, 6)]),
        (4, 1, [(1, 1), (1, 3), (1, 8), (2, 4), (3, 8)]),
        (2, 2, [(1, 3), (2, 4)]),  # ranks within the pp group are not those of the world
    ],
    ids=lambda value: str(value) if isinstance(value, int) else "",
)
def test_every_pipeline_is_the_plain_loop(pool: GlooPool, pp: int, dp: int, cases: list[Case]) -> None:
    pool.run(run_cases, pp * dp, pp, dp, cases)


def test_one_rank_alone_is_the_plain_loop() -> None:
    run_cases(1, 1, [(1, 1), (1, 3)])

"""The host runs ahead of the device: nothing in a micro batch makes it wait.

The meta device stands for CUDA: no number is computed, but every operation is called with its tensors where they would be.
"""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_core_impl.config import Dropout, ModelConfig, Recompute
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models.transformer import MicroBatch, Transformer


class HostAccesses(TorchDispatchMode):
    """Notes the operations that touch a tensor of the host, or bring a number to it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        # Of no number at all: PyTorch 2.11's checkpoint makes one such.
        if any(tensor.device.type == "cpu" and tensor.numel() for tensor in tensors) or "_local_scalar_dense" in str(func):
            self.found.append(str(func))
        return result


def test_a_copy_to_the_device_is_noted() -> None:
    with HostAccesses() as accesses:
        torch.ones(3).to("meta")
    assert accesses.found[-1] == "aten._to_copy.default"


@pytest.mark.parametrize(
    "config", [tiny.GROUPED, tiny.TIED, tiny.FALCON, tiny.BIASED], ids=["grouped", "tied", "falcon", "biased"]
)
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_a_micro_batch_touches_nothing_of_the_host(config: ModelConfig, mode: Any) -> None:
    mesh = Mesh.single("meta")
    model = Transformer(
        config,
        mesh,
        dtype=torch.bfloat16,
        dropout=Dropout(hidden=0.1) if mode == "none" else None,
        recompute=Recompute(mode=mode),
    )
    tokens = torch.zeros(2, 12, dtype=torch.int64, device="meta")
    weights = torch.ones(2, 12, device="meta")
    for position_ids in (None, tokens):
        with HostAccesses() as accesses:
            model.forward_chunk(0, None, MicroBatch(tokens, tokens, weights, position_ids)).backward()  # type: ignore[no-untyped-call]
        assert accesses.found == []
        assert accesses.calls > 100

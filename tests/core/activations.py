"""What the tests of recompute, dropout and memory share: small models of every shape of layer, and a count of live storages."""

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_core_impl.config import Dropout, ModelConfig, Recompute
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models.transformer import MicroBatch, Transformer

NONE = Recompute()
MODES = [Recompute(mode="selective"), Recompute(mode="full"), Recompute(mode="full", layers_per_unit=2)]
DROPOUT = Dropout(hidden=0.3, attention=0.2)

LLAMA = ModelConfig(
    family="llama", vocab_size=131, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
FALCON = replace(  # one norm for attention and MLP, which is not gated; everything else that a layer may have
    LLAMA, norm="layernorm", activation="gelu", is_gated=False, qkv_bias=True, o_bias=True, mlp_bias=True,
    is_parallel=True, has_shared_norm=True, num_key_value_heads=1, tie_word_embeddings=True,
)  # fmt: skip
CONFIGS = {
    "llama": LLAMA,
    "falcon": FALCON,
    "falcon-two-norms": replace(FALCON, has_shared_norm=False),
    "relu": replace(LLAMA, activation="relu", is_gated=False),
}


def mode_name(recompute: Recompute) -> str:
    return f"{recompute.mode}-{recompute.layers_per_unit}"


def model_of(
    config: ModelConfig, recompute: Recompute, *,
    mesh: Mesh | None = None, dropout: Dropout | None = None, dtype: torch.dtype = torch.float32,
) -> Transformer:  # fmt: skip
    """A model with random weights: norms around 1, the rest large enough for every gradient to matter."""
    model = Transformer(config, mesh or Mesh.single(), dtype=dtype, dropout=dropout, recompute=recompute)
    generator = torch.Generator().manual_seed(model.mesh.rank)
    for parameter in model.parameters():
        noise = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.copy_(noise + 1 if parameter.ndim == 1 else noise)
    return model


def micro_batches(config: ModelConfig, count: int, length: int = 8) -> list[MicroBatch]:
    """Micro batches of two sequences."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(config.vocab_size, (count, 2, length + 1), generator=generator)
    return [MicroBatch(t[:, :-1], t[:, 1:], torch.full((2, length), 0.1)) for t in tokens]


class Storages(TorchDispatchMode):
    """Counts the bytes of storages: from when an operation has made one to when the last reference lets it go.

    Within `with Storages() as storages:` everything that operations return counts; what was made before does not, nor what a
    kernel allocates and frees inside itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0  # bytes
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        identity, size = storage._cdata, storage.nbytes()
        if identity not in self._known:
            self._known.add(identity)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._forget, identity, size)

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.alive -= size

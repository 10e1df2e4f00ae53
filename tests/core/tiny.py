"""Tiny models with random weights in memory, and a few training steps of them that can be compared over layouts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_core_impl.checkpoint.slicing import Slice, whole
from megatron_core_impl.config import Layout, ModelConfig, Recompute
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.models.families import tensors
from megatron_core_impl.models.transformer import MicroBatch, Transformer
from megatron_core_impl.optim import OptimizerSettings
from megatron_core_impl.parallel.parallelize import load_weights, parallelize
from megatron_core_impl.parallel.pipeline import Pipeline
from megatron_core_impl.parallel.zero import ZeroOptimizer

# Grouped queries; head_dim is not hidden/heads; on 2 tp ranks the last has 3 real rows of the vocabulary and 125 of padding.
GROUPED = ModelConfig(
    family="llama", vocab_size=131, hidden_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=32,
)  # fmt: skip
# As many key as query heads; tied; on 2 tp ranks the last has no real row at all, and dims of 15 do not divide by dp = 2.
TIED = ModelConfig(
    family="llama", vocab_size=100, hidden_size=15, intermediate_size=8, num_hidden_layers=2, num_attention_heads=8,
    num_key_value_heads=8, head_dim=4, max_position_embeddings=32, tie_word_embeddings=True,
)  # fmt: skip
# Falcon 7B's shape: one key/value head, a number of query heads that no tp divides, one LayerNorm, tied.
FALCON = ModelConfig(
    family="falcon", vocab_size=131, hidden_size=18, intermediate_size=24, num_hidden_layers=2, num_attention_heads=9,
    num_key_value_heads=1, head_dim=2, max_position_embeddings=32, norm="layernorm", activation="gelu", is_gated=False,
    is_parallel=True, has_shared_norm=True, tie_word_embeddings=True,
)  # fmt: skip
# Falcon 40B's: grouped heads, two LayerNorms; untied, with all biases there are, and a window.
BIASED = replace(
    FALCON, hidden_size=20, num_attention_heads=8, num_key_value_heads=2, has_shared_norm=False, tie_word_embeddings=False,
    qkv_bias=True, o_bias=True, mlp_bias=True, sliding_window=5,
)  # fmt: skip

STEPS, LR, BETAS, EPS, WEIGHT_DECAY, CLIP = 2, 0.01, (0.9, 0.95), 1e-5, 0.1, 0.5
SETTINGS = OptimizerSettings(beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=WEIGHT_DECAY, clip_grad=CLIP)
NUM_MICROBATCHES, MICRO_BATCH_SIZE, LENGTH = 8, 2, 12  # of a step, over all replicas


class MemoryReader:
    """The reader of checkpoints, on a dict."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str, piece: Slice | None = None, dtype: torch.dtype | None = None) -> Tensor:
        tensor = self.tensors[name]
        ranges = piece if piece is not None else whole(tensor.shape)
        return tensor[tuple(slice(*r) for r in ranges)].to(dtype or tensor.dtype)


def random_weights(config: ModelConfig, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Canonical weights; norms around 1, the rest large enough for every gradient to matter."""
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for spec in tensors(config):
        noise = torch.randn(spec.shape, generator=generator, dtype=torch.float64)
        weights[spec.name] = (1 + 0.2 * noise if len(spec.shape) == 1 else 0.2 * noise).to(dtype)
    return weights


def loaded(
    config: ModelConfig,
    mesh: Mesh,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float64,
    recompute: Recompute | None = None,
) -> Transformer:
    model = parallelize(config, mesh, dtype=dtype, recompute=recompute)
    load_weights(model, MemoryReader(weights))
    return model


def micro_batches(config: ModelConfig, step: int) -> list[MicroBatch]:
    """Those of one step over all replicas, with very unequal masks."""
    generator = torch.Generator().manual_seed(100 + step)
    shape = (NUM_MICROBATCHES, MICRO_BATCH_SIZE, LENGTH)
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    labels = torch.randint(config.vocab_size, shape, generator=generator)
    shares = torch.tensor([0.2, 0.9, 0.0, 0.7]).repeat(2).view(-1, 1, 1)  # two micro batches have no target at all
    mask = (torch.rand(shape, generator=generator) < shares).double()
    labels = labels.where(mask > 0, -100)
    return [MicroBatch(*parts) for parts in zip(tokens, labels, mask / mask.sum(), strict=True)]


@dataclass
class Trace:
    """What happened in a few steps, as one rank or as a whole model saw it. Lists have an entry per step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    grads: list[dict[str, Tensor]] = field(default_factory=list)  # complete, before clipping
    embedding_grads: list[dict[int, Tensor]] = field(default_factory=list)  # of the embedding's output, per micro batch
    weights: dict[str, Tensor] = field(default_factory=dict)  # at the end
    pieces: dict[str, Slice] = field(default_factory=dict)  # a rank's: where its weights belong
    grad_pieces: dict[str, Slice] = field(default_factory=dict)  # a rank's: where its rows of the gradients belong


def reference(config: ModelConfig, weights: Mapping[str, Tensor], steps: int = STEPS) -> Trace:
    """Plain training in this process alone: autograd, torch's clipping, torch's AdamW. Knows nothing of what is tested."""
    model = loaded(config, Mesh.single(), weights)
    parameters = dict(model.named_parameters())
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=LR, betas=BETAS, eps=EPS, foreach=False, fused=False,
    )  # fmt: skip
    trace = Trace()
    sizes = {spec.name: spec.shape[0] for spec in tensors(config)}
    for step in range(steps):
        adamw.zero_grad()
        inner = _observe_embedding(model)
        losses = []
        for batch in micro_batches(config, step):
            loss = model.loss(batch.tokens, batch.labels, batch.weights)
            loss.backward()
            losses.append(loss.item())
        trace.losses.append(sum(losses))
        trace.embedding_grads.append(dict(enumerate(inner)))
        trace.grads.append({name: p.grad[: sizes[name]].clone() for name, p in parameters.items() if p.grad is not None})
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)))
        adamw.step()
    trace.weights = {name: p.detach()[: sizes[name]].clone() for name, p in parameters.items()}
    return trace


def train_rank(
    config: ModelConfig,
    layout: Layout,
    weights: Mapping[str, Tensor],
    steps: int = STEPS,
    recompute: Recompute | None = None,
    mesh: Mesh | None = None,
) -> Trace:
    """The same steps on one rank of a layout, with what is tested."""
    mesh = mesh or init_mesh(layout, "cpu", kv_replicas=layout.kv_replicas(config))
    model = loaded(config, mesh, weights, recompute=recompute)
    optimizer = ZeroOptimizer(model, mesh, SETTINGS)
    pipeline = Pipeline(model)
    parameters = model.sharded_parameters()
    trace = Trace(pieces={name: p.piece for name, p in parameters.items()})
    for step in range(steps):
        inner = _observe_embedding(model) if mesh.pp_rank == 0 else []
        mine = list(enumerate(micro_batches(config, step)))[mesh.dp_rank :: layout.dp]
        optimizer.begin_step(len(mine))
        trace.losses.append(pipeline.forward_backward([batch for _, batch in mine], scale=1.0).item())
        trace.embedding_grads.append({n: grad for (n, _), grad in zip(mine, inner, strict=False)})
        assert len(inner) == (len(mine) if mesh.pp_rank == 0 else 0)
        complete = optimizer.complete_gradients()
        trace.grads.append({name: grad.clone() for name, (_, grad) in complete.items()})
        trace.grad_pieces = {name: piece for name, (piece, _) in complete.items()}
        trace.norms.append(optimizer.step(LR))
    optimizer.wait_for_weights()
    trace.weights = {name: p.detach()[: p.piece[0][1] - p.piece[0][0]].clone() for name, p in parameters.items()}
    for name, parameter in parameters.items():
        assert not parameter[trace.weights[name].shape[0] :].any(), f"{name}: padding is no longer zero"
    return trace


def _observe_embedding(model: Transformer) -> list[Tensor]:
    """A list that receives the gradient of the embedding's output at each backward pass from now on."""
    grads: list[Tensor] = []

    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda grad: grads.append(grad.clone()))

    model.model.embed_tokens._forward_hooks.clear()
    model.model.embed_tokens.register_forward_hook(hook)
    return grads


def assemble(config: ModelConfig, layout: Layout, ranks: list[Trace]) -> Trace:
    """The whole model's trace from those of all ranks. Replicas must agree."""
    steps = range(len(ranks[0].losses))
    where = [layout.coordinates(rank) for rank in range(layout.world_size)]
    whole_trace = Trace()
    for step in steps:
        by_replica = {
            dp_rank: trace.losses[step]
            for (pp_rank, dp_rank, _), trace in zip(where, ranks, strict=True)
            if pp_rank == layout.pp - 1
        }
        for (pp_rank, dp_rank, _), trace in zip(where, ranks, strict=True):
            expected = by_replica[dp_rank] if pp_rank == layout.pp - 1 else 0.0
            assert trace.losses[step] == expected, "tp ranks disagree about their loss"
            assert trace.norms[step] == ranks[0].norms[step], "ranks disagree about the gradient norm"
        whole_trace.losses.append(sum(by_replica.values()))
        whole_trace.norms.append(ranks[0].norms[step])
        whole_trace.grads.append(_tile(config, [(t.grad_pieces, t.grads[step]) for t in ranks]))
        shares: dict[int, list[Tensor]] = {}
        for trace in ranks:  # tp ranks come in order, each with its share of the tokens
            for number, grad in trace.embedding_grads[step].items():
                shares.setdefault(number, []).append(grad)
        whole_trace.embedding_grads.append({number: torch.cat(parts) for number, parts in shares.items()})
    whole_trace.weights = _tile(config, [(t.pieces, t.weights) for t in ranks])
    return whole_trace


def _tile(config: ModelConfig, parts: list[tuple[dict[str, Slice], dict[str, Tensor]]]) -> dict[str, Tensor]:
    result = {spec.name: torch.full(spec.shape, torch.nan, dtype=torch.float64) for spec in tensors(config)}
    for pieces, values in parts:
        for name, piece in pieces.items():
            view = result[name][tuple(slice(*r) for r in piece)]
            assert view.isnan().all() or torch.equal(view, values[name]), f"{name}: replicas differ"
            view.copy_(values[name])
    for name, tensor in result.items():
        assert not tensor.isnan().any(), f"{name}: not all of it came back"
    return result


def differences(got: Trace, want: Trace) -> dict[str, float]:
    """The largest relative error of everything there is to compare, by what it is."""
    found = {
        "loss": _error(torch.tensor(got.losses), torch.tensor(want.losses)),
        "norm": _error(torch.tensor(got.norms), torch.tensor(want.norms)),
    }
    for step, (ours, theirs) in enumerate(zip(got.grads, want.grads, strict=True)):
        assert ours.keys() == theirs.keys()
        found |= {f"step {step} grad {name}": _error(ours[name], theirs[name]) for name in theirs}
    for step, (inner, theirs_inner) in enumerate(zip(got.embedding_grads, want.embedding_grads, strict=True)):
        found |= {f"step {step} embedding {n}": _error(inner[n], theirs_inner[n]) for n in theirs_inner}
    found |= {f"weight {name}": _error(got.weights[name], want.weights[name]) for name in want.weights}
    return found


def _error(got: Tensor, want: Tensor) -> float:
    """‖got - want‖∞ / ‖want‖∞; infinity where something is not finite."""
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-30))  # a micro batch may be all masked
    return error if error == error else float("inf")

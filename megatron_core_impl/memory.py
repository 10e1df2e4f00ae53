"""How many bytes a rank needs for a training step, before anything is allocated. No torch in here.

What a rank holds all the time follows from the numbers of its part of the model (https://arxiv.org/abs/1910.02054). In bf16 and
fp16 with AdamW these are 2 + 4 + 12/dp bytes per number:

    weights          2            what the model computes with; 4 in fp32
    main gradients   4            fp32 in every precision but fp64
    masters          4 / dp       in fp32 and fp64 the weights are their own
    moments          8 / dp       two of AdamW, one of SGD with momentum, else none

What it holds from a micro batch's forward pass to its backward pass follows from the layers (https://arxiv.org/abs/2205.05198),
see `_layer_activations`; how many micro batches are on their way is read from the schedule that will run. On top comes what a
pass makes and lets go of again: see `_loss` and `_layer_backward`. The estimate is that of the worst moment of a step.

Not in it: what the CUDA context and NCCL take (1 to 2 GiB), what the allocator loses between its blocks (some percent), and
what kernels allocate and free inside themselves.

Letters: T tokens of a micro batch that a rank holds between the layers, S = T·tp all of them.
"""

from dataclasses import dataclass, fields
from math import prod
from typing import Literal

from megatron_core_impl.checkpoint.slicing import chunk_layers, is_on_pp_rank, shape_of, tp_slice
from megatron_core_impl.config import Dropout, Heads, Layout, ModelConfig, Recompute, TensorSpec, padded_vocab_size
from megatron_core_impl.models.tensors import norms_of_a_layer, tensors
from megatron_core_impl.optim import OptimizerSettings
from megatron_core_impl.parallel.schedule import schedule

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
ITEM_SIZES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
Device = Literal["cuda", "cpu"]
MIB = 1 << 20
LOSS_BLOCK, CPU_LOSS_BLOCK = 1 << 25, 1 << 18  # logits that exist at a time, and in fp32 on a CPU (`layers.cross_entropy`)


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes of a rank at the worst moment of a step, by what they hold."""

    weights: int
    main_gradients: int
    masters: int
    moments: int
    activations: int  # of transformer layers, for all micro batches on their way
    loss: int  # final norm, output layer and cross-entropy of one micro batch
    working: int  # gradients and results on their way through a layer
    buffers: int  # tokens, and messages between pp ranks
    in_flight: int  # no bytes: forward passes through a chunk of this rank whose backward pass is to come

    @property
    def total(self) -> int:
        return self.state + self.activations + self.loss + self.working + self.buffers

    @property
    def state(self) -> int:
        """What is there between steps as well."""
        return self.weights + self.main_gradients + self.masters + self.moments

    def lines(self) -> list[str]:
        """A table for people, in MiB."""
        terms = [(field.name.replace("_", " "), getattr(self, field.name)) for field in fields(self)][:-1]
        return [f"{name:<16}{size / MIB:>12,.1f} MiB" for name, size in [*terms, ("total", self.total)]]


def estimate(
    config: ModelConfig,
    layout: Layout,
    *,
    precision: Precision,
    micro_batch_size: int,
    sequence_length: int,
    num_microbatches: int,
    optimizer: OptimizerSettings | None = None,
    recompute: Recompute | None = None,
    dropout: Dropout | None = None,
    rank: int | None = None,
    device: Device = "cuda",
) -> MemoryEstimate:
    """What a training step takes on one rank.

    Args:
        config: the model.
        layout: the ranks.
        precision: of weights and activations.
        micro_batch_size: sequences.
        sequence_length: tokens of a sequence.
        num_microbatches: of a step on each replica.
        optimizer: default: AdamW.
        recompute, dropout: default: none.
        rank: global number; default: the rank that needs most.
        device: what the model runs on. They differ where one has no kernel that works in place.

    Raises:
        ValueError: the layout cannot hold the model, or its schedule not so many micro batches; the message names what can.
    """
    layout.check(config)
    # heads that do not come out even are more on the first rank of tp, and replicas are alike
    first_ranks = range(0, layout.world_size, layout.dp * layout.tp)
    settings, recompute, dropout = optimizer or OptimizerSettings(), recompute or Recompute(), dropout or Dropout()
    estimates = []
    for number in first_ranks if rank is None else [rank]:
        pp_rank, _, tp_rank = layout.coordinates(number)
        sizes = _Sizes.of(config, layout, tp_rank, precision, device, micro_batch_size, sequence_length)
        state = _state(config, layout, pp_rank, tp_rank, sizes, settings)
        step = _worst_moment(config, layout, pp_rank, sizes, num_microbatches, recompute, dropout)
        estimates.append(MemoryEstimate(**state, **step))
    return max(estimates, key=lambda one: one.total)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Numbers of one rank, and what it runs on."""

    device: Device
    item: int  # bytes of a number in the model's precision
    wide: int  # of one in fp32, or in fp64
    seen: int  # S
    own: int  # T
    length: int
    hidden: int
    queries: int  # features, of this rank's heads
    keys: int  # of its key heads, and as many of its value heads
    heads: int
    ffn: int
    vocabulary: int  # rows, padding included

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        layout: Layout,
        tp_rank: int,
        precision: Precision,
        device: Device,
        micro_batch_size: int,
        length: int,
    ) -> "_Sizes":
        def features(is_kv: bool) -> int:
            heads = Heads(
                num_attention_heads=config.num_attention_heads, num_key_value_heads=config.num_key_value_heads,
                head_dim=config.head_dim, is_kv=is_kv,
            )  # fmt: skip
            start, stop = heads.range(layout.tp, tp_rank)
            return stop - start

        seen = micro_batch_size * length
        return cls(
            device=device, item=ITEM_SIZES[precision], wide=max(4, ITEM_SIZES[precision]),
            seen=seen, own=seen // layout.tp, length=length, hidden=config.hidden_size,
            queries=features(is_kv=False), keys=features(is_kv=True), heads=features(is_kv=False) // config.head_dim,
            ffn=config.intermediate_size // layout.tp,
            vocabulary=padded_vocab_size(config.vocab_size, layout.tp) // layout.tp,
        )  # fmt: skip


def _state(
    config: ModelConfig, layout: Layout, pp_rank: int, tp_rank: int, sizes: _Sizes, settings: OptimizerSettings
) -> dict[str, int]:
    """What is there between steps. Of r rows each dp rank owns ceil(r/dp); storage is for all of these (`parallel.shard`)."""

    def numbers(spec: TensorSpec) -> tuple[int, int]:
        """(here, owned)"""
        rows, *rest = shape_of(tp_slice(spec, layout.tp, tp_rank))
        block = -(-(sizes.vocabulary if spec.padded else rows) // layout.dp)
        return block * layout.dp * prod(rest), block * prod(rest)

    here, owned = (
        sum(column)
        for column in zip(
            *(numbers(spec) for spec in tensors(config) if is_on_pp_rank(spec, config.num_hidden_layers, layout, pp_rank)),
            strict=True,
        )
    )
    num_moments = 2 if settings.kind == "adamw" else int(settings.momentum > 0)
    return {
        "weights": here * sizes.item,
        "main_gradients": here * sizes.wide,
        "masters": owned * sizes.wide if sizes.item < sizes.wide else 0,
        "moments": owned * sizes.wide * num_moments,
    }


def _worst_moment(
    config: ModelConfig,
    layout: Layout,
    pp_rank: int,
    sizes: _Sizes,
    num_microbatches: int,
    recompute: Recompute,
    dropout: Dropout,
) -> dict[str, int]:
    """What is alive when most is, over all passes of this rank's schedule."""
    chunks = [range(*layers) for layers in chunk_layers(config.num_hidden_layers, layout, pp_rank)]
    kept = [_chunk_activations(config, sizes, chunk, recompute, dropout) for chunk in chunks]
    again = [_recomputed(config, sizes, chunk, recompute, dropout) for chunk in chunks]
    last = len(chunks) - 1 if pp_rank == layout.pp - 1 else None  # the chunk that ends with the loss
    loss = _loss(sizes)
    backward = _layer_backward(config, sizes, recompute)

    batches = num_microbatches * sizes.seen * 3 * 8  # tokens, labels and weights
    # inputs that come while a pass runs: from the pp rank before, and with several chunks round the other way as well
    messages = ((pp_rank > 0) + (layout.vpp > 1)) * sizes.own * sizes.hidden * sizes.item

    held: set[tuple[int, int]] = set()
    moments = []
    for action in schedule(layout.pp, layout.vpp, pp_rank, num_microbatches):
        if action.kind == "forward":
            held.add((action.chunk, action.microbatch))
        activations = sum(kept[chunk] for chunk, _ in held)
        if action.chunk == last:
            moments.append((activations, loss, 0, len(held)))
        if action.kind == "backward":
            moments.append((activations + again[action.chunk], 0, backward, len(held)))
            held.discard((action.chunk, action.microbatch))
    names = ("activations", "loss", "working", "in_flight")
    return dict(zip(names, max(moments, key=lambda moment: sum(moment)), strict=True)) | {"buffers": batches + messages}


def _layer_activations(config: ModelConfig, sizes: _Sizes, recompute: Recompute, share: float) -> int:
    """What a layer keeps for its backward pass, where it is not recomputed as a whole."""
    selective = recompute.mode == "selective"
    norms = len(norms_of_a_layer(config))
    tokens, features = sizes.own * sizes.item, sizes.seen * sizes.item
    before, product = (1 + config.is_gated, 1 - selective) if _keeps_its_input(config) else (0, 1)
    return sum((
        tokens * sizes.hidden * (1 if config.is_parallel else 2),  # what norms read: the residual stream
        sizes.own * sizes.wide * norms * (1 if config.norm == "rmsnorm" else 2),  # their statistics
        tokens * sizes.hidden * norms * (1 - selective),  # what they result in
        features * (sizes.queries + 2 * sizes.keys),  # turned queries and keys, and values
        features * sizes.queries,  # attention's output, which o_proj reads as well
        sizes.seen * sizes.wide * sizes.heads,  # the logarithm of its denominators
        features * sizes.ffn * before,  # gate and up
        features * sizes.ffn * product,  # act(gate) · up
        sizes.own * sizes.hidden * (1 if config.is_parallel else 2) * (share > 0),  # masks of dropout
    ))  # fmt: skip


def _chunk_activations(config: ModelConfig, sizes: _Sizes, chunk: range, recompute: Recompute, dropout: Dropout) -> int:
    """What a forward pass through a chunk leaves behind."""
    angles = 2 * sizes.length * config.head_dim // 2 * sizes.item
    embedding = sizes.own * sizes.hidden * (dropout.of_embeddings > 0) if chunk.start == 0 else 0
    if recompute.mode == "full":
        units = -(-len(chunk) // recompute.layers_per_unit)
        return angles + embedding + units * sizes.own * sizes.hidden * sizes.item
    shares = (dropout.of_layer(layer, config.num_hidden_layers) for layer in chunk)
    return angles + embedding + sum(_layer_activations(config, sizes, recompute, share) for share in shares)


def _recomputed(config: ModelConfig, sizes: _Sizes, chunk: range, recompute: Recompute, dropout: Dropout) -> int:
    """What the backward pass of the largest unit of full recompute brings back, its input excepted."""
    if recompute.mode != "full":
        return 0
    layers = min(len(chunk), recompute.layers_per_unit)
    return layers * _layer_activations(config, sizes, recompute, dropout.hidden) - sizes.own * sizes.hidden * sizes.item


def _loss(sizes: _Sizes) -> int:
    """What final norm, output layer and cross-entropy take in the forward pass, which makes the gradients as well."""
    stream = sizes.own * sizes.hidden * sizes.item
    gathered = sizes.seen * sizes.hidden * sizes.item  # by tp; dx is as large
    matrix, is_narrow = sizes.vocabulary * sizes.hidden, sizes.item < sizes.wide
    blocks = min(sizes.seen, -(-sizes.seen * sizes.vocabulary // LOSS_BLOCK))
    rows = -(-sizes.seen // blocks)
    rows_in_wide = rows if sizes.device == "cuda" else max(1, CPU_LOSS_BLOCK // sizes.vocabulary)
    return sum((
        2 * stream + sizes.own * sizes.wide,  # what the norm reads, its statistics, what it results in
        gathered * (sizes.seen > sizes.own) + gathered,
        matrix * sizes.wide,  # dW, which the backward pass only scales
        rows * sizes.vocabulary * sizes.item,  # a block of logits
        max(
            rows_in_wide * sizes.vocabulary * sizes.wide * is_narrow,  # its softmax
            rows * sizes.hidden * sizes.item + matrix * sizes.item * is_narrow,  # its tokens, weighed, and its part of dW
        ),
    ))  # fmt: skip


def _layer_backward(config: ModelConfig, sizes: _Sizes, recompute: Recompute) -> int:
    """What a layer's backward pass takes where it takes most, beyond what it frees on the way: in the feed-forward layer.

    First down_proj needs its input, the product, makes the product's gradient and then its weight's. With that the product is
    free again. Then from its gradient and one in between comes that of the gate; a plain MLP goes without the one in between.
    """
    stream = sizes.own * sizes.hidden * sizes.item  # the gradient of the residual stream
    gathered = sizes.seen * sizes.hidden * sizes.item * (sizes.seen > sizes.own)
    product = sizes.seen * sizes.ffn * sizes.item
    # CPUs cannot add a product in half precision to the main gradient as they compute it
    in_between = sizes.hidden * sizes.ffn * sizes.item * (sizes.device == "cpu" and sizes.item < sizes.wide)
    selective = recompute.mode == "selective" and _keeps_its_input(config)
    freed = recompute.mode != "selective" and _keeps_its_input(config)
    return stream + max(gathered + product * (1 + selective) + in_between, product * ((3 if config.is_gated else 2) - freed))


def _keeps_its_input(config: ModelConfig) -> bool:
    """Whether the activation keeps what it reads: but for the plain relu, which keeps what it results in, as down_proj does."""
    return config.is_gated or config.activation != "relu"

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
from megatron_core_impl.layers.blocks import CACHED, WINDOW_BLOCK, count_logits_blocks, window_blocks
from megatron_core_impl.models.tensors import norms_of_a_layer, tensors
from megatron_core_impl.optim import OptimizerSettings
from megatron_core_impl.parallel.schedule import schedule

Precision = Literal["fp32", "bf16", "fp16", "fp64"]
ITEM_SIZES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8}
Device = Literal["cuda", "cpu"]
MIB = 1 << 20


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
        device: what the model runs on. They differ where one has no kernel that works in place, or that attends with dropout or
            a window; for CUDA it is taken to have one.

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
    backward = _layer_backward(config, sizes, recompute, dropout)

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


def _layer_activations(config: ModelConfig, sizes: _Sizes, recompute: Recompute, dropout: Dropout, share: float) -> int:
    """What a layer keeps for its backward pass, where it is not recomputed as a whole. `share`: of its hidden dropout."""
    selective = recompute.mode == "selective"
    norms = len(norms_of_a_layer(config))
    tokens, features = sizes.own * sizes.item, sizes.seen * sizes.item
    return sum((
        tokens * sizes.hidden * (1 if config.is_parallel else 2),  # what norms read: the residual stream
        sizes.own * sizes.wide * norms * (1 if config.norm == "rmsnorm" else 2),  # their statistics
        tokens * sizes.hidden * norms * (1 - selective),  # what they result in
        _attention_activations(config, sizes, dropout),
        features * sizes.queries,  # attention's output, which o_proj reads
        _mlp_activations(config, sizes, recompute),
        sizes.own * sizes.hidden * (1 if config.is_parallel else 2) * (share > 0),  # masks of dropout
    ))  # fmt: skip


def _attention_activations(config: ModelConfig, sizes: _Sizes, dropout: Dropout) -> int:
    """What attention keeps besides its output."""
    if _makes_scores(sizes, dropout):
        # weights, and under dropout its mask and their product; queries, and keys and values for each of them
        scores = (3 if dropout.attention else 1) * sum(_num_scores(config, sizes))
        numbers = scores + sizes.queries * (sizes.seen + 2 * _num_keys(config, sizes))
        return numbers * sizes.wide
    return sum((
        sizes.seen * sizes.item * (sizes.queries + 2 * sizes.keys),  # turned queries and keys, and values
        sizes.seen * sizes.wide * sizes.heads,  # the logarithm of its denominators
        sizes.seen * sizes.item * sizes.queries * (_window_blocks(config, sizes) is not None),  # the outputs of blocks
    ))  # fmt: skip


def _mlp_activations(config: ModelConfig, sizes: _Sizes, recompute: Recompute) -> int:
    """What the feed-forward layer keeps besides what it reads: gate and up, and act(gate) · up."""
    before, product = (1 + config.is_gated, recompute.mode != "selective") if _keeps_its_input(config) else (0, 1)
    return sizes.seen * sizes.item * sizes.ffn * (before + product)


def _makes_scores(sizes: _Sizes, dropout: Dropout) -> bool:
    """Whether attention makes the weights of all pairs of tokens.

    PyTorch's kernel for the CPU has no dropout, and of those for GPUs only those in half precision know heads that share keys.
    """
    if sizes.device == "cpu":
        return dropout.attention > 0
    return sizes.item > 2 and sizes.keys < sizes.queries


def _window_blocks(config: ModelConfig, sizes: _Sizes) -> list[tuple[int, int, int]] | None:
    """The blocks that attention under a sliding window works in; None where it needs none."""
    if sizes.device == "cuda" or config.sliding_window is None or config.sliding_window >= sizes.length:
        return None
    return window_blocks(sizes.length, config.sliding_window, WINDOW_BLOCK)


def _num_scores(config: ModelConfig, sizes: _Sizes) -> list[int]:
    """Of all heads and sequences, by blocks."""
    blocks = _window_blocks(config, sizes) or [(0, 0, sizes.length)]
    return [sizes.seen // sizes.length * sizes.heads * (stop - start) * (stop - first) for first, start, stop in blocks]


def _num_keys(config: ModelConfig, sizes: _Sizes) -> int:
    """That the blocks of all sequences read."""
    blocks = _window_blocks(config, sizes) or [(0, 0, sizes.length)]
    return sizes.seen // sizes.length * sum(stop - first for first, _, stop in blocks)


def _window_masks(config: ModelConfig, sizes: _Sizes) -> int:
    """Of blocks of different size, one each for all layers."""
    shapes = {(stop - start, stop - first) for first, start, stop in _window_blocks(config, sizes) or ()}
    return sum(queries * keys for queries, keys in shapes) * sizes.item


def _chunk_activations(config: ModelConfig, sizes: _Sizes, chunk: range, recompute: Recompute, dropout: Dropout) -> int:
    """What a forward pass through a chunk leaves behind."""
    shared = 2 * sizes.length * config.head_dim // 2 * sizes.item + _window_masks(config, sizes)  # by all layers: angles, masks
    embedding = sizes.own * sizes.hidden * (dropout.of_embeddings > 0) if chunk.start == 0 else 0
    if recompute.mode == "full":
        units = -(-len(chunk) // recompute.layers_per_unit)
        return shared + embedding + units * sizes.own * sizes.hidden * sizes.item
    shares = (dropout.of_layer(layer, config.num_hidden_layers) for layer in chunk)
    return shared + embedding + sum(_layer_activations(config, sizes, recompute, dropout, share) for share in shares)


def _recomputed(config: ModelConfig, sizes: _Sizes, chunk: range, recompute: Recompute, dropout: Dropout) -> int:
    """What the backward pass of the largest unit of full recompute brings back, its input excepted."""
    if recompute.mode != "full":
        return 0
    layers = min(len(chunk), recompute.layers_per_unit)
    return (
        layers * _layer_activations(config, sizes, recompute, dropout, dropout.hidden) - sizes.own * sizes.hidden * sizes.item
    )


def _loss(sizes: _Sizes) -> int:
    """What final norm, output layer and cross-entropy take in the forward pass, which makes the gradients as well."""
    stream = sizes.own * sizes.hidden * sizes.item
    gathered = sizes.seen * sizes.hidden * sizes.item  # by tp; dx is as large
    matrix, is_narrow = sizes.vocabulary * sizes.hidden, sizes.item < sizes.wide
    product = matrix * sizes.item * (is_narrow and sizes.device == "cpu")  # GPUs add it up as they compute it
    blocks = count_logits_blocks(sizes.seen, sizes.vocabulary, on_gpu=sizes.device == "cuda")
    rows = -(-sizes.seen // blocks)
    rows_in_wide = rows if sizes.device == "cuda" else max(1, CACHED // sizes.vocabulary)
    return sum((
        2 * stream + sizes.own * sizes.wide,  # what the norm reads, its statistics, what it results in
        gathered * (sizes.seen > sizes.own) + gathered,
        matrix * sizes.wide,  # dW, which the backward pass only scales
        rows * sizes.vocabulary * sizes.item,  # a block of logits
        product * (blocks > 1),  # room for the blocks' parts of dW, made for the first
        max(
            rows_in_wide * sizes.vocabulary * sizes.wide * is_narrow,  # a block's softmax
            rows * sizes.hidden * (2 * sizes.wide + sizes.item * is_narrow),  # its part of dx, and the labels' rows of W
            rows * sizes.hidden * sizes.wide + product * (blocks == 1),  # its tokens, weighed
        ),
    ))  # fmt: skip


def _layer_backward(config: ModelConfig, sizes: _Sizes, recompute: Recompute, dropout: Dropout) -> int:
    """What a layer's backward pass takes where it takes most, beyond what it frees on the way: in the feed-forward layer, or in
    attention that makes scores, whose gradient is as large.

    First down_proj needs its input, the product, makes the product's gradient and then its weight's. With that the product is
    free again. Then its gradient, that of the gate and that of the other factor exist at once; a plain MLP has no third.
    """
    stream = sizes.own * sizes.hidden * sizes.item  # the gradient of the residual stream
    gathered = sizes.seen * sizes.hidden * sizes.item * (sizes.seen > sizes.own)
    product = sizes.seen * sizes.ffn * sizes.item
    # CPUs cannot add a product in half precision to the main gradient as they compute it
    in_between = sizes.hidden * sizes.ffn * sizes.item * (sizes.device == "cpu" and sizes.item < sizes.wide)
    selective = recompute.mode == "selective" and _keeps_its_input(config)
    freed = recompute.mode != "selective" and _keeps_its_input(config)
    of_mlp = max(gathered + product * (1 + selective) + in_between, product * ((3 if config.is_gated else 2) - freed))
    if not _makes_scores(sizes, dropout):
        return stream + of_mlp
    # by then the feed-forward layer's part is free, and attention's output
    own_norm = len(norms_of_a_layer(config)) == 2 and recompute.mode != "selective"
    numbers = sizes.own * sizes.hidden * (own_norm + (not config.is_parallel))
    gone = numbers * sizes.item + sizes.own * sizes.hidden * (dropout.hidden > 0) + _mlp_activations(config, sizes, recompute)
    scores = _num_scores(config, sizes)
    # the last block goes first
    gradient = max(of_block - 3 * sum(scores[block + 1 :]) for block, of_block in enumerate(scores))
    of_attention = gradient * sizes.wide + sizes.seen * sizes.queries * (2 * sizes.wide - sizes.item)
    return stream + max(of_mlp, of_attention - gone)


def _keeps_its_input(config: ModelConfig) -> bool:
    """Whether the activation keeps what it reads: but for the plain relu, which keeps what it results in, as down_proj does."""
    return config.is_gated or config.activation != "relu"

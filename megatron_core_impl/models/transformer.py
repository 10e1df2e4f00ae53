"""The decoder-only transformer of every family: this rank's part of it.

Its modules bear the names that Hugging Face gives a Llama model, so the name of a parameter is the name of the tensor in every
checkpoint. Inside, a micro batch of B sequences of S tokens is one packed list of tokens. Between the layers it is shared out
over the tp group, T = B·S/tp tokens each; the loss is a weighted SUM, so that micro batches and replicas simply add up.

Under pipeline parallelism a rank holds one or more *chunks*, contiguous parts of the model; `forward_chunk` runs one of them,
and `parallel.pipeline` passes the hidden states on. With pp = 1 the whole model is one chunk.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_core_impl.checkpoint.slicing import chunk_layers
from megatron_core_impl.config import Dropout, Kernel, ModelConfig, Recompute
from megatron_core_impl.layers.attention import SelfAttention, Sequences
from megatron_core_impl.layers.cross_entropy import loss_and_hits, vocab_parallel_linear_cross_entropy
from megatron_core_impl.layers.embedding import VocabParallelEmbedding
from megatron_core_impl.layers.linear import ColumnParallelLinear
from megatron_core_impl.layers.mlp import MLP
from megatron_core_impl.layers.norm import LayerNorm, RMSNorm
from megatron_core_impl.layers.parameter import ParameterFactory, ShardedParameter
from megatron_core_impl.layers.recompute import produced
from megatron_core_impl.layers.rope import frequencies, rotation
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models.tensors import EMBEDDING, FINAL_NORM, HEAD, tensors


class MicroBatch(NamedTuple):
    """One micro batch, the same on all ranks of a tp and of a pp group."""

    tokens: Tensor  # [B, S] int64
    labels: Tensor  # [B, S] int64, for each position the id that follows
    weights: Tensor  # [B, S] what each token counts in the loss; 0 masks it
    position_ids: Tensor | None = None  # [B, S]; None: 0 … S-1 in every sequence
    document_lengths: tuple[int, ...] | None = None  # of the documents in the packed B·S tokens; None: each sequence is one
    answers: Tensor | None = None  # [B, S] bool, labels that are an answer. Given in an evaluation, where hits are counted


class DecoderLayer(nn.Module):
    """Attention and feed-forward, added to the residual stream one after the other or side by side: [T, H] → [T, H]."""

    def __init__(
        self, config: ModelConfig, mesh: Mesh, parameter: ParameterFactory, layer: int,
        dropout: Dropout, recompute: Recompute, kernel: Kernel | None,
    ) -> None:  # fmt: skip
        super().__init__()
        prefix = f"model.layers.{layer}"
        self.keeps_normed = recompute.mode != "selective"
        self.dropout = dropout.of_layer(layer, config.num_hidden_layers)
        self.is_parallel = config.is_parallel
        self.input_layernorm = _norm(config, parameter, f"{prefix}.input_layernorm")
        self.self_attn = SelfAttention(
            config, mesh.tp_group, parameter, f"{prefix}.self_attn", attention_dropout=dropout.attention, kernel=kernel
        )
        if not config.is_parallel:
            self.post_attention_layernorm = _norm(config, parameter, f"{prefix}.post_attention_layernorm")
        self.mlp_layernorm = (
            _norm(config, parameter, f"{prefix}.mlp_layernorm") if config.is_parallel and not config.has_shared_norm else None
        )
        self.mlp = MLP(config, mesh.tp_group, parameter, f"{prefix}.mlp", keeps_product=self.keeps_normed)

    def forward(self, x: Tensor, sequences: Sequences) -> Tensor:
        with produced(self.input_layernorm, x, is_kept=self.keeps_normed) as normed:
            attention = self.self_attn(normed, sequences)
            if self.is_parallel and self.mlp_layernorm is None:
                return self._drop(self.mlp(normed).add_(attention)).add_(x)
        if self.mlp_layernorm is not None:
            with produced(self.mlp_layernorm, x, is_kept=self.keeps_normed) as normed:
                return self._drop(self.mlp(normed).add_(attention)).add_(x)
        x = self._drop(attention).add_(x)
        with produced(self.post_attention_layernorm, x, is_kept=self.keeps_normed) as normed:
            return self._drop(self.mlp(normed)).add_(x)

    # What a row-parallel layer or dropout results in is new, and neither keeps it: the stream is added in place.
    def _drop(self, x: Tensor) -> Tensor:
        return _dropout(x, self.dropout) if self.training and self.dropout else x


class Decoder(nn.Module):
    """What a rank holds between the token ids and the output layer. Layers bear their numbers in the whole model."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        parameter: ParameterFactory,
        chunks: list[range],
        dropout: Dropout,
        recompute: Recompute,
        kernel: Kernel | None,
    ) -> None:
        super().__init__()
        if mesh.pp_rank == 0:
            self.embed_tokens = VocabParallelEmbedding(parameter(EMBEDDING), mesh.tp_group)
        self.layers = nn.ModuleDict(
            {
                str(layer): DecoderLayer(config, mesh, parameter, layer, dropout, recompute, kernel)
                for chunk in chunks
                for layer in chunk
            }
        )
        if mesh.pp_rank == mesh.layout.pp - 1:
            self.norm = _norm(config, parameter, FINAL_NORM)


class Transformer(nn.Module):
    """A language model. Its weights are uninitialised until they are loaded (`parallel.parallelize.load_weights`).

    Args:
        config: the model.
        mesh: where this process stands; decides which part of the model it holds.
        dtype: what the model computes in.
        device: of the parameters; default: the mesh's. On `meta` nothing is allocated.
        dropout: used in training mode only.
        recompute: what the backward pass computes again.
        kernel: what computes the attention; default: the fastest there is (`layers.attention.choose_kernel`).

    Raises:
        ValueError: the layout cannot hold the model; the message names the legal values.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        dropout: Dropout | None = None,
        recompute: Recompute | None = None,
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__()
        mesh.layout.check(config)
        replicas = mesh.layout.kv_replicas(config)
        assert mesh.kv_group is not None or replicas == 1, (
            f"at tp={mesh.layout.tp}, {replicas} ranks hold each key/value head of this model, and must sum up its gradient: "
            f"init_mesh needs kv_replicas={replicas}"
        )
        self.config = config
        self.mesh = mesh
        self.dtype = dtype
        self.dropout = dropout or Dropout()
        self.recompute = recompute or Recompute()
        self.chunks = [range(*layers) for layers in chunk_layers(config.num_hidden_layers, mesh.layout, mesh.pp_rank)]
        device = mesh.device if device is None else torch.device(device)
        parameter = ParameterFactory({spec.name: spec for spec in tensors(config)}, mesh, dtype, device)
        self.speeds = frequencies(config, dtype).to(device)  # of the rotary embedding
        self.model = Decoder(config, mesh, parameter, self.chunks, self.dropout, self.recompute, kernel)
        if mesh.pp_rank == mesh.layout.pp - 1:
            self.lm_head = ColumnParallelLinear(self._output_weight(parameter), mesh.tp_group)

    def _output_weight(self, parameter: ParameterFactory) -> ShardedParameter:
        if not self.config.tie_word_embeddings:
            return parameter(HEAD)
        # The same parameter where embedding and output layer are on one rank, else a copy whose gradient is summed with it.
        return self.model.embed_tokens.weight if self.mesh.layout.pp == 1 else parameter(EMBEDDING)

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits of every token for this rank's part of the vocabulary. The whole model must be on this pp rank.

        Args:
            tokens: [B, S] int64, the same on every rank of a tp group.
            position_ids: [B, S]; default: 0 … S-1 in every sequence.

        Returns:
            [B·S, V]: V rows of the vocabulary padded to 128·tp, cut over tp. The logits of padded rows mean nothing.

        Raises:
            ValueError: tp does not divide B·S.
        """
        assert self.mesh.layout.pp == 1, "logits are for models on one pp rank"
        batch = MicroBatch(tokens, tokens, tokens, position_ids)
        return self.lm_head(self._hidden(0, None, batch))  # type: ignore[no-any-return]

    def loss(self, tokens: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """The weighted SUM of the tokens' losses; the whole model must be on this pp rank. See `forward_chunk`."""
        assert self.mesh.layout.pp == 1, "use parallel.pipeline where the model is cut over pp"
        return self.forward_chunk(0, None, MicroBatch(tokens, labels, weights))

    def forward_chunk(self, index: int, x: Tensor | None, batch: MicroBatch) -> Tensor:
        """Run one of this rank's chunks on a micro batch.

        Args:
            index: of the chunk on this rank.
            x: [T, H], what the chunk before it gave; None for the first chunk of the model.
            batch: the micro batch.

        Returns:
            [T, H] hidden states; from the last chunk of the model the weighted SUM of the tokens' losses instead, a scalar in
            fp32 (fp64 where the model is), the same on every rank of a tp group. Where the micro batch says what is an answer,
            three numbers in fp64: that sum; of the tokens with a weight, how many labels are the likeliest id; and how many of
            these are of an answer.

        Raises:
            ValueError: tp does not divide B·S.
        """
        x = self._hidden(index, x, batch)
        if not self.is_last(index):
            return x
        start, stop = self.lm_head.weight.piece[0]
        labels, weights = batch.labels.reshape(-1), batch.weights.reshape(-1)
        if batch.answers is None:
            return vocab_parallel_linear_cross_entropy(
                x, self.lm_head.weight, labels, weights, stop - start, self.mesh.tp_group
            )
        loss, hits = loss_and_hits(x, self.lm_head.weight, labels, weights, stop - start, self.mesh.tp_group)
        hits &= weights != 0
        return torch.stack((loss.double(), hits.sum(), (hits & batch.answers.reshape(-1)).sum()))

    def is_last(self, index: int) -> bool:
        """Whether a chunk of this rank is the last one of the model."""
        return self.mesh.pp_rank == self.mesh.layout.pp - 1 and index == len(self.chunks) - 1

    def hidden_shape(self, batch: MicroBatch) -> tuple[int, int]:
        """[T, H] of a micro batch between two chunks.

        Raises:
            ValueError: tp does not divide B·S.
        """
        tp, (sequences, length) = self.mesh.layout.tp, batch.tokens.shape
        if batch.tokens.numel() % tp:
            raise ValueError(
                f"tp={tp} does not divide the {sequences} × {length} tokens of a micro batch, "
                "which it shares out. Change the micro batch size or the sequence length"
            )
        return batch.tokens.numel() // tp, self.config.hidden_size

    def sharded_parameters(self) -> dict[str, ShardedParameter]:
        """All parameters of this rank by canonical name, each once, in the order of the forward pass."""
        return {p.spec.name: p for p in self.parameters() if isinstance(p, ShardedParameter)}

    def _hidden(self, index: int, x: Tensor | None, batch: MicroBatch) -> Tensor:
        """Hidden states after a chunk, after the final norm where it is the last: [T, H]."""
        self.hidden_shape(batch)  # refuses what tp cannot share out
        batch_size, length = batch.tokens.shape
        position_ids = batch.position_ids
        if position_ids is None:
            position_ids = torch.arange(length, device=batch.tokens.device)
        if x is None:
            x = self.model.embed_tokens(batch.tokens.reshape(-1))
            if self.training and (share := self.dropout.of_embeddings):
                x = _dropout(x, share)
        sequences = Sequences(batch_size, rotation(position_ids, self.speeds, x.dtype), batch.document_lengths)
        x = self._run(self.chunks[index], x, sequences)
        return self.model.norm(x) if self.is_last(index) else x

    def _run(self, layers: range, x: Tensor, sequences: Sequences) -> Tensor:
        if self.recompute.mode != "full" or not torch.is_grad_enabled():
            return self._run_unit(layers, x, sequences)
        step = self.recompute.layers_per_unit
        for first in range(layers.start, layers.stop, step):
            unit = range(first, min(first + step, layers.stop))
            is_random = self.training and self.dropout.is_active
            x = checkpoint(self._run_unit, unit, x, sequences, use_reentrant=False, preserve_rng_state=is_random)
        return x

    def _run_unit(self, layers: range, x: Tensor, sequences: Sequences) -> Tensor:
        for layer in layers:
            x = self.model.layers[str(layer)](x, sequences)
        return x


def _dropout(x: Tensor, share: float) -> Tensor:
    return torch.native_dropout(x, share, train=True)[0]  # its mask takes a byte a number, that of F.dropout on the CPU as x


def _norm(config: ModelConfig, parameter: ParameterFactory, name: str) -> nn.Module:
    # sees this rank's tokens only, so that its gradient is summed over tp once per step (`parallel.finalize`)
    weight = parameter(f"{name}.weight", sees_all_tokens=False)
    if config.norm == "rmsnorm":
        return RMSNorm(weight, config.norm_eps)
    return LayerNorm(weight, parameter(f"{name}.bias", sees_all_tokens=False), config.norm_eps)

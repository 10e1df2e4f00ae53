"""The decoder-only transformer, this rank's part of it.

Its modules bear Hugging Face's names, so the name of a parameter is the name of the tensor in every checkpoint. Inside, a micro
batch of B sequences of S tokens is one packed list of tokens. Between the layers it is shared out over the tp group, T = B·S/tp
tokens each; the loss is a weighted SUM, so that micro batches and replicas simply add up.
"""

import torch
from torch import Tensor, nn

from megatron_core_impl.collectives import Group
from megatron_core_impl.config import ModelConfig
from megatron_core_impl.layers.attention import SelfAttention
from megatron_core_impl.layers.cross_entropy import vocab_parallel_cross_entropy
from megatron_core_impl.layers.embedding import VocabParallelEmbedding
from megatron_core_impl.layers.linear import ColumnParallelLinear
from megatron_core_impl.layers.mlp import MLP
from megatron_core_impl.layers.norm import RMSNorm
from megatron_core_impl.layers.parameter import ParameterFactory, ShardedParameter
from megatron_core_impl.layers.rope import Rotation, rotation
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models.families import tensors


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each on normed input and added to the residual stream: [T, H] → [T, H]."""

    def __init__(self, config: ModelConfig, group: Group, parameter: ParameterFactory, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = _norm(config, parameter, f"{prefix}.input_layernorm.weight")
        self.self_attn = SelfAttention(config, group, parameter, f"{prefix}.self_attn")
        self.post_attention_layernorm = _norm(config, parameter, f"{prefix}.post_attention_layernorm.weight")
        self.mlp = MLP(group, parameter, f"{prefix}.mlp")

    def forward(self, x: Tensor, turn: Rotation, batch_size: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), turn, batch_size)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Token ids [B, S] → hidden states [T, H] after the final norm."""

    def __init__(self, config: ModelConfig, group: Group, parameter: ParameterFactory) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(parameter("model.embed_tokens.weight"), group)
        self.layers = nn.ModuleList(
            DecoderLayer(config, group, parameter, f"model.layers.{layer}") for layer in range(config.num_hidden_layers)
        )
        self.norm = _norm(config, parameter, "model.norm.weight")

    def forward(self, tokens: Tensor, position_ids: Tensor | None) -> Tensor:
        batch_size, length = tokens.shape
        if position_ids is None:
            position_ids = torch.arange(length, device=tokens.device)
        x = self.embed_tokens(tokens.reshape(-1))
        turn = rotation(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        for layer in self.layers:
            x = layer(x, turn, batch_size)
        return self.norm(x)  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A language model. Its weights are uninitialised until they are loaded (`parallel.parallelize.load_weights`).

    Raises:
        ValueError: the layout cannot hold the model; the message names the legal values.
    """

    def __init__(
        self, config: ModelConfig, mesh: Mesh, *, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        mesh.layout.check(config)
        if mesh.layout.pp != 1:
            raise ValueError(f"pp={mesh.layout.pp}: this version cuts models over tp only. Set pp to 1")
        self.config = config
        self.mesh = mesh
        specs = {spec.name: spec for spec in tensors(config)}
        device = mesh.device if device is None else torch.device(device)
        parameter = ParameterFactory(specs, mesh, dtype, device)
        self.model = Decoder(config, mesh.tp_group, parameter)
        embedding = self.model.embed_tokens.weight
        self.lm_head = ColumnParallelLinear(
            embedding if config.tie_word_embeddings else parameter("lm_head.weight"), mesh.tp_group
        )

    def forward(self, tokens: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Logits of every token for this rank's part of the vocabulary.

        Args:
            tokens: [B, S] int64, the same on every rank of a tp group.
            position_ids: [B, S]; default: 0 … S-1 in every sequence.

        Returns:
            [B·S, V]: V rows of the vocabulary padded to 128·tp, cut over tp. The logits of padded rows mean nothing.

        Raises:
            ValueError: tp does not divide B·S.
        """
        if tokens.numel() % self.mesh.layout.tp:
            raise ValueError(
                f"tp={self.mesh.layout.tp} does not divide the {tokens.shape[0]} × {tokens.shape[1]} tokens of a micro batch, "
                "which it shares out. Change the micro batch size or the sequence length"
            )
        return self.lm_head(self.model(tokens, position_ids))  # type: ignore[no-any-return]

    def loss(self, tokens: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """The weighted SUM of the tokens' losses, the same on every rank of a tp group.

        Args:
            tokens: [B, S] int64.
            labels: [B, S] int64, for each position the id that follows.
            weights: [B, S], what each token counts: its mask divided by the number of unmasked tokens of the whole step, over
                all micro batches and replicas, makes the step's gradients those of the mean.

        Returns:
            A scalar in fp32, or fp64 where the model is.
        """
        embedding = self.model.embed_tokens.weight
        start, stop = embedding.piece[0]
        return vocab_parallel_cross_entropy(
            self(tokens), labels.reshape(-1), weights.reshape(-1), stop - start, self.mesh.tp_group
        )

    def sharded_parameters(self) -> dict[str, ShardedParameter]:
        """All parameters by canonical name, each once, in the order of the forward pass: the same on every rank."""
        return {name: p for name, p in self.named_parameters() if isinstance(p, ShardedParameter)}


def _norm(config: ModelConfig, parameter: ParameterFactory, name: str) -> RMSNorm:
    return RMSNorm(parameter(name, sees_all_tokens=False), config.rms_norm_eps)

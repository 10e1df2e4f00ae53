"""What both models read: batches of real text, and probes of what such batches seldom reach.

transformers reads a rectangle, padded on the left or on the right, with an attention mask. Ours reads what training reads: a
plain rectangle, or, where there is padding, the tokens without it as one packed list of documents. Both give the same rows.

Probes, each a comparison of its own:

- padding: the same text padded on the right, and on the left.
- long positions: half of the tokens at the first positions, half at the last the model knows; so the angles between them are
  as large as they get, where a wrong base or a forgotten scaling of the rotary embedding shows best.
- beyond the sliding window: the first tokens that no longer see the first ones.
- added tokens: text in which every other token is one of the last ids of the vocabulary.

Letters: B sequences of at most S tokens, N tokens without padding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from megatron_core_impl.config import ModelConfig
from megatron_core_impl.models.transformer import MicroBatch

DATA = "data"
SHORT = 48  # tokens of a probe: enough for every effect, few beside a batch
BEYOND = 32  # tokens that are compared beyond the window
LAST_IDS = 16  # of the vocabulary, at least


Progress = Callable[[int, "Batch"], None]  # told the number of a batch that is begun


@dataclass(frozen=True)
class Batch:
    """Sequences side by side: all tensors are [B, S]."""

    name: str  # of the comparison that it belongs to
    tokens: Tensor  # int64
    labels: Tensor  # int64, for each position the id that follows
    position_ids: Tensor  # int64
    mask: Tensor  # bool: False is padding
    is_compared: Tensor  # bool: tokens whose figures count; none of padding

    @classmethod
    def of(cls, name: str, samples: Tensor) -> Self:
        """Plain sequences: samples [B, S + 1]."""
        tokens, labels = samples[:, :-1].contiguous(), samples[:, 1:].contiguous()
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape).contiguous()
        return cls(name, tokens, labels, positions, torch.ones_like(tokens, dtype=torch.bool), torch.ones_like(tokens).bool())

    @property
    def is_plain(self) -> bool:
        """Whether there is no padding, and positions count up from 0."""
        counted = torch.arange(self.tokens.shape[1]).expand_as(self.tokens)
        return bool(self.mask.all()) and torch.equal(self.position_ids, counted)

    @property
    def num_compared(self) -> int:
        return int(self.is_compared.sum())

    @property
    def parts(self) -> Tensor:
        """Which compared tokens belong to each of `figures.PARTS`: [4, compared] bool."""
        place = (self.mask.cumsum(1) - 1)[self.is_compared]  # within their sequences
        late = self.mask.sum(1, keepdim=True).expand_as(self.mask)[self.is_compared] // 2
        return torch.stack([place >= 0, place == 0, (place >= 1) & (place < 5), place >= late])

    def micro_batch(self, tp: int) -> tuple[MicroBatch, Tensor]:
        """The same as training reads it, and which of the B·S packed tokens are compared: [B·S] bool.

        A document at the end fills up what tp could not share out.
        """
        weights = self.is_compared.float()
        if self.is_plain and self.tokens.numel() % tp == 0:
            return MicroBatch(self.tokens, self.labels, weights), self.is_compared.flatten()
        lengths = self.mask.sum(1).tolist()
        fill = -sum(lengths) % tp

        def packed(values: Tensor) -> Tensor:
            return torch.cat([values[self.mask], values.new_zeros(fill)]).unsqueeze(0)  # [1, N + fill]

        positions = packed(self.position_ids)
        documents = tuple(length for length in (*lengths, fill) if length)
        batch = MicroBatch(packed(self.tokens), packed(self.labels), packed(weights), positions, documents)
        return batch, packed(self.is_compared)[0]


def probes(stream: Tensor, config: ModelConfig, *, first_added: int) -> list[Batch]:
    """The probes of a model.

    Args:
        stream: ids of the data, in their order: [N], at least two.
        config: the model.
        first_added: the id from which on the vocabulary is new; where nothing is, the number of ids.
    """
    length = min(SHORT, config.max_position_embeddings)
    text = _cycle(stream, 4 * length + 1)
    found = [_padding(text, length), _long_positions(text, length, config)]
    window = config.sliding_window
    if window is not None and window < config.max_position_embeddings:
        found.append(_beyond_window(_cycle(stream, window + BEYOND + 1), window, config))
    found.append(_last_ids(text[: length + 1], config.vocab_size, first_added))
    return found


def _cycle(stream: Tensor, length: int) -> Tensor:
    return stream.repeat(-(-length // len(stream)))[:length]


def _padding(text: Tensor, length: int) -> Batch:
    """Three sequences: padded on the right, padded on the left, and whole."""
    short = length - max(1, length // 3)
    batch = Batch.of("padding", torch.stack([text[i * length : (i + 1) * length + 1] for i in range(3)]))
    mask = batch.mask.clone()
    mask[0, short:] = False
    mask[1, : length - short] = False
    positions = (mask.cumsum(1) - 1).clamp_min(0)  # as transformers counts them when it generates
    return Batch(batch.name, batch.tokens, batch.labels, positions, mask, mask.clone())


def _long_positions(text: Tensor, length: int, config: ModelConfig) -> Batch:
    batch = Batch.of("long positions", text[: length + 1].unsqueeze(0))
    positions = torch.arange(length)
    half = length // 2
    positions[half:] += config.max_position_embeddings - length
    return Batch(batch.name, batch.tokens, batch.labels, positions.unsqueeze(0), batch.mask, batch.is_compared)


def _beyond_window(text: Tensor, window: int, config: ModelConfig) -> Batch:
    length = min(len(text) - 1, config.max_position_embeddings)
    batch = Batch.of("beyond the sliding window", text[: length + 1].unsqueeze(0))
    is_beyond = batch.position_ids >= window
    return Batch(batch.name, batch.tokens, batch.labels, batch.position_ids, batch.mask, is_beyond)


def _last_ids(text: Tensor, vocab_size: int, first_added: int) -> Batch:
    """Every other token one of the last ids, also as what follows; all added ones where they fit in."""
    name = "added tokens" if first_added < vocab_size else "last ids of the vocabulary"
    first = max(0, min(first_added, vocab_size - LAST_IDS))
    text = text.clone()
    places = torch.arange(0, len(text), 2)
    text[places] = vocab_size - 1 - torch.arange(len(places)) % (vocab_size - first)
    return Batch.of(name, text.unsqueeze(0))

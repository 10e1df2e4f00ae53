"""Packing: full rows, every sequence once, and the same training as without."""

from collections.abc import Sequence
from itertools import chain, combinations
from pathlib import Path

import conversation_files
import numpy as np
import pytest
import tiny
import torch
from distributed import GlooPool
from torch import Tensor

from megatron_core_impl.collectives import all_reduce_
from megatron_core_impl.config import Layout, ModelConfig
from megatron_core_impl.data import instruction_dataset
from megatron_core_impl.data.instruction_dataset import Conversations, PackedConversations, Reading
from megatron_core_impl.data.packing import pack
from megatron_core_impl.data.samples import HostBatch, Row, collate
from megatron_core_impl.mesh import Mesh, init_mesh
from megatron_core_impl.models.transformer import MicroBatch, Transformer


def check(lengths: np.ndarray, capacity: int) -> float:
    """Every sequence is in exactly one row, and none is too full; the efficiency."""
    packing = pack(lengths, capacity)
    assert sorted(packing.sequences.tolist()) == list(range(len(lengths)))
    fill = np.add.reduceat(lengths[packing.sequences], packing.starts[:-1])
    assert fill.max() <= capacity
    assert packing.efficiency == pytest.approx(lengths.sum() / (len(packing) * capacity))
    assert sum(len(packing.row(number)) for number in range(len(packing))) == len(lengths)
    return packing.efficiency


def test_rows_are_full_on_lengths_as_they_occur() -> None:
    random = np.random.RandomState(0)
    short_and_long = np.where(random.rand(20_000) < 0.8, random.normal(200, 60, 20_000), random.normal(900, 300, 20_000))
    for lengths, capacity in (
        (np.exp(random.normal(5.8, 0.9, 100_000)), 2048),  # median 330, some of many thousand
        (np.exp(random.normal(6, 0.8, 20_000)), 1024),
        (random.gamma(2, 300, 20_000), 4096),
        (random.uniform(1, 2048, 20_000), 2048),
        (short_and_long, 2048),
    ):
        efficiency = check(np.clip(lengths, 1, capacity).astype(np.int32), capacity)
        assert efficiency > 0.97


def test_no_packing_fills_rows_with_what_is_not_there() -> None:
    assert check(np.full(1000, 700), 2048) == pytest.approx(2 * 700 / 2048)
    assert check(np.full(1000, 1100), 2048) == pytest.approx(1100 / 2048)


def test_it_is_best_fit_decreasing() -> None:
    """The plain algorithm, which looks at every row for every sequence, leaves the same room in as many rows."""
    random = np.random.RandomState(1)
    for capacity in (7, 20, 100):
        lengths = random.randint(1, capacity + 1, 300)
        rows: list[list[int]] = []
        for length in sorted(lengths.tolist(), reverse=True):
            fitting = [row for row in rows if sum(row) + length <= capacity]
            best = max(fitting, key=sum, default=None)
            if best is None:
                rows.append([length])
            else:
                best.append(length)
        packing = pack(lengths, capacity)
        fill = np.add.reduceat(lengths[packing.sequences], packing.starts[:-1])
        assert sorted(fill.tolist()) == sorted(map(sum, rows))


def test_it_is_the_same_every_time_and_takes_the_odd_cases() -> None:
    lengths = np.random.RandomState(2).randint(1, 50, 1000)
    assert np.array_equal(pack(lengths, 64).sequences, pack(lengths.copy(), 64).sequences)
    assert check(np.full(10, 5), 5) == 1
    assert len(pack(np.empty(0, np.int32), 5)) == 0
    for wrong in ([6, 1], [0, 1]):
        with pytest.raises(ValueError, match="do not fit rows of 5"):
            pack(np.array(wrong), 5)


SIZES = (9, 4, 14, 6, 2, 11, 8, 3, 5)


def packed(folder: Path, sizes: Sequence[int] = SIZES, length: int = 16, **options: int) -> PackedConversations:
    reading = Reading(length, role_weights=(0.0, 0.3, 1.0), marks_answers=True)
    conversations = Conversations(conversation_files.write_random(folder / "set", sizes, 100), reading)
    rows = instruction_dataset.packed(conversations, np.arange(len(sizes)))
    return PackedConversations(conversations, rows, **({"num_samples": 20, "seed": 3} | options))


ROWS = -(-sum(size - 1 for size in SIZES) // 16)  # that these take


def test_every_conversation_once_an_epoch_in_an_order_of_its_own(tmp_path: Path) -> None:
    samples = packed(tmp_path)
    rows = ROWS
    assert len(samples) == 20
    orders = []
    for epoch in range(20 // rows):
        of_epoch = [samples.conversations_of(epoch * rows + i).tolist() for i in range(rows)]
        assert sorted(chain.from_iterable(of_epoch)) == list(range(len(SIZES)))
        orders.append(of_epoch)
    assert any(a != b for a, b in combinations(orders, 2))
    again, other = packed(tmp_path), packed(tmp_path, seed=4)
    backwards = [again.conversations_of(k).tolist() for k in range(19, -1, -1)][::-1]
    forwards = [samples.conversations_of(k).tolist() for k in range(20)]
    assert backwards == forwards, "a sample is a function of its number, however it is come to"
    assert [other.conversations_of(k).tolist() for k in range(20)] != forwards
    with pytest.raises(IndexError, match="sample 20 of 20"):
        samples.conversations_of(20)


def test_a_row_is_its_conversations_side_by_side(tmp_path: Path) -> None:
    samples = packed(tmp_path)
    for k in range(ROWS):
        row, numbers = samples[k], samples.conversations_of(k)
        own = [samples._conversations.row(int(i)) for i in numbers]
        assert row.document_lengths == tuple(SIZES[i] - 1 for i in numbers)
        assert samples.length(k) == len(row.tokens) == sum(row.document_lengths) <= 16
        assert row.position_ids is not None
        assert row.position_ids.tolist() == [place for one in own for place in range(len(one.tokens))]
        for name in ("tokens", "labels", "weights", "answers"):
            assert getattr(row, name).tolist() == [value for one in own for value in getattr(one, name).tolist()]


def micro_batch(batch: HostBatch) -> MicroBatch:
    positions = None if batch.position_ids is None else torch.from_numpy(batch.position_ids)
    tokens, labels, weights = map(torch.from_numpy, (batch.tokens, batch.labels, batch.weights))
    return MicroBatch(tokens, labels, weights, positions, batch.document_lengths)


def loss_and_grads(model: Transformer, batches: Sequence[MicroBatch]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    losses = [model.forward_chunk(0, None, batch) for batch in batches]
    torch.stack(losses).sum().backward()
    grads = {}
    for name, parameter in model.sharded_parameters().items():
        assert parameter.grad is not None
        is_part = not parameter.sees_all_tokens  # of a sum over tp
        grads[name] = all_reduce_(parameter.grad.clone(), model.mesh.tp_group if is_part else None)
    return float(sum(loss.item() for loss in losses)), grads


def both(model: Transformer, rows: Sequence[Row], alone: Sequence[Row]) -> None:
    """Loss and all gradients of packed rows, and of each conversation in a batch of its own without any padding but tp's."""
    loss, grads = loss_and_grads(model, [micro_batch(collate(rows, 16))])
    want_loss, want = loss_and_grads(model, [micro_batch(collate([row], -(-len(row.tokens) // 2) * 2)) for row in alone])
    assert loss == pytest.approx(want_loss, rel=1e-12)
    assert grads.keys() == want.keys()
    for name in want:
        assert want[name].any() or model.mesh.layout.tp > 1, "of few tokens none may be in a rank's part of the vocabulary"
        torch.testing.assert_close(grads[name], want[name], rtol=1e-10, atol=1e-12, msg=name)


def check_on_rank(folder: Path, config: ModelConfig, layout: Layout) -> None:
    mesh = init_mesh(layout, "cpu", kv_replicas=layout.kv_replicas(config)) if layout.world_size > 1 else Mesh.single()
    model = tiny.loaded(config, mesh, tiny.random_weights(config))
    samples = packed(folder)
    rows = [samples[k] for k in range(ROWS)]
    both(model, rows, [samples._conversations.row(i) for i in range(len(SIZES))])


@pytest.mark.parametrize("config", [tiny.GROUPED, tiny.TIED, tiny.FALCON, tiny.BIASED], ids=["gqa", "tied", "falcon", "window"])
def test_a_packed_batch_is_the_same_training(tmp_path: Path, config: ModelConfig) -> None:
    check_on_rank(tmp_path, config, Layout())


@pytest.mark.parametrize("config", [tiny.GROUPED, tiny.BIASED], ids=["gqa", "window"])
def test_a_packed_batch_is_the_same_training_over_tp(tmp_path: Path, pool: GlooPool, config: ModelConfig) -> None:
    for rank in range(2):
        (tmp_path / f"rank-{rank}").mkdir()
    pool.run(check_on_rank_of_two, 2, tmp_path, config)


def check_on_rank_of_two(folder: Path, config: ModelConfig) -> None:
    check_on_rank(folder / f"rank-{torch.distributed.get_rank()}", config, Layout(tp=2))

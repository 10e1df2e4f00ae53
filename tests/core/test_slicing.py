"""Which rank holds what: pure arithmetic, checked by putting the pieces together again."""

import itertools
from collections import Counter

import pytest

from megatron_core_impl.checkpoint.slicing import dp_rows, pp_layers, rank_slices, tp_slice
from megatron_core_impl.config import Layout, ModelConfig, TensorSpec, padded_vocab_size

CONFIG = ModelConfig(
    family="llama", vocab_size=131, hidden_size=16, intermediate_size=24, num_hidden_layers=5, num_attention_heads=8,
    num_key_value_heads=4, head_dim=2, max_position_embeddings=64,
)  # fmt: skip
SPECS = [
    TensorSpec(name="embed", shape=(131, 16), tp_dim=0, place="first", padded=True),
    *(TensorSpec(name=f"rows{i}", shape=(24, 16), tp_dim=0, place="layer", layer=i) for i in range(5)),
    *(TensorSpec(name=f"cols{i}", shape=(16, 24), tp_dim=1, place="layer", layer=i) for i in range(5)),
    TensorSpec(name="norm", shape=(16,), tp_dim=None, place="last"),
]


@pytest.mark.parametrize(
    ("vocab", "padded"),
    [
        (32000, (32000, 32000, 32256, 32768)),
        (32007, (32128, 32256, 32256, 32768)),
        (65024, (65024, 65024, 65024, 65536)),
        (65026, (65152, 65280, 65536, 65536)),
    ],
)
def test_padded_vocabulary_is_the_references(vocab: int, padded: tuple[int, ...]) -> None:
    assert tuple(padded_vocab_size(vocab, tp) for tp in (1, 2, 4, 8)) == padded  # golden fact G16


@pytest.mark.parametrize(("tp", "pp"), list(itertools.product((1, 2, 4), (1, 2, 3, 5))))
def test_pieces_tile_every_tensor(tp: int, pp: int) -> None:
    """Over the (tp, pp) ranks each element is held once, or once per tp rank where the tensor is replicated."""
    layout = Layout(tp=tp, pp=pp, dp=2)
    held: dict[str, Counter[tuple[int, ...]]] = {spec.name: Counter() for spec in SPECS}
    for rank in range(layout.world_size):
        if layout.coordinates(rank)[1] == 0:
            for name, piece in rank_slices(SPECS, 5, layout, rank).items():
                held[name].update(itertools.product(*(range(*r) for r in piece)))
    for spec in SPECS:
        want = 1 if spec.tp_dim is not None else tp
        assert set(held[spec.name]) == set(itertools.product(*map(range, spec.shape)))
        assert set(held[spec.name].values()) == {want}


def test_vocabulary_is_cut_as_if_padded() -> None:
    """131 rows over 4 ranks: 512 padded rows, so blocks of 128, of which the last two ranks hold none."""
    assert [tp_slice(SPECS[0], 4, t)[0] for t in range(4)] == [(0, 128), (128, 131), (131, 131), (131, 131)]


def test_a_cut_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="tp=5 does not divide dim 0 of rows0, which has size 24"):
        tp_slice(SPECS[1], 5, 0)


@pytest.mark.parametrize(("rows", "dp"), [(8, 2), (7, 2), (3, 4), (1, 4), (0, 2)])
def test_dp_rows(rows: int, dp: int) -> None:
    ranges = [dp_rows(rows, dp, r) for r in range(dp)]
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(rows))
    assert all(stop - start <= -(-rows // dp) for start, stop in ranges)


def test_pp_layers_are_contiguous_and_even() -> None:
    assert [pp_layers(5, 2, r) for r in range(2)] == [(0, 3), (3, 5)]
    assert [pp_layers(8, 4, r) for r in range(4)] == [(0, 2), (2, 4), (4, 6), (6, 8)]


def test_ranks_are_numbered_as_megatrons() -> None:
    """Golden fact G13: world 16, tp 2, pp 4 gives dp groups [0,2][1,3][4,6]… and pp groups [0,4,8,12]…"""
    layout = Layout(tp=2, pp=4, dp=2)
    groups: dict[tuple[int, int], list[int]] = {}
    for rank in range(16):
        pp_rank, _, tp_rank = layout.coordinates(rank)
        groups.setdefault((pp_rank, tp_rank), []).append(rank)
    assert sorted(groups.values()) == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(tp=8), r"tp=8 does not divide num_key_value_heads=4\. Legal here: 1, 2, 4"),
        (Layout(tp=3), r"tp=3 does not divide num_key_value_heads=4\. Legal here: 1, 2, 4"),
        (Layout(pp=6), r"pp=6 exceeds num_hidden_layers=5\. Legal here: 1 to 5"),
    ],
)
def test_illegal_layouts_name_the_legal_ones(layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check(CONFIG)


def test_impossible_models_are_refused() -> None:
    from dataclasses import replace

    with pytest.raises(ValueError, match="num_key_value_heads=3 does not divide num_attention_heads=8"):
        replace(CONFIG, num_key_value_heads=3)
    with pytest.raises(ValueError, match="head_dim=3 must be even"):
        replace(CONFIG, head_dim=3)
    with pytest.raises(ValueError, match="hidden_size=0 must be a positive integer"):
        replace(CONFIG, hidden_size=0)
    with pytest.raises(ValueError, match="tp=0 must be at least 1"):
        Layout(tp=0)

"""Which rank holds what: pure arithmetic, checked by putting the pieces together again."""

import itertools
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from megatron_core_impl.checkpoint.slicing import chunk_layers, dp_rows, rank_slices, replica, tp_slice
from megatron_core_impl.config import Layout, ModelConfig, Recompute, RopeScaling, TensorSpec, balanced, padded_vocab_size
from megatron_core_impl.models.tensors import tensors

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


# Falcon 7B's shape: 71 query heads, one key/value head, tied.
FALCON = ModelConfig(
    family="falcon", vocab_size=131, hidden_size=6, intermediate_size=24, num_hidden_layers=5, num_attention_heads=71,
    num_key_value_heads=1, head_dim=2, max_position_embeddings=64, norm="layernorm", activation="gelu", is_gated=False,
    is_parallel=True, has_shared_norm=True, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("config", [CONFIG, FALCON], ids=["llama", "falcon"])
@pytest.mark.parametrize(
    "layout", [Layout(tp=2), Layout(tp=8), Layout(tp=4, pp=2), Layout(pp=5), Layout(tp=2, pp=2, vpp=2)], ids=str
)
def test_replica_0_has_every_number_once(config: ModelConfig, layout: Layout) -> None:
    layout.check(config)
    specs = {spec.name: spec for spec in tensors(config)}
    held: dict[str, Counter[tuple[int, ...]]] = {name: Counter() for name in specs}
    for rank in range(layout.world_size):
        pp_rank, _, tp_rank = layout.coordinates(rank)
        for name, piece in rank_slices(list(specs.values()), config.num_hidden_layers, layout, rank).items():
            if replica(specs[name], layout, pp_rank, tp_rank) == 0:
                held[name].update(itertools.product(*(range(*r) for r in piece)))
    for name, spec in specs.items():
        assert held[name] == Counter(itertools.product(*map(range, spec.shape))), name


def test_query_heads_are_shared_out_evenly_and_stay_with_their_key_value_head() -> None:
    specs = {spec.name.removeprefix("model.layers.0.self_attn."): spec for spec in tensors(FALCON)}

    def cut(name: str, tp: int) -> list[tuple[int, int]]:
        return [tp_slice(specs[f"{name}.weight"], tp, tp_rank)[0 if name != "o_proj" else 1] for tp_rank in range(tp)]

    assert cut("q_proj", 2) == cut("o_proj", 2) == [(0, 72), (72, 142)]  # 36 and 35 heads of 2
    assert cut("k_proj", 2) == cut("v_proj", 2) == [(0, 2), (0, 2)]  # on both
    assert [(stop - start) // 2 for start, stop in cut("q_proj", 8)] == [9, 9, 9, 9, 9, 9, 9, 8]
    grouped = {spec.name.removeprefix("model.layers.0.self_attn."): spec for spec in tensors(CONFIG)}  # 8 heads look at 4
    assert [tp_slice(grouped["q_proj.weight"], 8, rank)[0] for rank in range(8)] == [(2 * r, 2 * r + 2) for r in range(8)]
    assert [tp_slice(grouped["k_proj.weight"], 8, rank)[0] for rank in range(8)] == [
        (r // 2 * 2, r // 2 * 2 + 2) for r in range(8)
    ]
    assert [replica(grouped["k_proj.weight"], Layout(tp=8), 0, rank) for rank in range(8)] == [0, 1] * 4


def test_layers_are_contiguous_and_as_even_as_they_can_be() -> None:
    assert [balanced(5, 2, part) for part in range(2)] == [(0, 3), (3, 5)]
    assert [chunk_layers(8, Layout(pp=4), rank) for rank in range(4)] == [[(0, 2)], [(2, 4)], [(4, 6)], [(6, 8)]]
    assert [chunk_layers(7, Layout(pp=2, vpp=2), rank) for rank in range(2)] == [[(0, 2), (4, 6)], [(2, 4), (6, 7)]]


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
        (
            Layout(tp=3),
            r"^tp=3 cannot share out num_attention_heads=8 with num_key_value_heads=4 and "
            r"intermediate_size=24\. Legal here: 1, 2, 4, 8$",
        ),
        (Layout(tp=16), r"^tp=16 cannot share out .* Legal here: 1, 2, 4, 8$"),
        (Layout(pp=6), r"pp=6 exceeds num_hidden_layers=5\. Legal here: 1 to 5"),
    ],
)
def test_illegal_layouts_name_the_legal_ones(layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check(CONFIG)


def test_impossible_models_are_refused() -> None:
    with pytest.raises(ValueError, match="num_key_value_heads=3 does not divide num_attention_heads=8"):
        replace(CONFIG, num_key_value_heads=3)
    with pytest.raises(ValueError, match="head_dim=3 must be even"):
        replace(CONFIG, head_dim=3)
    with pytest.raises(ValueError, match="hidden_size=0 must be at least 1"):
        replace(CONFIG, hidden_size=0)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"norm": "layer_norm"}, "norm='layer_norm' is not supported. Legal here: rmsnorm, layernorm"),
        ({"activation": "gelu_new"}, "activation='gelu_new' is not supported. Legal here: silu, gelu, gelu_tanh, relu"),
        ({"norm_eps": float("nan")}, "norm_eps=nan must be a finite number"),
        ({"rope_theta": float("inf")}, "rope_theta=inf must be a finite number"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be above 0"),
        ({"head_dim": True}, "head_dim=True must be a whole number"),
        ({"sliding_window": 0}, "sliding_window=0 must be at least 1"),
    ]
    for changes, message in refused:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=r"^rope_scaling: kind='yarn' is not supported\. Legal here: linear, llama3$"):
        RopeScaling(kind="yarn", factor=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^rope_scaling: factor=nan must be a finite number$"):
        RopeScaling(kind="linear", factor=float("nan"))
    with pytest.raises(ValueError, match=r"^recompute: mode='half' is not supported\. Legal here: none, selective, full$"):
        Recompute(mode="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^tp=2\.0 must be a whole number$"):
        Layout(tp=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tp=0 must be at least 1"):
        Layout(tp=0)

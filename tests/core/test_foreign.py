"""Tensors of one layout as rows of another's: the table, turned round, and read through."""

import pytest
import torch
from hf_models import InMemory

from megatron_core_impl.checkpoint.foreign import Rearranged, assemble, invert
from megatron_core_impl.checkpoint.safetensors_io import WeightsError
from megatron_core_impl.config import Rows, StackedTensor

# fused: a0 a1 | b0 | a2 | b1 b2, and c as it is
TABLE = [
    StackedTensor("fused", (Rows("a", 0, 2), Rows("b", 0, 1), Rows("a", 2, 3), Rows("b", 1, 3))),
    StackedTensor("see", (Rows("c", 0, 4),)),
]
A, B, C = torch.arange(6.0).view(3, 2), torch.arange(6.0, 12.0).view(3, 2), torch.arange(4.0)
FUSED = torch.cat([A[:2], B[:1], A[2:], B[1:]])


def test_the_table_turned_round() -> None:
    inverse = invert(TABLE)
    assert inverse == [
        StackedTensor("a", (Rows("fused", 0, 2), Rows("fused", 3, 4))),
        StackedTensor("b", (Rows("fused", 2, 3), Rows("fused", 4, 6))),
        StackedTensor("c", (Rows("see", 0, 4),)),
    ]
    assert invert(inverse) == TABLE


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((Rows("a", 0, 2), Rows("a", 3, 4)), r"^a: after its rows up to 2 the table gives those from 3 on$"),
        ((Rows("a", 0, 2), Rows("a", 1, 4)), r"^a: after its rows up to 2 the table gives those from 1 on$"),
        ((Rows("a", 1, 2),), r"^a: after its rows up to 0 the table gives those from 1 on$"),
    ],
)
def test_a_table_with_a_hole_is_none(parts: tuple[Rows, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        invert([StackedTensor("fused", parts)])


def test_both_directions() -> None:
    foreign = Rearranged(InMemory({"a": A, "b": B, "c": C}), TABLE)
    assert foreign.names == ("fused", "see")
    assert foreign.shape("fused") == (6, 2)
    assert torch.equal(foreign.read("fused"), FUSED)
    canonical = Rearranged(InMemory({"fused": FUSED, "see": C}), invert(TABLE))
    for name, tensor in (("a", A), ("b", B), ("c", C)):
        assert canonical.shape(name) == tuple(tensor.shape)
        assert torch.equal(canonical.read(name), tensor)
    again = Rearranged(canonical, TABLE)
    assert torch.equal(again.read("fused", dtype=torch.float64), FUSED.double())
    assert torch.equal(assemble(TABLE[0], {"a": A, "b": B}.__getitem__), FUSED)


def test_every_slice() -> None:
    foreign = Rearranged(InMemory({"a": A, "b": B, "c": C}), TABLE)
    for start in range(7):
        for stop in range(start, 7):
            for columns in ((0, 2), (1, 2), (1, 1)):
                got = foreign.read("fused", ((start, stop), columns))
                assert torch.equal(got, FUSED[start:stop, slice(*columns)]), (start, stop, columns)


# two heads of six rows, their halves interleaved as Meta has them, behind two rows of another tensor
HEADS = torch.arange(24.0).view(12, 2)
ROTATED = [StackedTensor("qkv", (Rows("b", 0, 2), Rows("q", 0, 12, (2, 3))))]
ORDER = [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_rows_in_another_order() -> None:
    foreign = Rearranged(InMemory({"b": B, "q": HEADS}), ROTATED)
    fused = torch.cat([B[:2], HEADS[ORDER]])
    assert torch.equal(assemble(ROTATED[0], {"b": B, "q": HEADS}.__getitem__), fused)
    inverse = invert(ROTATED)
    assert inverse[1] == StackedTensor("q", (Rows("qkv", 2, 14, (3, 2)),))
    assert invert(inverse) == ROTATED
    canonical = Rearranged(InMemory({"qkv": fused}), inverse)
    assert torch.equal(assemble(inverse[1], {"qkv": fused}.__getitem__), HEADS)
    for start in range(15):
        for stop in range(start, 15):
            got = foreign.read("qkv", ((start, stop), (1, 2)))
            assert torch.equal(got, fused[start:stop, 1:])
            if stop <= 12:
                assert torch.equal(canonical.read("q", ((start, stop), (0, 2))), HEADS[start:stop])
    bias = Rearranged(InMemory({"qkv": fused[:, 0]}), inverse)
    assert torch.equal(bias.read("q", ((2, 9),)), HEADS[2:9, 0])


def test_of_rows_in_another_order_whole_heads_are_read() -> None:
    asked = []

    class Watched(InMemory):
        def read_bytes(self, name, piece=None):  # type: ignore[no-untyped-def]
            asked.append((name, piece))
            return super().read_bytes(name, piece)

    Rearranged(Watched({"b": B, "q": HEADS}), ROTATED).read("qkv", ((3, 7), (0, 1)))
    Rearranged(Watched({"b": B, "q": HEADS}), ROTATED).read("qkv", ((9, 10), (0, 1)))
    assert asked == [("q", ((0, 6), (0, 1))), ("q", ((6, 12), (0, 1)))]


def test_only_what_is_asked_for_is_read() -> None:
    asked = []

    class Watched(InMemory):
        def read_bytes(self, name, piece=None):  # type: ignore[no-untyped-def]
            asked.append((name, piece))
            return super().read_bytes(name, piece)

    Rearranged(Watched({"a": A, "b": B}), TABLE).read("fused", ((1, 4), (0, 1)))
    assert asked == [("a", ((1, 2), (0, 1))), ("b", ((0, 1), (0, 1))), ("a", ((2, 3), (0, 1)))]


def test_what_cannot_be_read() -> None:
    foreign = Rearranged(InMemory({"a": A, "b": B.half(), "c": C}), TABLE)
    with pytest.raises(WeightsError, match=r"fused is made of a \(float32\) and b \(float16\), which must be"):
        foreign.dtype("fused")
    with pytest.raises(WeightsError, match=r"^memory: has no tensor other$"):
        foreign.read("other")
    with pytest.raises(WeightsError, match=r"fused: has shape \[6, 2\], so there is no slice \[0:7, 0:2\] of it"):
        Rearranged(InMemory({"a": A, "b": B}), TABLE).read("fused", ((0, 7), (0, 2)))

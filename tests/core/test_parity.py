"""What is compared, and how: the figures by their definition, the batches as both sides read them, one batch in memory."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hf_models import KINDS, VOCAB, InMemory, ours_of, random_model
from parity_runs import batches_of, comparisons, oracle_of, roundings
from torch import Tensor

from megatron_core_impl.config import TensorSpec
from megatron_core_impl.models import families
from megatron_core_impl.parity import expected as expected_module
from megatron_core_impl.parity.compare import compare
from megatron_core_impl.parity.expected import Expected, count_bytes
from megatron_core_impl.parity.figures import LOGITS, Comparison, Difference, Part, Reference, Sums, compared, points
from megatron_core_impl.parity.probes import Batch, probes
from megatron_core_impl.parity.record import Oracle, record
from megatron_core_impl.parity.tensors import prove

FLOOR = 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_agrees_on_data_and_probes(kind: str) -> None:
    theirs = random_model(kind)
    found = comparisons(theirs, ours_of(theirs))
    window = ["beyond the sliding window"] if "window" in kind.replace("no-window", "") or kind == "mistral" else []
    assert list(found) == ["data", "padding", "long positions", *window, "last ids of the vocabulary"]
    for comparison in found.values():
        assert comparison.worst.relative < 2e-6
        assert comparison.first_difference(FLOOR) is None
        assert comparison.loss_difference < 5e-6
        assert comparison.not_finite is None
    assert [difference.module for difference in found["data"].differences] == points(2)


def test_figures_are_those_of_the_definition() -> None:
    """Errors, losses and agreement against a plain computation over everything at once."""
    theirs, other = random_model("llama"), random_model("llama", rms_norm_eps=0.1)
    found = comparisons(theirs, ours_of(other))["data"]
    batches = [batch for batch in batches_of(ours_of(other).config) if batch.name == "data"]
    with torch.no_grad():
        a, b = (torch.cat([model(batch.tokens).logits for batch in batches]) for model in (other, theirs))  # [4, 32, V]
    y = torch.cat([batch.labels for batch in batches]).flatten()
    assert found.tokens == 128
    assert found.mean_error == pytest.approx((a - b).abs().mean().item(), rel=1e-4)
    assert found.max_error == pytest.approx((a - b).abs().max().item(), rel=1e-4)
    assert found.loss_ours == pytest.approx(F.cross_entropy(a.flatten(0, 1), y).item(), rel=1e-5)
    assert found.loss_reference == pytest.approx(F.cross_entropy(b.flatten(0, 1), y).item(), rel=1e-6)
    assert found.argmax_agreement == pytest.approx((a.argmax(-1) == b.argmax(-1)).float().mean().item())
    assert 0 < found.argmax_agreement < 1
    logits = found.differences[-1]
    for name, part in (("relative", slice(0, 32)), ("start", slice(0, 1)), ("early", slice(1, 5)), ("late", slice(16, 32))):
        wanted = ((a - b)[:, part].norm() / b[:, part].norm()).item()
        assert getattr(logits, name) == pytest.approx(wanted, rel=1e-4), name


def test_rows_are_compared_in_pieces_of_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = random_model("mistral"), ours_of(random_model("mistral", rms_norm_eps=0.1))
    whole = comparisons(theirs, ours)
    for module in ("expected", "record"):
        monkeypatch.setattr(f"megatron_core_impl.parity.{module}.ROWS", 7)
    pieces = comparisons(theirs, ours)
    assert expected_module.ROWS == 7
    for name, comparison in whole.items():
        assert pieces[name].mean_error == pytest.approx(comparison.mean_error, rel=1e-6)
        assert pieces[name].loss_reference == pytest.approx(comparison.loss_reference, rel=1e-6)
        assert pieces[name].differences[1].late == pytest.approx(comparison.differences[1].late, rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "falcon-7b", "falcon-40b"])
def test_rounding_is_what_transformers_is_off_by_itself(kind: str) -> None:
    theirs = random_model(kind)
    config = ours_of(theirs).config
    half = random_model(kind).to(torch.bfloat16)
    own = roundings(theirs, half, config)
    with_ours = comparisons(theirs, ours_of(half, torch.bfloat16))
    for name, comparison in with_ours.items():
        assert own[name].worst.relative > 1e-3
        assert comparison.times(own[name]) < 1.5
        assert comparison.first_beyond(own[name], 1.5) is None
    assert comparisons(theirs, ours_of(random_model(kind)))["data"].times(own["data"]) < 1e-3


# ── Points and figures ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("errors", "first"),
    [
        ((0.0, 2e-6, 8e-6, 3e-5, 9e-5), None),  # grows with depth: rounding
        ((0.0, 2e-6, 8e-6, 1e-3, 5e-2), 3),
        ((0.0, 2e-6, 8e-6, 5e-5, 2e-3), 4),
        ((0.0, 9e-6, 8e-6, 9e-6, 9e-6), None),
        ((1e-2, 1e-2, 1e-2, 1e-2, 1e-2), 0),
    ],
)
def test_first_difference_is_a_jump(errors: tuple[float, ...], first: int | None) -> None:
    comparison = comparison_of(errors)
    found = comparison.first_difference(FLOOR)
    assert found == (None if first is None else comparison.differences[first])
    if found is not None:
        assert comparison.agreement_before(found) == max(errors[:first], default=0.0)


def test_errors_in_those_of_another_comparison() -> None:
    ours, theirs = comparison_of((0.0, 1e-2, 4e-2)), comparison_of((0.0, 1e-2, 1e-2))
    assert ours.times(theirs) == pytest.approx(4)
    assert ours.first_beyond(theirs, 3) == ours.differences[2]
    assert ours.first_beyond(theirs, 5) is None
    assert comparison_of((1e-9, 0.0, 0.0)).times(theirs) == math.inf


def comparison_of(errors: tuple[float, ...]) -> Comparison:
    differences = tuple(Difference(str(i), error, error, error, 0.0, 0.0, 0.0) for i, error in enumerate(errors))
    return Comparison("data", 1, 0.0, 0.0, 0.0, 0.0, 1.0, differences, None)


def test_ranks_are_put_together() -> None:
    """Two ranks with half of the tokens each, and half of the vocabulary each."""
    first, second = (Part(0, {point: Sums(1.0, float(k), 2) for point in points(1)}) for k in (1, 2))
    first.loss = 6.0
    first.best, second.best = ([1.0, 5.0, 3.0], [0, 1, 2]), ([2.0, 4.0, 3.0], [7, 8, 6])
    found = compared("data", 1, {0: Reference(9.0, [7, 1, 2], None)}, [first, second, Part(1, {}, loss=100.0)])
    assert (found.tokens, found.argmax_agreement) == (3, 1)  # the lower id where two are alike
    assert (found.mean_error, found.max_error) == (0.5, 2.0)
    assert (found.loss_ours, found.loss_reference) == (2.0, 3.0)


def test_parts_of_a_padded_batch() -> None:
    """Positions are counted within each sequence, wherever it is padded."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]]).bool()
    batch = Batch("padding", torch.zeros(2, 6).long(), torch.zeros(2, 6).long(), torch.zeros(2, 6).long(), mask, mask)
    relative, start, early, late = batch.parts.int().tolist()
    assert relative == [1, 1, 1, 1, 1, 1]
    assert start == [1, 0, 0, 0, 1, 0]
    assert early == [0, 1, 1, 1, 0, 1]
    assert late == [0, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("tp", [1, 2, 3, 5])
def test_what_training_reads_is_what_transformers_reads(tp: int) -> None:
    """The tokens without padding, in order, and a document that fills up what tp cannot share out."""
    config = ours_of(random_model("mistral")).config
    for batch in batches_of(config, size=1):
        packed, is_compared = batch.micro_batch(tp)
        assert packed.tokens.numel() % tp == 0
        assert torch.equal(packed.tokens.flatten()[is_compared], batch.tokens[batch.is_compared])
        assert torch.equal(packed.weights.flatten() != 0, is_compared)
        if batch.is_plain and batch.tokens.numel() % tp == 0:
            assert packed.document_lengths is packed.position_ids is None
            continue
        assert packed.document_lengths is not None
        assert packed.position_ids is not None
        assert sum(packed.document_lengths) == packed.tokens.numel()
        assert packed.document_lengths[: len(batch.tokens)] == tuple(batch.mask.sum(1).tolist())
        assert torch.equal(packed.position_ids.flatten()[is_compared], batch.position_ids[batch.is_compared])


def test_probes_reach_what_they_are_for() -> None:
    config = ours_of(random_model("mistral")).config  # a window of 5, 64 positions
    found = {probe.name: probe for probe in probes(torch.arange(20) % 7, config, first_added=VOCAB - 3)}
    assert list(found) == ["padding", "long positions", "beyond the sliding window", "added tokens"]
    padded = found["padding"].mask
    assert not padded[0, -1]
    assert not padded[1, 0]
    assert padded[2].all()
    assert (found["long positions"].position_ids.min(), found["long positions"].position_ids.max()) == (0, 63)
    window = found["beyond the sliding window"]
    assert window.is_compared[0].nonzero()[:, 0].tolist() == list(range(5, window.tokens.shape[1]))
    ids = set(found["added tokens"].tokens.flatten().tolist()) & set(found["added tokens"].labels.flatten().tolist())
    assert ids >= {VOCAB - 3, VOCAB - 2, VOCAB - 1}
    no_window = ours_of(random_model("llama")).config
    assert [probe.name for probe in probes(torch.arange(3), no_window, first_added=VOCAB)][-1] == "last ids of the vocabulary"


# ── Memory, and what cannot be compared ───────────────────────────────────────────────────────────────────────────────


def test_activations_take_what_is_foretold(tmp_path: Path) -> None:
    theirs = random_model("llama")
    config = ours_of(theirs).config
    batches = batches_of(config)
    record(oracle_of(theirs, config), batches, Expected(tmp_path))
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size == count_bytes(config, sum(batch.num_compared for batch in batches))


def test_a_module_may_write_into_its_input(tmp_path: Path) -> None:
    """Falcon of transformers adds the attention's output to the MLP's in place: what was seen before stays as it was."""
    theirs = random_model("falcon-7b")
    config = ours_of(theirs).config
    [batch] = [batch for batch in batches_of(config, count=1) if batch.name == "data"]
    seen: list[Tensor] = []
    handle = theirs.transformer.h[0].mlp.register_forward_hook(lambda _m, _a, output: seen.append(output.clone()))
    record(oracle_of(theirs, config), [batch], Expected(tmp_path))
    handle.remove()
    [(_, rows)] = Expected(tmp_path).blocks(0, "model.layers.0.mlp", (0, 64), 48)
    assert torch.equal(rows, seen[0].flatten(0, 1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_names_side_and_module(value: float) -> None:
    theirs, broken = random_model("llama"), random_model("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = value
    found = comparisons(theirs, ours_of(broken))["data"]
    assert found.not_finite == "ours: model.layers.1.mlp"
    assert math.isinf(found.mean_error)
    assert comparisons(broken, ours_of(broken))["data"].not_finite == "transformers: model.layers.1.mlp"


def test_refuses_another_size(tmp_path: Path) -> None:
    theirs, ours = random_model("llama"), ours_of(random_model("llama", vocab_size=VOCAB + 1))
    batches = [Batch.of("data", torch.zeros(1, 9).long())]
    record(oracle_of(theirs, ours_of(theirs).config), batches, Expected(tmp_path))
    with pytest.raises(ValueError, match=f"lm_head: ours computes {VOCAB + 1} numbers for a token, the reference {VOCAB}"):
        compare(ours, batches, Expected(tmp_path))


def test_hooks_are_removed() -> None:
    theirs = random_model("llama")
    ours = ours_of(theirs)
    comparisons(theirs, ours)
    assert not any(module._forward_hooks for module in itertools.chain(theirs.modules(), ours.modules()))


def test_batches_run_one_after_the_other(tmp_path: Path) -> None:
    """Each is written when it is done, before the next is begun."""
    theirs = random_model("llama")
    config = ours_of(theirs).config
    written: list[set[str]] = []
    oracle = oracle_of(theirs, config)

    def logits(batch: Batch) -> Tensor:
        written.append({file.name.partition("-")[0] for file in tmp_path.iterdir()})
        return oracle.logits(batch)

    record(Oracle(theirs, logits, 2, oracle.own_name), batches_of(config, count=3)[:3], Expected(tmp_path))
    assert written == [set(), {"0"}, {"0", "1"}]


# ── Tensors ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def weights_of(kind: str) -> tuple[dict[str, Tensor], list[TensorSpec]]:
    ours = ours_of(random_model(kind))
    specs = families.tensors(ours.config)
    return {name: p.detach()[: p.spec.shape[0]].clone() for name, p in ours.sharded_parameters().items()}, specs


def test_tensors_are_told_exact_rounded_or_different() -> None:
    source, specs = weights_of("llama")
    same = prove(InMemory(dict(source)), InMemory(source), specs)
    assert (same.exact, same.rounded, same.differing, same.unexpected) == (len(specs), 0, (), ())
    assert same.bytes == sum(tensor.numel() * 4 for tensor in source.values())
    assert same.is_equal
    half = {name: tensor.bfloat16() for name, tensor in source.items()}
    rounded = prove(InMemory(half), InMemory(source), specs)
    assert (rounded.exact, rounded.rounded, rounded.dtypes) == (0, len(specs), ("bfloat16",))
    assert rounded.is_equal
    assert prove(InMemory(source), InMemory(half), specs).differing  # what rounding has taken does not come back
    name = "model.layers.1.self_attn.o_proj.weight"
    altered = source[name].clone()
    altered[3, 4] = torch.nextafter(altered[3, 4], torch.tensor(9.0))  # the last bit of one number
    other = prove(InMemory({**source, name: altered, "model.bias": torch.zeros(1)}), InMemory(source), specs)
    assert (other.differing, other.unexpected, other.is_equal) == ((name,), ("model.bias",), False)
    with pytest.raises(ValueError, match=r"memory: lacks model\.norm\.weight"):
        prove(InMemory({n: t for n, t in source.items() if n != "model.norm.weight"}), InMemory(source), specs)
    with pytest.raises(ValueError, match=r"memory: lm_head\.weight has shape"):
        prove(InMemory({**source, LOGITS + ".weight": torch.zeros(1, 1)}), InMemory(source), specs)

"""The gate that verify and export share: our model against transformers', and a verdict.

Three questions, all of which must be answered with yes:

1. Are the tensors the same? Every tensor of the model is there, with its shape, and bit for bit the source's
   (`parity.tensors`). This finds what moves the logits by less than rounding does.
2. Is the model built as config.json says? Every field is compared.
3. Does it compute the same? Logits, loss and every hidden state, on real text and on probes (`parity.probes`), our model on
   the ranks that training has. This finds what is wrong although the weights are right.

A gate that fails names the first module whose output differs, and what may have happened to it.
"""

import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from megatron_core_impl.checkpoint.foreign import Rearranged, invert
from megatron_core_impl.checkpoint.grown import Grown
from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.checkpoint.source import WeightsSource
from megatron_core_impl.config import Layout, ModelConfig, NewRows
from megatron_core_impl.data.gpt_dataset import GPTDataset
from megatron_core_impl.data.indexed_dataset import IndexedDataset
from megatron_core_impl.data.streams import TEXT
from megatron_core_impl.json_files import read_json
from megatron_core_impl.models import families
from megatron_core_impl.models.tensors import EMBEDDING, HEAD
from megatron_core_impl.parity import expected, tensors
from megatron_core_impl.parity.explain import explain, explain_tensors, module_of
from megatron_core_impl.parity.figures import Comparison, Part, Reference, compared
from megatron_core_impl.parity.probes import DATA, Batch, Progress, probes
from megatron_core_impl.parity.record import Oracle, measure, record
from stages.both_models import Precision, oracle_of
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts import vocabulary, words
from stages.contracts.config import VerifySettings
from stages.contracts.figures import percent, tolerance
from stages.contracts.specs import refused_of
from stages.gate_ranks import run_ours
from stages.gate_report import card_of, describe_failure, format_table, report_of, write_json
from stages.gate_rules import Evidence, Gate, first_difference, is_passed, judge
from stages.outcomes import BadInput, GateFailed

SEED = 1234  # of the order of samples


@dataclass(frozen=True)
class Verdict:
    """A comparison that passed, and the gates it passed."""

    evidence: Evidence
    gates: tuple[Gate, ...]
    settings: VerifySettings
    report: dict[str, Any]  # JSON values

    def write(self, report: Path, title: str) -> None:
        """Write the report as JSON, and beside it the card, of this title, as Markdown."""
        write_json(report, self.report)
        report.with_suffix(".md").write_text(card_of(title, self.evidence, self.report, self.settings))

    @property
    def comparison(self) -> Comparison:
        """That of the data."""
        return self.evidence.data

    @property
    def figure(self) -> str:
        """The line that a person reads."""
        mean, layout = self.gates[0], self.evidence.layout
        agreement = percent(self.comparison.argmax_agreement)
        axes = [f" · {axis} {size}" for axis in ("tp", "pp", "vpp") if (size := getattr(layout, axis)) > 1]
        return f"mean |Δlogit| {mean.value:.1e} · argmax {agreement} · gate {tolerance(mean.allowed)}{''.join(axes)}"

    @property
    def metrics(self) -> dict[str, Any]:
        """Figures for reports: everything but the modules."""
        return {key: value for key, value in self.report.items() if key not in ("modules", "first_difference", "hint")}

    @property
    def passed(self) -> bool:
        return is_passed(self.evidence, self.gates)


def check_model(ours: a.ModelFacts, source: a.ModelFacts, *, also: tuple[str, ...] = (), has_grown: bool = True) -> None:
    """Refuse weights that are not of this model's shape.

    Args:
        also: further facts that must be the same.
        has_grown: the weights may have further rows, for added tokens.

    Raises:
        BadInput: naming the field and both values.
    """
    for field in ("family", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "head_dim", "norm", "is_gated", "qkv_bias", "o_bias", "mlp_bias", "is_parallel",
                  "has_shared_norm", "tie_word_embeddings", *also):  # fmt: skip
        mine, other = getattr(ours, field), getattr(source, field)
        if mine != other and not (has_grown and field == "vocab_size" and mine > other):
            name = families.FAMILIES[source.family].hf_fields.get(field, field)  # as config.json says it
            raise BadInput(
                f"inputs: {name}={mine} of the weights is not {name}={other} of the model: they do not belong together; "
                "take weights that were converted from this model"
            )


def check_tokenizer(dataset: a.DatasetArtifact, model: a.ModelFacts) -> None:
    """Refuse data with token ids that the model has no embedding for, or for other tokens.

    Raises:
        BadInput: naming the fields and both values.
    """
    if dataset.tokenizer.vocab_size > model.vocab_size:
        raise BadInput(
            f"inputs.dataset: tokenizer.vocab_size={dataset.tokenizer.vocab_size} of the data exceeds "
            f"vocab_size={model.vocab_size} of the model, which has no embedding for the ids above. "
            "Preprocess with the tokenizer that belongs to this model"
        )
    if told := vocabulary.difference(dataset, model):
        raise BadInput(f"inputs.dataset: {told}")


def check_gate(
    ctx: Context,
    settings: VerifySettings,
    *,
    model: a.ModelFacts,
    weights: Path,
    layout: Layout,
    reference: Path,
    dataset: a.DatasetArtifact,
    data: Path,
) -> Verdict:
    """Compare our model, from a folder of weights, with transformers', from a Hugging Face folder, and judge.

    Args:
        model: what our model is built from.
        weights: folder of weights in any form.
        layout: the ranks that our model runs on.
        reference: folder that transformers loads.
        dataset: the data whose tokens both models see.
        data: folder of the dataset.

    Raises:
        BadInput: the data or the weights do not fit the model.
        GateFailed: the models differ by more than the settings allow. The table of differences is in the log, the whole
            report in a file beside the stage's results.
    """
    check_tokenizer(dataset, model)
    config = ModelConfig(**model.config_fields())
    described = families.config_from_hf(read_json(reference / "config.json"))
    batches = _read_batches(settings, config, dataset, data)
    first_added = min(model.added_tokens.values(), default=model.vocab_size)
    batches += probes(torch.cat([batch.tokens.flatten() for batch in batches]), config, first_added=first_added)
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers switch TF32 on, which is no fp32
    new_rows = model.new_rows or "mean"
    try:
        ours, source = open_weights(weights), _source(reference, described, config.vocab_size, new_rows)
        proof = tensors.prove(
            ours, source, families.tensors(config), lambda done, total: ctx.progress(done, total, "comparing tensors")
        )
    except ValueError as error:
        raise BadInput(str(error)) from error  # it names the folder
    with _room(ctx, config, batches) as folder:
        rounded_to: torch.dtype | None = getattr(torch, model.dtype) if proof.rounded else None
        load = partial(
            oracle_of, reference, parameters=model.parameters, vocab_size=model.vocab_size, new_rows=new_rows,
            rounded_to=rounded_to,
        )  # fmt: skip
        references, rounding = _run_transformers(ctx, settings.precision, load, batches, Path(folder))
        parts = run_ours(ctx, config, weights, layout, settings.precision, batches=batches, folder=Path(folder))
    evidence = Evidence(
        layout=layout,
        proof=proof,
        config_differences=config_differences(config, described),
        comparisons=_compared(config, batches, references, parts),
        rounding=None if rounding is None else _compared(config, batches, references, rounding),
    )
    gates = judge(evidence, settings)
    report = report_of(evidence, gates, settings, _hint(evidence, gates, config, ours, source))
    verdict = Verdict(evidence, gates, settings, report)
    if verdict.passed:
        return verdict
    failure = refused_of(ctx.spec.folder)  # the scratch folder does not survive a failure
    ctx.log(format_table(evidence.accused(gates)))
    ctx.log("\n".join(f"{'passed' if gate.passed else 'FAILED'}  {gate}" for gate in gates))
    verdict.write(failure, f"{ctx.spec.NODE}: our model and transformers'")
    message = [describe_failure(evidence, gates, settings.precision)]
    message += [cause for cause in (report["hint"], *evidence.config_differences) if cause]
    raise GateFailed("\n       ".join([*message, f"Report: the table in the log, and {failure}"]))


# ── What is compared ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read_batches(settings: VerifySettings, model: ModelConfig, dataset: a.DatasetArtifact, data: Path) -> list[Batch]:
    """Real tokens: the first samples of the first set in an order of their own, always the same ones."""
    length = settings.sequence_length
    if length > model.max_position_embeddings:
        raise BadInput(
            f"verify.sequence_length={length} exceeds max_position_embeddings={model.max_position_embeddings} of the model; "
            f"set it to {model.max_position_embeddings} or less"
        )
    try:
        name = dataset.sets[0].name
        tokens = IndexedDataset(data / (name if dataset.content == "text" else f"{name}{TEXT}"))
        count = settings.batches * settings.batch_size
        samples = GPTDataset(tokens, range(len(tokens)), sequence_length=length, num_samples=count, seed=SEED)
    except ValueError as error:
        raise BadInput(f"inputs.dataset: {error} (verify.sequence_length={length})") from error
    batches = []
    for first in range(0, count, settings.batch_size):
        batch = torch.stack([torch.from_numpy(samples[k]) for k in range(first, first + settings.batch_size)])  # [B, S + 1]
        if int(batch.max()) >= model.vocab_size:
            raise BadInput(f"inputs.dataset: holds token id {int(batch.max())}, but vocab_size={model.vocab_size} of the model")
        batches.append(Batch.of(DATA, batch))
    return batches


def _source(folder: Path, described: ModelConfig, vocab_size: int, new_rows: NewRows) -> WeightsSource:
    """The canonical tensors of a Hugging Face folder, with rows for added tokens, as convert makes them."""
    files = open_weights(folder, allow_pickle=True)  # where pickles are not wanted, download has left them out
    canonical = Rearranged(files, invert(families.family_of(described).hf_tensors(described)))
    return Grown(canonical, (EMBEDDING, HEAD), vocab_size, new_rows) if vocab_size > described.vocab_size else canonical


def config_differences(ours: ModelConfig, described: ModelConfig) -> tuple[str, ...]:
    """The fields in which our model is built otherwise than config.json says, one sentence each."""
    in_file = families.family_of(described).hf_fields
    return tuple(
        f"Our model is built with {in_file.get(field, field)}={value}, config.json says {getattr(described, field)}."
        for field, value in vars(ours).items()
        if getattr(described, field) != value and not (field == "vocab_size" and value > described.vocab_size)
    )


# ── The two models, one after the other ─────────────────────────────────────────────────────────────────────────────────────


def _room(ctx: Context, config: ModelConfig, batches: Sequence[Batch]) -> "TemporaryDirectory[str]":
    """A folder for the activations.

    Raises:
        BadInput: there is not enough space.
    """
    size = expected.count_bytes(config, sum(batch.num_compared for batch in batches))
    if (free := shutil.disk_usage(ctx.scratch).free) < size:
        raise BadInput(
            f"the activations to compare take {words.size(size)}, and {ctx.scratch.parent} has {words.size(free)} free: "
            "make room, or lower verify.batches, verify.batch_size or verify.sequence_length"
        )
    return TemporaryDirectory(dir=ctx.scratch, prefix="activations-")


def _run_transformers(
    ctx: Context, precision: Precision, load: Callable[[Precision], Oracle], batches: Sequence[Batch], folder: Path
) -> tuple[list[Reference], list[Part] | None]:
    """Write down what transformers computes in fp32; and, where ours computes in bf16, how far bf16 takes itself from that."""
    store = expected.Expected(folder)

    def telling(name: Precision) -> Progress:
        ctx.log(f"loading transformers' model in {name}")
        return lambda number, batch: ctx.progress(number, len(batches), f"transformers in {name}: {batch.name}")

    references = record(load("fp32"), batches, store, telling("fp32"))
    _free()
    if precision == "fp32":
        return references, None
    rounding = measure(load(precision), batches, store, telling(precision))
    _free()
    return references, rounding


def _free() -> None:
    """Give back what a model that has gone took: two of 7B do not fit everywhere."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _compared(
    config: ModelConfig, batches: Sequence[Batch], references: Sequence[Reference], parts: Sequence[Part]
) -> tuple[Comparison, ...]:
    """A comparison for the data, and one for each probe."""
    return tuple(
        compared(name, config.num_hidden_layers, {k: references[k] for k, b in enumerate(batches) if b.name == name}, parts)
        for name in dict.fromkeys(batch.name for batch in batches)
    )


def _hint(
    evidence: Evidence, gates: tuple[Gate, ...], config: ModelConfig, ours: WeightsSource, source: WeightsSource
) -> str | None:
    """What may have happened."""
    if is_passed(evidence, gates):
        return None
    specs = families.tensors(config)
    first = first_difference(evidence, evidence.accused(gates))
    if first is not None:
        return explain(first, ours, source, specs, "transformers")
    if not evidence.proof.differing:
        return None
    module = module_of(evidence.proof.differing[0])
    return explain_tensors(
        [name for name in evidence.proof.differing if module_of(name) == module], ours, source, specs, "transformers"
    )

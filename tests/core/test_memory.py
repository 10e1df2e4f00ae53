"""The estimate of memory against what a step allocates here: every storage that operations make is counted while it lives."""

import subprocess
import sys
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from activations import MODES, NONE, Storages, mode_name
from distributed import GlooPool

from megatron_core_impl import memory
from megatron_core_impl.config import Dropout, Layout, ModelConfig, Recompute
from megatron_core_impl.layers import blocks, cross_entropy
from megatron_core_impl.memory import MemoryEstimate, Precision, estimate
from megatron_core_impl.mesh import init_mesh
from megatron_core_impl.models.tensors import count_parameters
from megatron_core_impl.models.transformer import MicroBatch, Transformer
from megatron_core_impl.optim import OptimizerSettings
from megatron_core_impl.parallel.pipeline import Pipeline
from megatron_core_impl.parallel.zero import ZeroOptimizer

DTYPES: dict[Precision, torch.dtype] = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
}  # fmt: skip
# Large enough that activations outweigh the odd numbers that the estimate leaves out.
LLAMA = ModelConfig(
    family="llama", vocab_size=500, hidden_size=64, intermediate_size=176, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
)  # fmt: skip
FALCON = replace(
    LLAMA, intermediate_size=256, num_key_value_heads=1, norm="layernorm", activation="gelu", is_gated=False,
    is_parallel=True, has_shared_norm=True, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_7B = ModelConfig(
    family="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, max_position_embeddings=4096,
)  # fmt: skip


class Case(NamedTuple):
    config: ModelConfig
    layout: Layout = Layout()
    precision: Precision = "fp32"
    recompute: Recompute = NONE
    dropout: Dropout | None = None
    num_microbatches: int = 2
    optimizer: OptimizerSettings = OptimizerSettings()
    batch_size: int = 4
    length: int = 64


class Measured(NamedTuple):
    state: int  # bytes after the model and its optimizer were made
    peak: int  # the most in a step that follows


def measure(case: Case) -> Measured:
    """On this rank of the case's layout."""
    mesh = init_mesh(case.layout, "cpu", kv_replicas=case.layout.kv_replicas(case.config))
    shape = (case.num_microbatches, case.batch_size, case.length)
    with Storages() as storages:
        model = Transformer(case.config, mesh, dtype=DTYPES[case.precision], dropout=case.dropout, recompute=case.recompute)
        for parameter in model.parameters():
            parameter.data.fill_(0.01)
        optimizer = ZeroOptimizer(model, mesh, case.optimizer)
        pipeline = Pipeline(model)
        state = storages.alive
        tokens, labels = torch.randint(case.config.vocab_size, shape), torch.randint(case.config.vocab_size, shape)
        batches = [MicroBatch(*parts) for parts in zip(tokens, labels, torch.full(shape, 0.01), strict=True)]
        storages.peak = 0
        optimizer.begin_step(len(batches))
        pipeline.forward_backward(batches, scale=1.0)
        optimizer.step(1e-3)
    return Measured(state, storages.peak)


def estimated(case: Case, **changes: Any) -> MemoryEstimate:
    arguments: dict[str, Any] = {
        "precision": case.precision, "micro_batch_size": case.batch_size, "sequence_length": case.length,
        "num_microbatches": case.num_microbatches, "optimizer": case.optimizer, "recompute": case.recompute,
        "dropout": case.dropout, "device": "cpu",
    }  # fmt: skip
    return estimate(case.config, case.layout, **(arguments | changes))


def check(got: MemoryEstimate, want: Measured) -> None:
    assert got.state == pytest.approx(want.state, rel=0.001), "the optimizer has a counter for each parameter besides"
    assert got.total == pytest.approx(want.peak, rel=0.1), "what the issue asks for"
    assert got.total - got.state == pytest.approx(want.peak - want.state, rel=0.02), "activations and the like alone"


@pytest.mark.parametrize("recompute", [NONE, *MODES], ids=mode_name)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", [LLAMA, FALCON], ids=["llama", "falcon"])
def test_the_estimate_is_what_a_step_allocates(config: ModelConfig, precision: Precision, recompute: Recompute) -> None:
    case = Case(config, precision=precision, recompute=recompute)
    check(estimated(case), measure(case))


SCORES = Dropout(hidden=0.1, attention=0.1)
CASES = {
    "dropout": Case(LLAMA, dropout=Dropout(hidden=0.1)),
    "lima": Case(LLAMA, dropout=Dropout(hidden=0.1, lima=True), recompute=MODES[1]),
    "two-norms": Case(replace(FALCON, has_shared_norm=False), dropout=Dropout(hidden=0.1)),
    "relu": Case(replace(LLAMA, activation="relu", is_gated=False), recompute=MODES[0]),
    "fp64": Case(LLAMA, precision="fp64"),
    "fp16": Case(LLAMA, precision="fp16"),
    "momentum": Case(LLAMA, optimizer=OptimizerSettings(kind="sgd")),
    "sgd": Case(LLAMA, optimizer=OptimizerSettings(kind="sgd", momentum=0)),
    "large-vocabulary": Case(replace(LLAMA, vocab_size=4000, num_hidden_layers=2), precision="bf16"),
    "wide": Case(replace(FALCON, intermediate_size=1024, num_hidden_layers=2), precision="bf16", recompute=MODES[0]),
    "full-wide": Case(replace(FALCON, intermediate_size=2048, num_hidden_layers=1), precision="bf16", recompute=MODES[1]),
    "few-layers": Case(replace(LLAMA, num_hidden_layers=1), recompute=MODES[1], num_microbatches=16),
    "one-micro-batch": Case(FALCON, num_microbatches=1),
    "attention-dropout": Case(LLAMA, dropout=SCORES, length=128, batch_size=2),
    "attention-dropout-bf16": Case(FALCON, dropout=SCORES, length=128, batch_size=2, precision="bf16"),
    "attention-dropout-full": Case(LLAMA, dropout=SCORES, precision="fp16", recompute=MODES[1]),
    "attention-dropout-parallel": Case(FALCON, dropout=SCORES, recompute=MODES[1]),
    "window": Case(replace(LLAMA, sliding_window=16), length=1024, batch_size=1),
    "window-bf16": Case(replace(LLAMA, sliding_window=16, num_hidden_layers=2), length=1100, batch_size=1, precision="bf16"),
    "window-dropout": Case(replace(LLAMA, sliding_window=16, num_hidden_layers=2), length=700, batch_size=1, dropout=SCORES),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_other_configurations(case: Case) -> None:
    check(estimated(case), measure(case))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_of_several_blocks(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 40 * 4000)  # of 256 tokens
    for module in (cross_entropy, memory):
        monkeypatch.setattr(module, "CACHED", 10 * 4000)
    case = Case(replace(LLAMA, vocab_size=4000, num_hidden_layers=1), precision=precision)
    check(estimated(case), measure(case))


def test_a_large_vocabulary_is_cut_into_blocks() -> None:
    """As the layers cut it: 13 million logits more than a block."""
    case = Case(replace(LLAMA, vocab_size=45000, num_hidden_layers=1, hidden_size=8), length=256, num_microbatches=1)
    assert case.batch_size * case.length * case.config.vocab_size > blocks.BLOCK
    check(estimated(case), measure(case))


LAYOUTS = {
    "tp": Case(LLAMA, Layout(tp=2)),
    "pp": Case(replace(LLAMA, tie_word_embeddings=True), Layout(pp=2), num_microbatches=4, precision="bf16"),
    "interleaved": Case(LLAMA, Layout(pp=2, vpp=2), num_microbatches=4, recompute=MODES[0]),
    "kv-replicas": Case(LLAMA, Layout(tp=4), precision="bf16"),
    "dp": Case(replace(LLAMA, hidden_size=65), Layout(dp=2), precision="bf16"),  # rows that do not come out even
}


@pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS)
def test_every_rank(pool: GlooPool, case: Case) -> None:
    ranks = range(case.layout.world_size)
    each = [estimated(case, rank=rank) for rank in ranks]
    for rank, want in enumerate(pool.run(measure, len(ranks), case)):
        check(each[rank], want)
    assert estimated(case) == max(each, key=lambda one: one.total)


def of_7b(layout: Layout, **changes: Any) -> MemoryEstimate:
    arguments: dict[str, Any] = {"precision": "bf16", "micro_batch_size": 1, "sequence_length": 4096, "num_microbatches": 16}
    return estimate(LLAMA_7B, layout, **(arguments | changes))


def test_bytes_per_parameter() -> None:
    """The reference's 18 bytes a number, 121 GB for 7B, and 6 + 12/dp of them where the state is shared out."""
    assert of_7b(Layout()).state == 18 * count_parameters(LLAMA_7B) == 121_291_481_088
    assert of_7b(Layout(dp=8)).state == 7.5 * count_parameters(LLAMA_7B)
    one = of_7b(Layout(dp=4))
    parts = (one.weights, one.main_gradients, one.masters, one.moments)
    assert parts == tuple(share * count_parameters(LLAMA_7B) for share in (2, 4, 1, 2))
    assert of_7b(Layout(), precision="fp32").state == 16 * count_parameters(LLAMA_7B)
    assert sum(of_7b(Layout(tp=2, pp=2, dp=2), rank=rank).weights for rank in range(8)) == pytest.approx(
        2 * 2 * count_parameters(LLAMA_7B), rel=0.001
    ), "replicas aside, and what every tp rank holds, the ranks share the model out"


def test_activations_by_hand() -> None:
    """Bytes per token of a layer of 7B in bf16 (hidden 4096, ffn 11008), with FlashAttention: what each mode keeps."""
    hidden, ffn, heads, tokens = 2 * 4096, 2 * 11008, 32, 4096
    rest = 2 * 4 + 4 * heads  # statistics of norms and of attention, in fp32
    kept = {"none": 8 * hidden + 3 * ffn + rest, "selective": 6 * hidden + 2 * ffn + rest, "full": hidden}
    angles = 2 * 4096 * 64 * 2
    for mode, size in kept.items():
        got = estimate(
            replace(LLAMA_7B, num_hidden_layers=320), Layout(pp=10), precision="bf16", micro_batch_size=1, sequence_length=4096,
            num_microbatches=16, recompute=Recompute(mode=mode), rank=9,
        )  # fmt: skip
        again = kept["none"] - hidden if mode == "full" and got.working else 0
        assert got.activations == tokens * (32 * size + again) + angles


@pytest.mark.parametrize(("precision", "measured"), [("fp32", 404_042_240), ("bf16", 280_138_752)])
def test_what_a_gpu_took(precision: Precision, measured: int) -> None:
    """The model of configs/demo.yaml on an H100, with PyTorch 2.11; cuBLAS has two work spaces of 32 MiB there."""
    demo = replace(
        LLAMA, vocab_size=4096, hidden_size=256, intermediate_size=704, num_key_value_heads=4, head_dim=32,
        max_position_embeddings=1024,
    )  # fmt: skip
    got = estimate(demo, Layout(), precision=precision, micro_batch_size=8, sequence_length=256, num_microbatches=1)
    assert got.total == pytest.approx(measured - 2 * 2**25, rel=0.02)


def test_masks_of_dropout_take_a_byte_a_number() -> None:
    plain, dropout, lima = (
        of_7b(Layout(), dropout=dropout).activations for dropout in (None, Dropout(hidden=0.1), Dropout(hidden=0.1, lima=True))
    )
    assert dropout - plain == 4096 * 4096 * (1 + 2 * 32), "of the embeddings, and two in each layer"
    assert lima - plain == 4096 * 4096 * 2 * 31


@pytest.mark.parametrize("rank", range(4))
def test_micro_batches_in_flight_follow_the_schedule(rank: int) -> None:
    assert of_7b(Layout(pp=4), rank=rank).in_flight == 4 - rank
    assert of_7b(Layout(pp=4), rank=rank, num_microbatches=2).in_flight == min(2, 4 - rank)


def test_less_is_kept_the_more_is_recomputed() -> None:
    none, selective, full, pairs = (of_7b(Layout(pp=4), recompute=mode) for mode in (NONE, *MODES))
    assert none.total > selective.total > pairs.total > full.total
    assert none.state == full.state
    cut = of_7b(Layout(pp=4, tp=4))
    assert cut.activations == pytest.approx(none.activations / 4, rel=0.01)


def test_heads_that_do_not_come_out_even_count_where_they_are() -> None:
    falcon = replace(FALCON, num_attention_heads=71, num_key_value_heads=1, intermediate_size=1024)
    arguments: dict[str, Any] = {"precision": "bf16", "micro_batch_size": 1, "sequence_length": 64, "num_microbatches": 1}
    first, second = (estimate(falcon, Layout(tp=2), rank=rank, **arguments) for rank in range(2))
    assert first.weights - second.weights == 2 * 4 * 2 * 8 * 64, "a head of q_proj and o_proj in each of four layers"
    assert estimate(falcon, Layout(tp=2), **arguments) == first


def test_lines_tell_every_term() -> None:
    one = of_7b(Layout(tp=2))
    lines = one.lines()
    assert [line.split("  ")[0] for line in lines] == [
        "weights", "main gradients", "masters", "moments", "activations", "loss", "working", "buffers", "total",
    ]  # fmt: skip
    sizes = [float(line.split()[-2].replace(",", "")) for line in lines]
    assert sum(sizes[:-1]) == pytest.approx(sizes[-1], abs=0.5)
    assert sizes[-1] == pytest.approx(one.total / 2**20, abs=0.1)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tp=3 cannot share out .* Legal here: 1, 2, 4, 8, 16, 32"):
        of_7b(Layout(tp=3))
    with pytest.raises(ValueError, match=r"num_microbatches=3 is not a multiple of pp=2"):
        of_7b(Layout(pp=2, vpp=2), num_microbatches=3)


def test_no_torch_is_needed() -> None:
    subprocess.run(
        [sys.executable, "-c", "import sys, megatron_core_impl.memory; sys.exit('torch' in sys.modules)"], check=True
    )

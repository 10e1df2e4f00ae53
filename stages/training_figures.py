"""The figures of a training that is over, from the lines it wrote on its way and the state of its last checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_core_impl import metrics


def figures_of(lines: Sequence[Mapping[str, Any]], state: Mapping[str, Any], last: int) -> dict[str, Any]:
    """Losses, perplexities, accuracies, speed and curves, as JSON values.

    Args:
        lines: of metrics.jsonl.
        state: of the last checkpoint.
        last: its step.
    """
    trained = [line for line in lines if "loss" in line]
    seconds = sum(line["seconds"] for line in trained)
    waited = sum(line["data_wait_share"] * line["seconds"] for line in trained)
    test = state["loss_test"]
    return {
        "train_loss": trained[-1]["loss"],
        "tokens_per_second": round(sum(line["tokens_read"] for line in trained) / seconds, 1) if seconds else None,
        "training_seconds": round(seconds, 1),
        "evaluation_seconds": round(sum(line.get("eval_seconds", 0.0) for line in lines), 3),
        "data_wait_share": round(waited / seconds, 5) if seconds else None,
        "skipped_steps": state["skipped_steps"],
        "perplexity_before": metrics.perplexity(state["loss_before"]),
        "perplexity_after": metrics.perplexity(state["loss_after"]),
        "loss_test": test,
        "perplexity_test": None if test is None else metrics.perplexity(test),
        **_accuracies(lines, last),
        "loss_curve": metrics.downsample([(line["step"], line["loss"]) for line in trained]),
        "valid_curve": metrics.downsample([(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line]),
    }


def _accuracies(lines: Sequence[Mapping[str, Any]], last: int) -> dict[str, float]:
    """Of all tokens that count, and where there are some of those of answers: before and after training, and on the test."""
    figures = {}
    for when, step, split in (("before", 0, "valid"), ("after", last, "valid"), ("test", last, "test")):
        line = next((line for line in lines if line["step"] == step and f"{split}_loss" in line), {})
        for name in ("accuracy", "instruct_accuracy"):
            if (value := line.get(f"{split}_{name}")) is not None:
                figures[f"{name}_{when}"] = round(value, 5)
    return figures

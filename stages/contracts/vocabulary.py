"""Whether data and weights mean the same by the ids of added tokens."""

from collections.abc import Mapping

from stages.contracts import artifacts as a


def difference(dataset: a.DatasetArtifact, model: a.ModelFacts) -> str | None:
    """In which added tokens data and weights differ, in one sentence; None where they do not."""
    of_data, of_weights = dataset.tokenizer.added_tokens, model.added_tokens
    if of_data == of_weights:
        return None
    return (
        f"the data are made with {_listed(of_data)}, the weights with {_listed(of_weights)}: give preprocess and convert the "
        "same added_tokens, in the same order"
    )


def _listed(tokens: Mapping[str, int]) -> str:
    if not tokens:
        return "no added tokens"
    shown = ", ".join(f"{token} = {number}" for token, number in tokens.items())
    return f"the added token{'s' if len(tokens) > 1 else ''} {shown}"

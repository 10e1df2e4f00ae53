"""The front matter of a model card: what the Hub reads to show, find and compare a model.

https://huggingface.co/docs/hub/model-cards says what the fields mean; the Hub's own client writes them.
"""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from stages.contracts import artifacts as a
from stages.contracts.publishing import TAG
from stages.licence import Terms

OTHER = re.compile(r"other \((.+)\)")  # as download records a licence that has a name of its own


def front_matter(title: str, export: a.ExportArtifact, data: a.RawDataArtifact, figures: dict[str, float], terms: Terms) -> str:
    """The lines between the dashes, and these.

    Args:
        figures: of the evaluation after training, by the Hub's name of the metric.
    """
    on_hub = sorted({each.source for each in data.sets if each.revision is not None})
    other = OTHER.fullmatch(export.license or "")
    licenses: Any = (export.license or "").split(", ")
    link = next((name for name in terms.files if name.upper().startswith("LICEN")), None)
    card = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license="other" if other else licenses if len(licenses) > 1 else licenses[0] or None,
        license_name=other[1] if other else None,
        license_link=link if other else None,
        # Only a name on the Hub may stand here.
        base_model=export.source if export.source_revision is not None else None,
        base_model_relation="finetune" if export.source_revision is not None else None,
        datasets=on_hub or None,
        tags=[export.model.family, TAG],
        model_name=title,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=on_hub[0] if len(on_hub) == 1 else "held-out",
                dataset_name=data.source,
                dataset_split="held-out",
                dataset_revision=data.revision,
                metric_type=name,
                metric_value=value,
            )
            for name, value in figures.items()
        ],
    )
    return f"---\n{card.to_yaml()}\n---\n"

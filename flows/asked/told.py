"""What results tell of the configuration they were made with."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from flows.asked.load_config import BadConfig
from stages.contracts import artifacts as a
from stages.contracts.config import ModelSettings
from stages.contracts.data_settings import DataSettings

ANY_LAYOUT = 2**6 * 3**3 * 5 * 7 * 11  # a batch that every usual layout shares out


def told_by(made: Mapping[str, a.Artifact], stage: str) -> dict[str, Any]:
    """Sections of a configuration for one stage, by what is told by results. Of the rest its defaults hold.

    Each fact is taken from the spec of the stage that used it. A download that was reused tells of all that is not in its key
    what its first run had.
    """

    def of(node: str, *names: str) -> dict[str, Any]:
        spec = made[node].spec if node in made else {}
        return {name: spec[name] for name in names if name in spec}

    def section(node: str, name: str = "settings") -> dict[str, Any]:
        return dict(of(node, name).get(name) or {})

    in_key = ModelSettings(source="unknown").decisive()
    model = {name: value for name, value in section("download-model", "model").items() if name in in_key}
    train = {"train": section("train")}
    if not train["train"]:  # where it is what is asked for, the configuration says that it is missing
        train = {} if stage == "train" else {"train": {"steps": 1, "global_batch_size": ANY_LAYOUT}}
    published = section("push") if stage == "push" else {}
    published.pop("folder", None)  # a spec that is kept has no paths of a machine
    return {
        "model": {"source": "unknown"}
        | model
        | of("preprocess", "added_tokens")
        | of("convert", "added_tokens", "new_rows")
        | of("shard", "dtype"),
        "data": _blended(section("download-data", "data"), section("train", "blend")),
        "preprocess": of("convert", "tokenizer") | section("preprocess"),
        "layout": section("train", "layout") | of("shard", "tp", "pp", "vpp"),
        "verify": section("export", "verify") | section("verify"),
        "export": of("merge", "dtype") | of("verify", "override_special_tokens", "megatron_llm") | section("export"),
        "push": published,
        **train,
    }


def refuse_untold_weights(data: DataSettings, made: Mapping[str, a.Artifact], overrides: Sequence[str]) -> None:
    """Refuse to train on several sets whose weights nothing tells: only an earlier training does, not the download.

    Raises:
        BadConfig: naming the weights.
    """
    given = {text.partition("=")[0].strip() for text in overrides}
    untold = [key for place in range(len(data.blend)) if (key := f"data.blend[{place}].weight") not in given]
    if "train" not in made and len(data.blend) > 1 and untold:
        raise BadConfig([f'{key}: the results do not tell it: set it, e.g. overrides=["{key}=1"]' for key in untold])


def _blended(told: Mapping[str, Any], weights: Mapping[str, float]) -> dict[str, Any]:
    """The data, with the weights that a training had."""
    data = dict(told or {"source": "unknown"})
    try:
        sources = DataSettings.model_validate(data).sources()
    except ValidationError:  # of a version with other settings: whoever reads the configuration says so
        return data
    by_key = {named.key: weights.get(named.name, 1.0) for named in sources}
    for part in ("blend", "valid", "test"):
        listed = enumerate(data.get(part, ()))
        data[part] = [{**source, "weight": by_key[f"data.{part}[{place}]"]} for place, source in listed]
    return data

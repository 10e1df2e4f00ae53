"""What is deployed: names, forms, and that `prefect.yaml` says the same."""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from prefect.utilities.callables import parameter_schema
from ruamel.yaml import YAML

from flows.asked.load_config import BadConfig
from flows.runner.deployments import deployments, parameters_of
from stages.contracts.specs import SOURCES

ROOT = Path(__file__).parents[2]


def test_names_and_defaults(tmp_path: Path) -> None:
    usual = {each.full_name: each for each in deployments([], None)}
    assert list(usual)[:2] == ["finetune-llama2/demo", "finetune-llama2/gpu"]
    assert usual["finetune-llama2/demo"].parameters["config"]["launch"]["by"] == "process"
    assert usual["finetune-llama2/gpu"].parameters["config"]["launch"]["by"] == "docker"
    assert set(usual) - {"finetune-llama2/demo", "finetune-llama2/gpu"} == {
        f"stage/{node}" for node in SOURCES if SOURCES[node]
    }

    mine = deployments([ROOT / "configs" / "demo-chat.yaml"], str(tmp_path))
    assert [each.full_name for each in mine if each.flow.name != "stage"] == ["finetune-llama2/demo-chat"]
    assert mine[0].parameters["config"]["workspace"] == str(tmp_path)
    assert {each.parameters["workspace"] for each in mine[1:]} == {str(tmp_path)}
    (tmp_path / "demo-chat.yaml").write_text("model: {source: a/b}\ndata: {source: c/d}\ntrain: {steps: 1}\n")
    with pytest.raises(BadConfig, match="its deployment would be called demo-chat, as another is: rename the file"):
        deployments([ROOT / "configs" / "demo-chat.yaml", tmp_path / "demo-chat.yaml"], None)


def test_a_name_that_prefect_does_not_take() -> None:
    with pytest.raises(
        BadConfig, match=r"^a&b%\.yaml: .* would be called a&b%, and Prefect takes no % & in a name: rename the file$"
    ):
        deployments([Path("a&b%.yaml")], None)


def fields(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything that a person can fill in, or a section of such."""
    yield from schema["properties"].items()
    for name, section in schema["definitions"].items():
        yield from ((f"{name}.{field}", found) for field, found in section["properties"].items())


@pytest.mark.parametrize("each", deployments([], None), ids=lambda each: each.full_name)
def test_the_form_explains_everything(each: Any) -> None:
    schema = parameter_schema(each.flow).model_dump_for_openapi()
    sections = {f"#/definitions/{name}" for name, section in schema["definitions"].items() if section.get("description")}
    explained = [name for name, field in fields(schema) if field.get("description") or field.get("$ref") in sections]
    assert [name for name, _ in fields(schema) if name not in explained] == []
    assert schema["definitions"]["LaunchSettings"]["properties"]["by"]["enum"] == ["auto", "process", "docker"]


def test_prefect_yaml_deploys_the_same() -> None:
    told = YAML(typ="safe").load((ROOT / "prefect.yaml").read_text())["deployments"]
    ours = {each.name: each for each in deployments([], None)}
    assert [each["name"] for each in told] == list(ours)
    for each in told:
        module, _, name = each["entrypoint"].rpartition(".")
        assert getattr(import_module(module), name) is ours[each["name"]].flow
        for step in each.get("build", []):
            [(function, arguments)] = step.items()
            assert function == "flows.runner.deployments.parameters_of"
            made = parameters_of(str(ROOT / arguments["file"]), arguments["overrides"])
            # A relative workspace is there where the worker is; the runner's deployments say where that is.
            made["config"]["workspace"] = str(Path(made["config"]["workspace"]).resolve())
            assert made == ours[each["name"]].parameters

"""The model card: what stands in it, what the Hub reads of it, its picture, and the licence it carries over."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from push_inputs import BASE_MODEL, CURVE, FILES, REPORT, push_inputs, push_spec

from stages import push, runtime
from stages.contracts import artifacts as a
from stages.contracts.specs import PushSpec
from stages.licence import read_terms
from stages.loss_chart import draw_losses
from stages.model_card import Lineage, model_card

LLAMA2 = """iii. You must retain in all copies of the Llama Materials that you
distribute the following attribution notice within a "Notice" text file distributed as a
part of such copies: "Llama 2 is licensed under the LLAMA 2 Community License,
Copyright (c) Meta Platforms, Inc. All Rights Reserved."
"""
LLAMA3 = """… and (B) prominently display “Built with Meta Llama 3” on a related website, user interface. If you use the
Llama Materials to create an AI model, which is distributed or made available, you shall also include “Llama 3” at the beginning
of any such AI model name. iii. You must retain the following attribution notice within a “Notice” text file distributed as a
part of such copies: “Meta Llama 3 is licensed under the Meta Llama 3 Community License.”
"""


def lineage(workspace: Path, **changes: object) -> Lineage:
    refs = push_inputs(workspace)
    loaded = {name: a.load_artifact(workspace / ref.path) for name, ref in refs.items()}
    return Lineage(**(loaded | {"base_report": REPORT, "export_report": REPORT} | changes))  # type: ignore[arg-type]


def pushed(workspace: Path, files: dict[str, bytes], **settings: Any) -> PushSpec:
    """Push a model of these files, in this process; what a process says is in test_push."""
    spec = push_spec(workspace, push_inputs(workspace / "ws", files), **settings)
    runtime.execute(spec, push.run)
    return spec


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    folder = tmp_path_factory.mktemp("card")
    spec = push_spec(folder, push_inputs(folder / "ws", curve=CURVE), repo="ada/fine")
    runtime.execute(spec, push.run)
    return ModelCard.load(spec.folder / "README.md")


def test_card(card: ModelCard) -> None:
    for line in (
        'model = AutoModelForCausalLM.from_pretrained("ada/fine")',
        "| loss | 8.3200 | 3.1100 | 3.2000 |",
        "| perplexity | 4,105 | 22.42 | 24.53 |",
        "| next token right | 1.00 % | 42.00 % |  |",
        "![Loss while training, on held-out data, and the learning rate](assets/loss.png)",
        "| documents | 2,211, 31.4 MB of text |",
        "| longest document | 1,999 tokens |",
        "| data | Lib | all | 31.4 MB | format `text`, text_column `text` |",
        "| data | all | 2,211 | 9,480,112 | 1,999 | 3 empty |",
        "| 1,024 to 2,047 | 1,211 | ████████████████████ |",
        "| bos_eos | `eos` |",
        "| layout | 2 processes = dp 1 × tp 2 × pp 1 |",
        "| length | 200 steps, 1,638,400 tokens that count in the loss |",
        "| batch | 8 samples of 1,024 tokens |",
        "| lr | `0.0003` |",
        "| hidden_size | `8` |",
        "| base model, the data | 2.2e-07 | 1.0e-06 | 0.0001 | 1.0e-08 | 100 % | 1,024 |",
        "| `model.layers.0` | 1.0e-09 | 3.0e-08 | 2.0e-07 |",
        "| torch | 2.13.0 |",
        "| transformers | 5.3.0 |",
        "| tokenizers | 0.22.1 |",
        "| fingerprint of the base model | `ba5eba5eba5eba5e` |",
        "That of the base model: llama2.",
    ):
        assert line in card.text.splitlines()
    assert "fine-tuned from [meta-llama/Llama-2-7b-hf](https://huggingface.co/meta-llama/Llama-2-7b-hf) at" in card.text
    assert "/home/ada" not in card.content, "no path of this machine"
    assert "log_interval" not in card.text
    assert "workers" not in card.text


def test_what_the_hub_reads(card: ModelCard) -> None:
    data = card.data
    assert (data.license, data.license_name, data.base_model) == ("llama2", None, "meta-llama/Llama-2-7b-hf")
    assert (data.library_name, data.pipeline_tag, data.get("base_model_relation")) == (
        "transformers", "text-generation", "finetune",
    )  # fmt: skip
    assert data.tags == ["llama", "megatron-flows"]
    assert data.get("datasets") is None, "a folder is no dataset of the Hub"
    assert {result.metric_type: result.metric_value for result in data.eval_results or []} == {
        "loss": 3.11, "perplexity": 22.421, "accuracy": 0.42,
    }  # fmt: skip
    assert (data.model_name, {result.dataset_name for result in data.eval_results or []}) == ("fine", {"Lib"})


def test_a_local_base_model_is_told_by_its_fingerprint(tmp_path: Path) -> None:
    """Its folder's name alone says nothing of what lay in it."""
    made = lineage(tmp_path)
    export = made.export.model_copy(update={"source": "llama", "source_revision": None})
    card = ModelCard(model_card(replace(made, export=export), "ada/fine"))
    assert f"fine-tuned from llama (a local model, fingerprint `{BASE_MODEL[:16]}`) on Lib" in card.text
    assert card.data.base_model is None


def test_a_library_that_changed_on_the_way_is_told_twice(tmp_path: Path) -> None:
    made = lineage(tmp_path)
    versions = made.dataset.versions.model_copy(update={"libraries": {"tokenizers": "0.21.0", "sentencepiece": "0.2.1"}})
    lines = model_card(replace(made, dataset=made.dataset.model_copy(update={"versions": versions})), "ada/fine").splitlines()
    assert "| tokenizers | 0.21.0, 0.22.1 |" in lines
    assert "| sentencepiece | 0.2.1 |" in lines


@pytest.mark.parametrize(("image", "is_told"), [("me/mine@sha256:12", True), ("sha256:12", False), (None, False)])
def test_the_image_is_told_where_others_find_it(tmp_path: Path, image: str | None, is_told: bool) -> None:
    made = lineage(tmp_path)
    trained = made.checkpoint.model_copy(update={"versions": made.checkpoint.versions.model_copy(update={"image": image})})
    assert (f"| container image | `{image}` |" in model_card(replace(made, checkpoint=trained), "ada/fine")) == is_told


@pytest.mark.parametrize(
    ("settings", "called"),
    [
        ({"folder": "{}/hub/my fine"}, "path/to/my fine"),
        ({"folder": "{}/hub/fine/"}, "path/to/fine"),
        ({"folder": "{}/hub", "repo": "ada/fine"}, "ada/fine"),
        ({"folder": "hub/fine/.."}, "path/to/hub"),
    ],
)
def test_a_folder_is_called_by_its_name(tmp_path: Path, settings: dict[str, str], called: str) -> None:
    """Where it lies on this machine is no path that a reader has."""
    spec = pushed(tmp_path, FILES, to="dry-run", **{key: value.format(tmp_path) for key, value in settings.items()})
    card = ModelCard.load(spec.folder / "README.md")
    assert f'AutoModelForCausalLM.from_pretrained("{called}")' in card.text
    assert card.data.model_name == called.rsplit("/", 1)[-1]
    assert str(tmp_path) not in card.content


def test_a_licence_with_a_name_of_its_own_and_data_of_the_hub(tmp_path: Path) -> None:
    made = lineage(tmp_path)
    export = made.export.model_copy(update={"license": "other (tii-falcon)"})
    sets = tuple(each.model_copy(update={"source": "bigcode/julia", "revision": "0" * 40}) for each in made.data.sets)
    data = made.data.model_copy(update={"source": "bigcode/julia", "revision": "0" * 40, "sets": sets})
    terms = read_terms({"LICENSE.txt": Path(__file__)})
    card = ModelCard(
        model_card(Lineage(export, made.checkpoint, made.dataset, data, made.verification, terms=terms), "ada/f", revision="v1")
    )
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "tii-falcon", "LICENSE.txt")
    assert card.data.get("datasets") == ["bigcode/julia"]
    assert 'from_pretrained("ada/f", revision="v1")' in card.text
    assert "As it came with the base model: [LICENSE.txt](LICENSE.txt)." in card.text
    assert "| base model, the data | 2.2e-07 | 1.0e-06 | 0.0001 |" in card.text, "without reports what the artifacts say"


def test_probes_and_topology(tmp_path: Path) -> None:
    report = REPORT | {
        "topology": {"tp": 2, "pp": 1}, "tensors": {"tensors": 39, "exact": 39},
        "probes": [{"probe": "long positions", "mean_error": 3e-7, "argmax_agreement": 1.0, "tokens": 96}],
        "gates": [
            *({**gate, "probe": None} for gate in REPORT["gates"]),
            {"name": "mean |Δlogit|", "value": 3e-7, "allowed": 2e-4, "passed": True, "probe": "long positions"},
        ],
    }  # fmt: skip
    lines = model_card(lineage(tmp_path, base_report=report), "ada/fine").splitlines()
    assert "| base model, the data | 2.2e-07 | 1.0e-06 | 0.0001 | 1.0e-08 | 100 % | 1,024 |" in lines
    assert "| base model, long positions | 3.0e-07 |  | 0.0002 |  | 100 % | 96 |" in lines
    assert (
        "Base model: in fp32, on the ranks of tp 2 · pp 1, 39 tensors, all of them the source's bit for bit. "
        "This model: in fp32."
    ) in lines


def test_what_was_asked_of_the_weights_and_the_tokenizer(tmp_path: Path) -> None:
    report = REPORT | {"tensors": {"tensors": 39, "exact": 0, "rounded": 39, "dtypes": ["bfloat16"]}}
    made = lineage(tmp_path, base_report=report)
    export = made.export.model_copy(update={"spec": {"settings": {"override_special_tokens": {"eos": "<|im_end|>"}}}})
    card = model_card(replace(made, export=export), "ada/fine")
    assert "Base model: in fp32, 39 tensors, all of them the source's rounded to bfloat16, as asked." in card
    assert "| other special tokens | eos = `<\\|im_end\\|>` |" in card.splitlines()
    mixed = REPORT | {"tensors": {"tensors": 39, "exact": 1, "rounded": 38, "dtypes": ["bfloat16"]}}
    told = "39 tensors, 1 of them the source's bit for bit, 38 the source's rounded to bfloat16, as asked."
    assert told in model_card(replace(made, base_report=mixed), "ada/fine")


def test_picture(tmp_path: Path) -> None:
    """Deterministic, small, and with something on it in each colour."""
    first, second = tmp_path / "a/loss.png", tmp_path / "b.png"
    assert draw_losses(CURVE, first)
    assert draw_losses([*CURVE[:50], {"step": 50, "loss": None, "lr": 1e-4}, *CURVE[50:]], second), "a gap is no fault"
    content = first.read_bytes()
    assert draw_losses(CURVE, first)
    assert first.read_bytes() == content
    assert len(content) < 150_000
    image = Image.open(io.BytesIO(content))
    assert image.size == (960, 552)
    counts = {color: count for count, color in image.convert("RGB").getcolors(1 << 20) or []}
    assert all(counts.get(color, 0) > 100 for color in ((0x7B, 0xA6, 0xD0), (0xD9, 0x54, 0x1E), (0x72, 0x77, 0x8A)))


def test_picture_of_a_short_training(tmp_path: Path) -> None:
    """Of 4 steps, told every 10, with held-out losses at 0, 2 and 4; and of steps without them."""
    held_out = [{"step": step, "valid_loss": 6 - step / 4} for step in (0, 2, 4)]
    trained = [{"step": step, "loss": 5.0, "lr": 1e-3} for step in (1, 2)]
    cases = {"held-out": held_out, "one step": [*held_out, trained[1]], "no held-out": trained}
    colours = {"held-out": (0xD9, 0x54, 0x1E), "one step": (0x7B, 0xA6, 0xD0), "no held-out": (0x7B, 0xA6, 0xD0)}
    for name, lines in cases.items():
        assert draw_losses(lines, tmp_path / f"{name}.png"), name
        image = Image.open(tmp_path / f"{name}.png").convert("RGB")
        counts = {color: count for count, color in image.getcolors(1 << 20) or []}
        assert counts.get(colours[name], 0) > 10, name


def test_no_picture_of_no_curve(tmp_path: Path) -> None:
    assert not draw_losses([{"step": 0, "valid_loss": 2.0}, {"step": 1, "loss": 2.0, "lr": 1.0}], tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()
    assert "loss.png" not in model_card(lineage(tmp_path / "ws"), "ada/fine")


def test_the_notice_that_llama_2_asks_for(tmp_path: Path) -> None:
    files = FILES | {"LICENSE.txt": LLAMA2.encode(), "USE_POLICY.md": b"Be kind."}
    artifact = a.load_artifact(pushed(tmp_path, files, to="folder", folder=str(tmp_path / "out")).folder)
    assert isinstance(artifact, a.PushArtifact)
    notice = "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
    assert (tmp_path / "out/NOTICE").read_text() == notice + "\n"
    assert (tmp_path / "out/LICENSE.txt").read_text() == LLAMA2
    assert (tmp_path / "out/USE_POLICY.md").read_text() == "Be kind."
    card = (tmp_path / "out/README.md").read_text()
    assert "[LICENSE.txt](LICENSE.txt), [USE_POLICY.md](USE_POLICY.md), [NOTICE](NOTICE)" in card
    assert f"> {notice}" in card
    assert "NOTICE" in artifact.published


def test_a_notice_that_came_is_left_as_it_came(tmp_path: Path) -> None:
    files = FILES | {"LICENSE.txt": LLAMA2.encode(), "Notice": b"of theirs"}
    pushed(tmp_path, files, to="folder", folder=str(tmp_path / "out"))
    assert (tmp_path / "out/Notice").read_text() == "of theirs"
    assert not (tmp_path / "out/NOTICE").exists()


@pytest.mark.parametrize(("repo", "warns"), [("ada/fine", True), ("ada/Llama-3-fine", False)])
def test_what_llama_3_asks_for(tmp_path: Path, repo: str, warns: bool, capsys: pytest.CaptureFixture[str]) -> None:
    spec = pushed(tmp_path, FILES | {"LICENSE": LLAMA3.encode()}, repo=repo)
    told = "warning: LICENSE of the base model asks for “Llama 3” at the beginning of the name of a model made from it"
    assert (told in capsys.readouterr().out) == warns
    card = (spec.folder / "README.md").read_text()
    assert "\n**Built with Meta Llama 3**\n" in card
    assert "> Meta Llama 3 is licensed under the Meta Llama 3 Community License." in card


def test_of_other_licences_nothing_is_invented(tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("Apache License. You must include a readable copy of the attribution notices.")
    terms = read_terms({"LICENSE": tmp_path / "LICENSE", "config.json": tmp_path / "none"})
    assert (terms.files, terms.notice, terms.display, terms.name) == (("LICENSE",), None, None, None)

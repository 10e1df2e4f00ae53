"""What a person reads at the end of a run: did it help, what does it say now, where is it, how to load it."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from flows.records.run_record import RunFolder, RunRecord
from flows.records.story import Story, story_of, told_losses
from stages.contracts.words import plain, shown_path

LONGEST_SAMPLE = 240  # characters of a continuation


def print_summary(record: RunRecord, folder: RunFolder, console: Console) -> None:
    """Losses before and after, samples, the model's folder and the line that loads it, the report."""
    story = story_of(folder, record)
    lines: list[Text] = []
    if (losses := story.losses()) is not None:
        lines += [Text(told_losses(*losses), style="bold"), Text("")]
    if "export" in story.artifacts:
        lines += _samples(story)
        model = shown_path(folder.path / "export" / "model")
        lines += [
            Text("The model:  ").append(model, style="bold"),
            Text(f'Load it:    AutoModelForCausalLM.from_pretrained("{model}")'),
        ]
    if (target := story.published()) is not None:
        is_folder = Path(target).is_absolute()  # no name on the Hub begins with a slash
        lines.append(Text(f"Published:  {plain(shown_path(Path(target)) if is_folder else target)}"))
    if folder.report.exists():
        lines.append(Text(f"Report:     {shown_path(folder.report)}"))
    lines.append(Text(f"Logs:       {shown_path(folder.path / 'logs')}"))
    console.print()
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)


def _samples(story: Story) -> list[Text]:
    lines: list[Text] = []
    for sample in story.samples():
        if sample.wanted is not None:
            continue  # of many questions a few say little; the figure says how many were right
        for word, said, style in (("before", sample.before, "dim"), ("after", sample.after, "")):
            if said is not None:
                text = Text(f"{word:<8} ").append(_one_line(sample.prompt), style="bold")
                lines.append(text.append(_one_line(said), style=style))
        lines.append(Text(""))
    return lines


def _one_line(text: str) -> str:
    shown = plain(text.replace("\n", "\\n").replace("\t", "\\t"))
    return shown if len(shown) <= LONGEST_SAMPLE else shown[:LONGEST_SAMPLE] + "…"

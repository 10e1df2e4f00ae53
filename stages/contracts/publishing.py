"""The folder that stands for the Hub: where a push goes, and what must not be overwritten there."""

from pathlib import Path

from stages.contracts.config import PushSettings

CARD = "README.md"  # the model card
CHART = "assets/loss.png"  # a picture in it
TAG = "megatron-flows"  # among the card's tags: marks a folder as one that push made


def target_folder(settings: PushSettings) -> Path:
    """Where a push to a folder puts the model."""
    return Path(settings.folder or "").expanduser() / (settings.repo or "")


def in_the_way(settings: PushSettings) -> str | None:
    """What is wrong with the target of a push to a folder, in a line that starts with the setting, or None.

    A target may be missing, empty, or a model that push published before.
    """
    if settings.to != "folder":
        return None
    target = target_folder(settings)
    if not target.exists():
        return None
    if not target.is_dir():
        return f"folder: {target} is a file. Name another folder"
    names = sorted(path.name for path in target.iterdir())
    card = target / CARD
    if not names or (card.is_file() and f"\n- {TAG}\n" in card.read_text(errors="replace")):
        return None
    shown = ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")
    return f"folder: {target} holds something else than an earlier push: {shown}. Name another folder, or empty it"

"""Loss scaling for fp16 (https://arxiv.org/abs/1710.03740): gradients that fp16 would round to zero are scaled into its range.

A trainer multiplies the loss by `scale` before the backward pass, and the optimizer divides the gradient by it. Too large a
scale makes gradients infinite: that step is skipped, and `update` is told. No torch in here.
"""

from dataclasses import asdict, dataclass, fields
from typing import Protocol


class LossScale(Protocol):
    """What a trainer needs of a loss scale."""

    @property
    def scale(self) -> float:
        """What to multiply the next step's loss by."""

    def update(self, is_finite: bool) -> None:
        """Take note of a step: whether its gradient was finite."""

    def state(self) -> dict[str, float]:
        """All that a checkpoint needs of it, as JSON."""

    def load_state(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's state."""


@dataclass(frozen=True)
class StaticLossScale:
    """A scale that does not change: 1 for fp32 and bf16, whose range is that of fp32, or a number that is known to do for fp16.

    Raises ValueError when the scale is not positive.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"loss_scale={self.scale} must be positive")

    def update(self, is_finite: bool) -> None:
        pass

    def state(self) -> dict[str, float]:
        return {}

    def load_state(self, state: dict[str, float]) -> None:
        pass


@dataclass(kw_only=True)
class DynamicLossScale:
    """A scale that looks for the largest value which keeps gradients finite (golden fact G8: Megatron's rules).

    `window` finite steps in a row double it. `hysteresis` steps that are not finite halve it, and so does every further one
    until it has been doubled again: only growth, not a back-off, restores the patience.

    Raises ValueError, naming the field, when a setting is out of range.
    """

    initial: float = 2.0**32
    minimum: float = 1.0
    window: int = 1000
    hysteresis: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.initial:
            raise ValueError(
                f"initial_loss_scale={self.initial} must be at least min_loss_scale={self.minimum}, and both positive"
            )
        for name in ("window", "hysteresis"):
            if getattr(self, name) < 1:
                raise ValueError(f"loss scale: {name}={getattr(self, name)} must be at least 1")
        self._progress = _Progress(scale=self.initial, good_steps=0, patience=self.hysteresis)

    @property
    def scale(self) -> float:
        return self._progress.scale

    def update(self, is_finite: bool) -> None:
        now = self._progress
        if not is_finite:
            now.good_steps = 0
            now.patience -= 1
            if now.patience <= 0:
                now.scale = max(now.scale / 2, self.minimum)
            return
        now.good_steps += 1
        if now.good_steps == self.window:
            now.good_steps = 0
            now.patience = self.hysteresis
            now.scale *= 2

    def state(self) -> dict[str, float]:
        return asdict(self._progress)

    def load_state(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint's state.

        Raises:
            ValueError: it is the state of something else; the message names what is missing or too much.
        """
        wanted = {field.name for field in fields(_Progress)}
        if wanted != set(state):
            raise ValueError(
                f"the checkpoint's state of the loss scale has {sorted(state)}, a dynamic one has {sorted(wanted)}. Keep "
                "precision and loss_scale as they were, or start anew in another folder"
            )
        self._progress = _Progress(**state)  # type: ignore[arg-type]


@dataclass
class _Progress:
    scale: float
    good_steps: int  # in a row
    patience: int  # steps that may still be not finite before the scale falls

"""A score: a number per item that says what it is, which way is up, and what it was computed from.

Uncertainty and confidence are never left to the reader: the direction travels with the value, and
:class:`demur.Rule` refuses a score of another name, direction or stage than the one it was earned on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

Direction = Literal["confidence", "uncertainty", "membership"]
Stage = Literal["raw", "processed"]

DIRECTIONS: tuple[str, ...] = get_args(Direction)
STAGES: tuple[str, ...] = get_args(Stage)


@dataclass(frozen=True, eq=False)
class Score:
    """One named score with its direction.

    Args:
        value: float tensor, any shape; NaN where an item is invalid.
        name: what was computed, parameters included (``"min_k_20"``).
        direction: ``"confidence"`` and ``"membership"`` rise, ``"uncertainty"`` falls, with belief.
        stage: ``"raw"`` if computed from the logits the model emitted, ``"processed"`` if from logits
            that a sampler had already changed (temperature, top-p, repetition penalty).
        truncated: bool tensor like ``value`` where the score saw only a part of what it needs, or None.

    Example:
        >>> import torch
        >>> Score(torch.tensor([0.5]), "entropy", "uncertainty").confidence
        tensor([-0.5000])
    """

    value: Tensor
    name: str
    direction: Direction
    stage: Stage = "raw"
    truncated: Tensor | None = None

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"direction must be one of {DIRECTIONS}, got {self.direction!r}")
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {STAGES}, got {self.stage!r}")
        if not isinstance(self.value, Tensor) or not self.value.is_floating_point():
            raise TypeError(f"a Score wants a floating-point tensor, got {type(self.value).__name__}")

    @property
    def confidence(self) -> Tensor:
        """The value turned so that higher means more confident (the sign of an uncertainty is flipped)."""
        return -self.value if self.direction == "uncertainty" else self.value

    @property
    def valid(self) -> Tensor:
        """Bool tensor: items with a number. An invalid item is never answered."""
        return ~torch.isnan(self.value)

    def to(self, device: torch.device | str) -> Score:
        """The same score on another device."""
        truncated = None if self.truncated is None else self.truncated.to(device)
        return replace(self, value=self.value.to(device), truncated=truncated)

    def cpu(self) -> Score:
        """The same score on the CPU."""
        return self.to("cpu")

    def __getitem__(self, index: object) -> Score:
        truncated = None if self.truncated is None else self.truncated[index]  # type: ignore[index]
        return replace(self, value=self.value[index], truncated=truncated)  # type: ignore[index]

    def __len__(self) -> int:
        return self.value.shape[0]


class SequenceScores(Mapping[str, Score]):
    """The scores of a batch of sequences: a mapping from name to :class:`Score`, readable as attributes.

    ``n_tokens`` (int64, one per sequence) counts the tokens that entered: ignored and forced ones do not.

    Example:
        >>> import torch, demur
        >>> t = demur.token_scores(torch.zeros(3, 4), torch.tensor([0, 1, 2]))
        >>> round(float(demur.sequence_scores(t).perplexity.value), 4)
        4.0
    """

    def __init__(self, scores: Mapping[str, Score], n_tokens: Tensor) -> None:
        self._scores = dict(scores)
        self.n_tokens = n_tokens

    def __getitem__(self, name: str) -> Score:
        if name not in self._scores:
            raise KeyError(f"no score {name!r} here; there are: {', '.join(self._scores)}")
        return self._scores[name]

    def __getattr__(self, name: str) -> Score:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(str(error)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __repr__(self) -> str:
        names = ", ".join(f"{s.name} ({s.direction})" for s in self._scores.values())
        return f"SequenceScores(n={self.n_tokens.numel()}, {names})"

    def to(self, device: torch.device | str) -> SequenceScores:
        """The same scores on another device."""
        return SequenceScores({k: s.to(device) for k, s in self._scores.items()}, self.n_tokens.to(device))

    def cpu(self) -> SequenceScores:
        """The same scores on the CPU."""
        return self.to("cpu")

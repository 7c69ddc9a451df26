"""TokenScores: three tensors and a static layout.

One op returns ``floats`` [n_floats, *], ``ints`` [n_ints, *] and ``status`` [*]; every field is a view made
when it is asked for (25 eager views cost 20 µs of Python per call, this costs none).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntFlag
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from demur.scores import Stage

Keep = Literal["topk", "row"]

# Canonical order of the scalar statistics; csrc/cpu/token_args.h holds the same order as bit numbers.
FLOAT_STATS = (
    "logsumexp",
    "logprob",
    "max_logprob",
    "margin",
    "logit_margin",
    "entropy",
    "varentropy",
    "sum_p2",
    "renyi_half",
    "fisher_rao",
    "self_certainty",
    "mass_greater",
)
INT_STATS = ("argmax", "finite_count", "n_greater", "n_equal")
SCALAR_STATS = FLOAT_STATS + INT_STATS
TARGET_STATS = ("logprob", "mass_greater", "n_greater", "n_equal")


class Status(IntFlag):
    """What happened to a row. ``TokenScores.valid`` is False for the flags in :data:`INVALID`."""

    OK = 0
    EMPTY_SUPPORT = 1
    HAS_NAN = 2
    HAS_POSINF = 4
    TARGET_OUT_OF_RANGE = 8
    TARGET_MASKED = 16
    IGNORED = 32
    BAD_SCALE = 64
    RANK_APPROX = 128


INVALID = (
    Status.EMPTY_SUPPORT | Status.HAS_NAN | Status.HAS_POSINF | Status.TARGET_OUT_OF_RANGE | Status.BAD_SCALE
)


@dataclass(frozen=True)
class Layout:
    """Which row of ``floats`` and ``ints`` holds what. Static: equal layouts share one compiled graph."""

    floats: tuple[str, ...]
    ints: tuple[str, ...]
    n_sets: int = 0
    topk: int = 0
    keep: Keep | None = None
    stage: Stage = "raw"

    @property
    def n_floats(self) -> int:
        """Rows of the float tensor: statistics, set masses, top-k values, top-k keys when they are kept."""
        return len(self.floats) + self.n_sets + self.topk * (2 if self.keep == "topk" else 1)

    @property
    def n_ints(self) -> int:
        """Rows of the integer tensor: statistics, then top-k ids."""
        return len(self.ints) + self.topk

    @property
    def stat_mask(self) -> int:
        """Bit i is set when SCALAR_STATS[i] is wanted (the form in which the op takes it)."""
        wanted = set(self.floats) | set(self.ints)
        return sum(1 << i for i, name in enumerate(SCALAR_STATS) if name in wanted)


@lru_cache(maxsize=256)
def make_layout(
    stats: tuple[str, ...] | None,
    has_targets: bool,
    n_sets: int = 0,
    topk: int = 0,
    keep: Keep | None = None,
    stage: Stage = "raw",
) -> Layout:
    """The layout for a request; ``stats=None`` is every scalar statistic whose inputs are there."""
    if stats is None:
        wanted = set(SCALAR_STATS) if has_targets else set(SCALAR_STATS) - set(TARGET_STATS)
    else:
        unknown = [s for s in stats if s not in SCALAR_STATS]
        if unknown:
            raise ValueError(f"unknown statistics {unknown}; there are {', '.join(SCALAR_STATS)}")
        missing = [s for s in stats if s in TARGET_STATS]
        if missing and not has_targets:
            raise ValueError(f"{missing} need token_ids (or with_targets later), and none were given")
        wanted = set(stats)
    if keep is not None:
        wanted.add("max_logprob")
    return Layout(
        tuple(s for s in FLOAT_STATS if s in wanted),
        tuple(s for s in INT_STATS if s in wanted),
        n_sets,
        topk,
        keep,
        stage,
    )


@dataclass(frozen=True)
class KeptRow:
    """A private copy of the logits and of what turns them into z, for targets that come later."""

    logits: Tensor  # (*, vocab)
    temperature: Tensor | float
    softcap: float | None
    bias: Tensor | None
    vocab_size: int


class _Float:
    """A lazy float field: a row of ``floats``, or None when it was not asked for."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, obj: TokenScores | None, owner: type) -> Any:
        if obj is None:
            return self
        names = obj.layout.floats
        return obj.floats[names.index(self.name)] if self.name in names else None


class _Int(_Float):
    """A lazy integer field."""

    def __get__(self, obj: TokenScores | None, owner: type) -> Any:
        if obj is None:
            return self
        names = obj.layout.ints
        return obj.ints[names.index(self.name)] if self.name in names else None


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of rows of logits. Every field has the leading shape of the logits; None if not asked for.

    Example:
        >>> import torch, demur
        >>> s = demur.token_scores(torch.tensor([0.0, 0.0]), torch.tensor(1))
        >>> round(float(s.prob), 3), int(s.rank), bool(s.valid)
        (0.5, 1, True)
    """

    floats: Tensor  # (n_floats, *)
    ints: Tensor  # (n_ints, *)
    status: Tensor  # (*), uint8 bits of Status
    layout: Layout
    kept: KeptRow | None = field(default=None, repr=False)

    logsumexp = _Float("log Σ exp z, nats.")
    logprob = _Float("log p(target), nats; 0 where ignored, −inf where the target is masked. Confidence.")
    max_logprob = _Float("log of the largest probability. Confidence.")
    margin = _Float("p₁ − p₂, 0 for a tie. Confidence.")
    logit_margin = _Float("z₁ − z₂; +inf when a single token is allowed. Confidence.")
    entropy = _Float("H(p), nats. Uncertainty.")
    varentropy = _Float("Var[log p], nats².")
    sum_p2 = _Float("Σ p², the collision probability. Confidence.")
    renyi_half = _Float("Rényi-½ divergence from uniform of p at temperature 2. Confidence.")
    fisher_rao = _Float("Fisher–Rao distance to uniform of p at temperature 2, in [0, 1]. Confidence.")
    self_certainty = _Float("KL(uniform‖p) over the allowed tokens. Confidence.")
    mass_greater = _Float("Σ p over tokens with a logit above the target's.")
    argmax = _Int("Most probable token; the lowest index among ties.")
    finite_count = _Int("Number of allowed (unmasked) tokens.")
    n_greater = _Int("Tokens with a logit above the target's.")
    n_equal = _Int("Other tokens with the target's logit.")

    @property
    def shape(self) -> torch.Size:
        """The leading shape of the logits."""
        return self.status.shape

    @property
    def valid(self) -> Tensor:
        """Bool: rows with usable numbers. An invalid row is never answered."""
        return (self.status & int(INVALID)) == 0

    @property
    def ignored(self) -> Tensor:
        """Bool: rows whose target was ``ignore_index``."""
        return (self.status & int(Status.IGNORED)) != 0

    @property
    def prob(self) -> Tensor | None:
        """p(target). Confidence."""
        return None if self.logprob is None else torch.exp(self.logprob)

    @property
    def max_prob(self) -> Tensor | None:
        """The largest probability. Confidence."""
        return None if self.max_logprob is None else torch.exp(self.max_logprob)

    @property
    def rank(self) -> Tensor | None:
        """Best rank of the target, 1 for the argmax; −1 where ignored or invalid."""
        n = self.n_greater
        return None if n is None else torch.where(n < 0, n, n + 1)

    @property
    def renyi_2(self) -> Tensor | None:
        """Rényi-2 entropy −ln Σp², nats. Uncertainty."""
        return None if self.sum_p2 is None else -torch.log(self.sum_p2)

    @property
    def set_mass(self) -> Tensor | None:
        """Σ p over each token set, shape (*, n_sets)."""
        return self._block(self.floats, len(self.layout.floats), self.layout.n_sets)

    @property
    def topk(self) -> Tensor | None:
        """The k largest z, descending, shape (*, k); −inf where fewer tokens are allowed."""
        return self._block(self.floats, len(self.layout.floats) + self.layout.n_sets, self.layout.topk)

    @property
    def topk_ids(self) -> Tensor | None:
        """Ids of ``topk``, shape (*, k); −1 where absent."""
        return self._block(self.ints, len(self.layout.ints), self.layout.topk)

    @staticmethod
    def _block(rows: Tensor, start: int, count: int) -> Tensor | None:
        return rows[start : start + count].movedim(0, -1) if count else None

    def __getitem__(self, index: Any) -> TokenScores:
        lead = index if isinstance(index, tuple) else (index,)
        rows = (slice(None), *lead)
        kept = self.kept
        if kept is not None:
            t = kept.temperature
            kept = replace(
                kept, logits=kept.logits[index], temperature=t[index] if isinstance(t, Tensor) and t.dim() else t
            )
        return TokenScores(self.floats[rows], self.ints[rows], self.status[index], self.layout, kept)

    def __len__(self) -> int:
        return self.status.shape[0]

    def to(self, device: torch.device | str) -> TokenScores:
        """The same scores on another device."""
        return pytree.tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, self)  # type: ignore[no-any-return]

    def cpu(self) -> TokenScores:
        """The same scores on the CPU."""
        return self.to("cpu")

    @staticmethod
    def cat(parts: Sequence[TokenScores]) -> TokenScores:
        """Concatenate along the first leading dimension; the layouts must agree, kept rows are dropped."""
        if not parts:
            raise ValueError("cat wants at least one TokenScores, got none")
        layouts = {p.layout for p in parts}
        if len(layouts) > 1:
            raise ValueError(f"cat wants one layout, got {len(layouts)}: {layouts}")
        layout = parts[0].layout
        return TokenScores(
            torch.cat([p.floats for p in parts], 1),
            torch.cat([p.ints for p in parts], 1),
            torch.cat([p.status for p in parts]),
            replace(layout, keep=None) if layout.keep == "row" else layout,
        )

    def with_targets(self, token_ids: Any, logits: Any = None, *, ignore_index: int = -100) -> TokenScores:
        """Fill logprob, ranks and mass_greater for tokens that were sampled after scoring.

        Reads the state kept by ``keep=``, never the caller's buffer (a host may have changed it since),
        unless ``logits`` is handed in again. With ``keep="topk"`` a token outside the top k gets
        ``logprob`` NaN, counts −1 and RANK_APPROX.

        Raises:
            ValueError: nothing was kept and no logits were given, or shapes differ.
            IndexError: a token id outside the vocabulary (CPU).
        """
        from demur.tokens import fill_targets

        return fill_targets(self, token_ids, logits, ignore_index)


def _flatten(s: TokenScores) -> tuple[list[Any], tuple[Any, ...]]:
    k = s.kept
    if k is None:
        return [s.floats, s.ints, s.status], (s.layout, None)
    children = [s.floats, s.ints, s.status, k.logits, k.temperature, k.bias]
    return children, (s.layout, (k.softcap, k.vocab_size))


def _unflatten(children: Any, context: tuple[Any, ...]) -> TokenScores:
    layout, kept_context = context
    floats, ints, status, *rest = children
    if kept_context is None:
        return TokenScores(floats, ints, status, layout)
    logits, temperature, bias = rest
    softcap, vocab_size = kept_context
    return TokenScores(floats, ints, status, layout, KeptRow(logits, temperature, softcap, bias, vocab_size))


pytree.register_pytree_node(TokenScores, _flatten, _unflatten, serialized_type_name="demur.TokenScores")

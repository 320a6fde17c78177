"""How closely an image is looked at: levels of detail, and the best plan that a budget allows.

Whatever is chosen, it is chosen as image settings, so that every plan is one that transformers would make with them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, get_args

from lfm2vl_edge.config import ImageConfig
from lfm2vl_edge.errors import ConfigError
from lfm2vl_edge.planning.costs import Costs
from lfm2vl_edge.planning.geometry import TilePlan, fit, is_too_large, plan, single_view

Detail = Literal["fast", "balanced", "high", "full"]
DETAILS: Final[tuple[Detail, ...]] = get_args(Detail)
WISHES: Final = ("detail", "budget_tokens", "budget_seconds")
"""What may be asked for one image."""
_DIVISORS: Final[Mapping[str, int]] = {"fast": 4, "balanced": 2, "high": 1}
"""Level -> the share of the model's `max_image_tokens` that it allows: 64, 128 and 256 of the usual 256."""
_LEAST_DIVISOR: Final = 8
"""The smallest view of a budget: what `fast` takes at least, 32 of the usual 256."""
CHOSEN: Final = ("do_image_splitting", "min_image_tokens", "max_image_tokens", "max_tiles")
"""The image settings that a level of detail or a budget may change."""
_DECIDED: Final = frozenset(
    (
        "do_image_splitting",
        "min_image_tokens",
        "max_image_tokens",
        "min_tiles",
        "max_tiles",
        "use_thumbnail",
        "max_pixels_tolerance",
    )
)
"""Settings that a level of detail decides, or that mean nothing without splitting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBudget:
    """What is wanted of an image and what may be paid for it.

    Raises:
        ConfigError: a value is out of range.
    """

    detail: Detail = "full"
    """`full`: the model's own settings. The others make one view, see `detail_changes`."""
    budget_tokens: int | None = None
    """Most image tokens of one image; None is no limit."""
    budget_seconds: float | None = None
    """Most seconds of one image in encoder and language tower, as predicted by `costs`; None is no limit."""
    costs: Costs | None = None
    """What a budget of seconds is counted with."""

    def __post_init__(self) -> None:
        if self.detail not in DETAILS:
            raise ConfigError(f"detail is {self.detail!r}; it must be one of {', '.join(DETAILS)}")
        tokens, seconds = self.budget_tokens, self.budget_seconds
        if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1):
            raise ConfigError(f"budget_tokens is {tokens!r}; it must be a whole number, 1 or more")
        if seconds is None:
            return
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds < math.inf:
            raise ConfigError(f"budget_seconds is {seconds!r}; it must be a finite number above 0")
        if self.costs is None:
            raise ConfigError("budget_seconds needs to know what views cost; open the model from its files")

    def with_options(self, wishes: Mapping[str, Any]) -> ImageBudget:
        """Return a copy for one image.

        Raises:
            ConfigError: a option is unknown or out of range.
        """
        for name in wishes:
            if name not in WISHES:
                raise ConfigError(f"unknown wish {name!r} for a picture; known: {', '.join(WISHES)}")
        return replace(self, **wishes) if wishes else self

    @property
    def has_budget(self) -> bool:
        """Whether there is a limit at all."""
        return self.budget_tokens is not None or self.budget_seconds is not None

    @property
    def key(self) -> str:
        """All that decides how an image is cut, as text; costs do so only where seconds are limited."""
        return f"{self.described('')} {self.costs if self.budget_seconds is not None else ''}"

    def described(self, source: str) -> str:
        """Return a phrase on where image settings came from, with the options that were added to them."""
        wishes = [] if self.detail == "full" else [f"detail {self.detail}"]
        wishes += [] if self.budget_tokens is None else [f"at most {self.budget_tokens} tokens"]
        wishes += [] if self.budget_seconds is None else [f"at most {self.budget_seconds:g} seconds"]
        return "; ".join([source, *wishes])

    def allows(self, tile_plan: TilePlan) -> bool:
        """Tell whether a plan is within the budget."""
        if self.budget_tokens is not None and tile_plan.n_image_tokens > self.budget_tokens:
            return False
        if self.budget_seconds is None or self.costs is None:
            return True
        return self.costs.seconds(tile_plan) <= self.budget_seconds


NO_BUDGET: Final = ImageBudget()
"""No option and no limit: the model's own settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A step of `candidate_plans`."""

    tile_plan: TilePlan
    """What the image becomes."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """The image settings that lead to it, as changes of the candidate_plans's."""


def detail_changes(config: ImageConfig, detail: Detail) -> dict[str, Any]:
    """Return what a level of detail changes: nothing for `full`, else one view within limits of image tokens.

    The limits are shares of the model's own `max_image_tokens`; of the usual 256 they are 32 to 64 (`fast`), 64 to
    128 (`balanced`) and 128 to 256 (`high`), the levels that the model cards document.
    """
    if detail == "full":
        return {}
    most = max(1, config.max_image_tokens // _DIVISORS[detail])
    return {"do_image_splitting": False, "min_image_tokens": max(1, most // 2), "max_image_tokens": most}


def check_detail(detail: str, changed: Collection[str]) -> None:
    """Refuse single image settings beside a level of detail that decides them.

    Raises:
        ConfigError: they contradict each other.
    """
    both = [name for name in changed if name in _DECIDED]
    if detail != "full" and both:
        raise ConfigError(
            f"detail {detail!r} decides {', '.join(both)} by itself; leave out either that setting or the detail"
        )


def settings_for(height: int, width: int, config: ImageConfig, sight: ImageBudget) -> ImageConfig:
    """Return the image settings for an image of `height` x `width` pixels; without a option, the config itself.

    Raises:
        ConfigError: no plan is within the budget; the message names the least possible.
        ImageError: a side is below 1.
    """
    changes = detail_changes(config, sight.detail)
    own = config.with_changes(changes) if changes else config
    if not sight.has_budget:
        return own
    rungs = candidate_plans(height, width, own)
    for rung in rungs:
        if sight.allows(rung.tile_plan):
            return own.with_changes(rung.changes) if rung.changes else own
    raise ConfigError(_beyond(rungs[-1].tile_plan, sight))


def _beyond(least: TilePlan, sight: ImageBudget) -> str:
    asked, possible = [], [f"{least.n_image_tokens} tokens"]
    if sight.budget_tokens is not None:
        asked.append(f"{sight.budget_tokens} tokens")
    if sight.budget_seconds is not None and sight.costs is not None:
        asked.append(f"{sight.budget_seconds:g} seconds")
        possible.append(f"{sight.costs.seconds(least):.2g} seconds ({sight.costs.source})")
    return (
        f"no view of a {least.width}x{least.height} picture is within the budget of {' and '.join(asked)}; "
        f"the least possible is {', '.join(possible)}"
    )


def candidate_plans(height: int, width: int, config: ImageConfig) -> list[Candidate]:
    """Return the plans of an image, the best first: the config's own, then fewer tiles, then ever smaller views.

    Each has fewer image tokens than the one before and no more views, so it is cheaper by every measure.

    Raises:
        ImageError: a side is below 1.
    """
    rungs = [Candidate(tile_plan=plan(height, width, config))]
    for candidates in (_fewer_tiles(rungs[0].tile_plan, config), _smaller_views(rungs[0].tile_plan, config)):
        for rung in candidates:
            last = rungs[-1].tile_plan
            is_cheaper = rung.tile_plan.n_image_tokens < last.n_image_tokens
            if is_cheaper and len(rung.tile_plan.views) <= len(last.views):
                rungs.append(rung)
    return rungs


def _fewer_tiles(whole: TilePlan, config: ImageConfig) -> Iterator[Candidate]:
    """Yield what the model's own choice of a grid gives when fewer and fewer tiles are allowed.

    A limit between two grids gives the smaller one, so the limits are taken from the grids.
    """
    most = whole.rows * whole.cols - 1
    while most >= max(2, config.min_tiles):
        changes = {"max_tiles": most}
        tile_plan = plan(whole.height, whole.width, config.with_changes(changes))
        yield Candidate(tile_plan=tile_plan, changes=changes)
        most = tile_plan.rows * tile_plan.cols - 1


def _smaller_views(whole: TilePlan, config: ImageConfig) -> Iterator[Candidate]:
    """Yield the single view with fewer and fewer tokens; as in the levels of detail, the least is half of the most."""
    last = 0, 0
    for most in range(config.max_image_tokens, max(1, config.max_image_tokens // _LEAST_DIVISOR) - 1, -1):
        least = max(1, min(config.min_image_tokens, most // 2))
        size = fit(whole.height, whole.width, config.token_side, least, most)
        if size == last:
            continue
        last = size
        changes = {"do_image_splitting": False, "min_image_tokens": least, "max_image_tokens": most}
        yield Candidate(tile_plan=single_view(whole.height, whole.width, config, least, most), changes=changes)


def untiled_size(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    """Return the largest (height, width) of the same shape that is not cut into tiles; the image's own if it is not.

    Raises:
        ImageError: a side is below 1.
    """
    if not plan(height, width, config).is_tiled:
        return height, width
    longest, fits, fails = max(height, width), 1, max(height, width)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        too_large = is_too_large(*_scaled(height, width, middle / longest), config)
        fits, fails = (fits, middle) if too_large else (middle, fails)
    return _scaled(height, width, fits / longest)


def _scaled(height: int, width: int, share: float) -> tuple[int, int]:
    return max(1, round(height * share)), max(1, round(width * share))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheaperPlan:
    """A way to pay less for an image."""

    detail: Detail | None
    """The level of detail that does it; None: the image is scaled to the size of the plan."""
    tile_plan: TilePlan
    """What the image becomes then."""


def cheaper(tile_plan: TilePlan, config: ImageConfig) -> list[CheaperPlan]:
    """Return what would take fewer tokens than a plan: scaling it so that it is not cut, and the levels of detail.

    Args:
        tile_plan: of the image.
        config: the model's image settings, from which the levels of detail go out.
    """
    ways = []
    if tile_plan.is_tiled:
        size = untiled_size(tile_plan.height, tile_plan.width, config)
        ways.append(CheaperPlan(detail=None, tile_plan=plan(*size, config)))
    for detail in reversed(DETAILS):
        own = config.with_changes(detail_changes(config, detail))
        ways.append(CheaperPlan(detail=detail, tile_plan=plan(tile_plan.height, tile_plan.width, own)))
    return [way for way in ways if way.tile_plan.n_image_tokens < tile_plan.n_image_tokens]

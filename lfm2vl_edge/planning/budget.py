"""Image budgets: levels of detail, and the best plan that a limit of tokens or seconds allows.

Every choice is expressed as image settings, so that each plan is one that transformers would make with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypedDict, get_args

from lfm2vl_edge.config import ImageConfig, is_finite, is_integer
from lfm2vl_edge.errors import ConfigError, shorten
from lfm2vl_edge.planning.costs import Costs
from lfm2vl_edge.planning.geometry import TilePlan, fit, is_too_large, plan, single_view

Detail = Literal["fast", "balanced", "high", "full"]
DETAILS: Final[tuple[Detail, ...]] = get_args(Detail)
_DIVISORS: Final[Mapping[str, int]] = {"fast": 4, "balanced": 2, "high": 1}
"""Level of detail -> divisor of the model's `max_image_tokens`: 64, 128 and 256 of the usual 256 remain."""
_LEAST_DIVISOR: Final = 8
"""The smallest view of a budget: the minimum of `fast`, 32 of the usual 256 tokens."""
BUDGET_SETTINGS: Final = ("do_image_splitting", "min_image_tokens", "max_image_tokens", "max_tiles")
"""The image settings that a level of detail or a budget may change."""
_DECIDED: Final = frozenset(BUDGET_SETTINGS) | {"min_tiles", "use_thumbnail", "max_pixels_tolerance"}
"""Settings that a level of detail decides, or that have no effect without splitting."""


class BudgetOptions(TypedDict, total=False):
    """Keywords that limit what one image may take; see `ImageBudget`."""

    detail: Detail
    budget_tokens: int | None
    budget_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageBudget:
    """What one image may take.

    Attributes:
        detail: `full`: the model's own settings. The others make one view, see `detail_changes`.
        budget_tokens: most image tokens of one image; None means no limit.
        budget_seconds: most seconds of one image in encoder and language tower, as predicted by `costs`; None is no
            limit.
        costs: what a limit of seconds is predicted with; it must have been measured on this machine.

    Raises:
        ConfigError: a value is out of range, or seconds are limited without measured costs.
    """

    detail: Detail = "full"
    budget_tokens: int | None = None
    budget_seconds: float | None = None
    costs: Costs | None = None

    def __post_init__(self) -> None:
        if self.detail not in DETAILS:
            raise ConfigError(f"detail is {shorten(self.detail)}; it must be one of {', '.join(DETAILS)}")
        tokens, seconds = self.budget_tokens, self.budget_seconds
        if tokens is not None and not is_integer(tokens, 1):
            raise ConfigError(f"budget_tokens is {shorten(tokens)}; it must be an integer, 1 or more")
        if seconds is None:
            return
        if not is_finite(seconds) or seconds <= 0:
            raise ConfigError(f"budget_seconds is {shorten(seconds)}; it must be a finite number above 0")
        if self.costs is None or not self.costs.is_measured:
            raise ConfigError(
                "budget_seconds needs costs that were measured on this machine: run `lfm2vl-edge tune -m MODEL` once, "
                "or use budget_tokens"
            )

    def with_options(self, options: Mapping[str, Any]) -> ImageBudget:
        """Return a copy for one image.

        Raises:
            ConfigError: an option is unknown or out of range.
        """
        known = BudgetOptions.__annotations__
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option {shorten(name)} for an image; known: {', '.join(known)}")
        return replace(self, **options) if options else self

    @property
    def has_limit(self) -> bool:
        """Whether tokens or seconds are limited."""
        return self.budget_tokens is not None or self.budget_seconds is not None

    @property
    def key(self) -> str:
        """Everything that decides how an image is preprocessed, as text; costs count only if seconds are limited."""
        return f"{self.described('')} {self.costs if self.budget_seconds is not None else ''}"

    def described(self, source: str) -> str:
        """Return a phrase on where image settings came from, with the limits that were added to them."""
        limits = [] if self.detail == "full" else [f"detail {self.detail}"]
        limits += [] if self.budget_tokens is None else [f"at most {self.budget_tokens} tokens"]
        limits += [] if self.budget_seconds is None else [f"at most {self.budget_seconds:g} seconds"]
        return "; ".join([source, *limits])

    def allows(self, tile_plan: TilePlan) -> bool:
        """Return whether a plan is within the limits."""
        if self.budget_tokens is not None and tile_plan.n_image_tokens > self.budget_tokens:
            return False
        if self.budget_seconds is None or self.costs is None:
            return True
        return self.costs.seconds(tile_plan) <= self.budget_seconds


NO_BUDGET: Final = ImageBudget()
"""The model's own settings, without a limit."""


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
    """Refuse single image settings together with a level of detail that decides them.

    Raises:
        ConfigError: they contradict each other.
    """
    both = [name for name in changed if name in _DECIDED]
    if detail != "full" and both:
        raise ConfigError(
            f"detail {detail!r} decides {', '.join(both)} by itself; leave out either that setting or the detail"
        )


def settings_for(height: int, width: int, config: ImageConfig, budget: ImageBudget) -> ImageConfig:
    """Return the image settings for an image of `height` x `width` pixels; without a budget, the config itself.

    Raises:
        ConfigError: no plan is within the budget; the message names the least possible.
        ImageError: a side is below 1.
    """
    changes = detail_changes(config, budget.detail)
    own = config.with_changes(changes) if changes else config
    if not budget.has_limit:
        return own
    candidates = candidate_plans(height, width, own)
    for tile_plan, more in candidates:
        if budget.allows(tile_plan):
            return own.with_changes(more) if more else own
    raise ConfigError(_beyond(candidates[-1][0], budget))


def _beyond(least: TilePlan, budget: ImageBudget) -> str:
    wanted, possible = [], [f"{least.n_image_tokens} tokens"]
    if budget.budget_tokens is not None:
        wanted.append(f"{budget.budget_tokens} tokens")
    if budget.budget_seconds is not None and budget.costs is not None:
        wanted.append(f"{budget.budget_seconds:g} seconds")
        possible.append(f"{budget.costs.seconds(least):.2g} seconds ({budget.costs.source})")
    return (
        f"no view of a {least.width}x{least.height} image is within the budget of {' and '.join(wanted)}; "
        f"the least possible is {', '.join(possible)}"
    )


def candidate_plans(height: int, width: int, config: ImageConfig) -> list[tuple[TilePlan, Mapping[str, Any]]]:
    """Return plans of an image, best first, each with the image settings that lead to it, as changes of the config.

    First comes the config's own plan, then fewer tiles, then ever smaller views. Each has fewer image tokens than the
    one before and no more views, so it is cheaper by every measure.

    Raises:
        ImageError: a side is below 1.
    """
    whole = plan(height, width, config)
    kept: list[tuple[TilePlan, Mapping[str, Any]]] = [(whole, {})]
    for tile_plan, changes in (*_fewer_tiles(whole, config), *_smaller_views(whole, config)):
        last = kept[-1][0]
        if tile_plan.n_image_tokens < last.n_image_tokens and len(tile_plan.views) <= len(last.views):
            kept.append((tile_plan, changes))
    return kept


def _fewer_tiles(whole: TilePlan, config: ImageConfig) -> Iterator[tuple[TilePlan, Mapping[str, Any]]]:
    """Yield what the model's own choice of a grid gives if fewer and fewer tiles are allowed.

    A limit between two grids gives the smaller one, so the limits are taken from the grids.
    """
    most = whole.rows * whole.cols - 1
    while most >= max(2, config.min_tiles):
        changes = {"max_tiles": most}
        tile_plan = plan(whole.height, whole.width, config.with_changes(changes))
        yield tile_plan, changes
        most = tile_plan.rows * tile_plan.cols - 1


def _smaller_views(whole: TilePlan, config: ImageConfig) -> Iterator[tuple[TilePlan, Mapping[str, Any]]]:
    """Yield the single view with fewer and fewer tokens; as in the levels of detail, the least is half of the most."""
    last = 0, 0
    for most in range(config.max_image_tokens, max(1, config.max_image_tokens // _LEAST_DIVISOR) - 1, -1):
        least = max(1, min(config.min_image_tokens, most // 2))
        size = fit(whole.height, whole.width, config.token_side, least, most)
        if size != last:
            last = size
            changes = {"do_image_splitting": False, "min_image_tokens": least, "max_image_tokens": most}
            yield single_view(whole.height, whole.width, config, least, most), changes


def untiled_size(height: int, width: int, config: ImageConfig) -> tuple[int, int]:
    """Return the largest (height, width) of the same shape that is not tiled; the image's own if it is not tiled.

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


def cheaper_plans(tile_plan: TilePlan, config: ImageConfig) -> list[tuple[Detail | None, TilePlan]]:
    """Return what takes fewer tokens than a plan: scaling the image so that it is not tiled, and the levels of detail.

    Args:
        tile_plan: of the image.
        config: the model's image settings, on which the levels of detail are based.

    Returns:
        (level of detail, plan), the level None for an image that is scaled to the size of the plan.
    """
    height, width = tile_plan.height, tile_plan.width
    ways: list[tuple[Detail | None, TilePlan]] = []
    if tile_plan.is_tiled:
        ways.append((None, plan(*untiled_size(height, width, config), config)))
    ways.extend(
        (detail, plan(height, width, config.with_changes(detail_changes(config, detail))))
        for detail in reversed(DETAILS)
    )
    return [way for way in ways if way[1].n_image_tokens < tile_plan.n_image_tokens]

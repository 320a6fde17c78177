"""Run campaigns and print a table: `python -m tests.fuzz [CAMPAIGN]... [--share 0.1] [--seed 17] [--only INDEX]`."""

from __future__ import annotations

import argparse
import os
import sys

from tests.fuzz import images, kills, network, pairs, server, stored, texts
from tests.fuzz.runner import BUILD, HEADING, Campaign, Tally, run

CAMPAIGNS = {
    one.name: one for module in (images, pairs, stored, texts, network, server, kills) for one in module.CAMPAIGNS
}
SEED = 17
_SHOWN = 20
"""Wrong inputs of a campaign that are listed."""


def main() -> int:
    """Return 0 if nothing is wrong, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("campaigns", nargs="*", metavar="CAMPAIGN", help=f"default: all of {', '.join(CAMPAIGNS)}")
    parser.add_argument("--share", type=float, default=1.0, help="part of the inputs of each campaign")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--only", type=int, metavar="INDEX", help="judge one input and print what is wrong")
    chosen = parser.parse_args()
    if unknown := set(chosen.campaigns) - CAMPAIGNS.keys():
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(CAMPAIGNS)}")
    print(HEADING)
    total = Tally(name="all")
    for name in chosen.campaigns or CAMPAIGNS:
        campaign = CAMPAIGNS[name]
        indices = range(count(campaign, chosen.share)) if chosen.only is None else [chosen.only]
        tally = run(campaign, indices, chosen.seed, chosen.jobs)
        print(tally, flush=True)
        total += tally
        for index, verdict, detail in tally.wrong[:_SHOWN]:
            print(f"  {index} {verdict}: {_shown(detail, whole=chosen.only is not None)}", flush=True)
    print(total)
    if total.wrong:
        print(f"the inputs that went wrong are in {BUILD}; one again: python -m tests.fuzz CAMPAIGN --only INDEX")
    return 1 if total.wrong else 0


def count(campaign: Campaign, share: float) -> int:
    return max(1, round(campaign.count * share))


def _shown(detail: str, *, whole: bool) -> str:
    return detail if whole else next((line for line in reversed(detail.splitlines()) if line.strip()), "")[:300]


if __name__ == "__main__":
    sys.exit(main())

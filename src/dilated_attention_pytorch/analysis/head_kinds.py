"""Names for what a head does, by stated rules."""

from __future__ import annotations

SINK, LOCAL, PERIODIC = "sink", "local", "periodic"
CONTENT, LONG_RANGE, MIXED = "content-driven", "long-range", "mixed"

# Share of the rows that choose the first block from afar (uniform choice: at most a quarter).
_SINK_SHARE = 0.8
# Share of near ones among the chosen tiles (uniform choice: three eighths at most).
_LOCALITY = 0.7
# Share of the distance profile's variance that a period explains.
_PERIODICITY = 0.6
# Jaccard distance between the patterns of different inputs.
_DIVERSITY = 0.5
# Mean distance as a share of what the row can see (uniform choice: a half).
_MEAN_DISTANCE = 1 / 3

HEAD_KINDS = {
    PERIODIC: f"the distance repeats: a period explains {_PERIODICITY:.0%} of the profile or more",
    SINK: f"at least {_SINK_SHARE:.0%} of the rows choose the first block from afar",
    LOCAL: f"at least {_LOCALITY:.0%} of the k tiles of a row lie within 1.5 k blocks",
    CONTENT: f"patterns of two inputs differ by {_DIVERSITY:.0%} (Jaccard) or more",
    LONG_RANGE: "the mean distance is a third of what the row can see, or more",
    MIXED: "none of these",
}


def classify(
    *,
    diversity: float,
    locality: float,
    sink_share: float,
    periodicity: float,
    mean_distance: float,
) -> str:
    """The first kind of :data:`HEAD_KINDS`, in its order, whose rule holds; NaN fulfils none.

    Args:
        diversity: See :class:`HeadStatistics`, as all others.
        locality: As there.
        sink_share: As there.
        periodicity: As there.
        mean_distance: As there.
    """
    rules = {
        PERIODIC: periodicity >= _PERIODICITY,
        SINK: sink_share >= _SINK_SHARE,
        LOCAL: locality >= _LOCALITY,
        CONTENT: diversity >= _DIVERSITY,
        LONG_RANGE: mean_distance >= _MEAN_DISTANCE,
    }
    return next((kind for kind, holds in rules.items() if holds), MIXED)

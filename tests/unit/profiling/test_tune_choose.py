"""Recommendations on made-up curves."""

from __future__ import annotations

from swinmoe.profiling.clock import Timing
from swinmoe.profiling.tune.choose import Asked, Point, broken, fastest_within, points_lost, points_lost_bound
from swinmoe.profiling.tune.loads import Load
from swinmoe.profiling.tune.passes import Seen, Setting

IMAGES = 1000


def seen(right: int, dropped: int = 0, second: int = 0) -> Seen:
    """The first `right` images recognised; so many of 100 choices dropped in each of two layers."""
    correct = tuple(i < right for i in range(IMAGES))
    load = Load((50, 50), 100, 1)
    return Seen(correct, {"one": [load], "two": [load]}, {"one": dropped, "two": second})


def point(name: str, right: int, *ms: float, dropped: int = 0) -> Point:
    return Point(name, Setting({"one": 1.0, "two": 1.0}, False), seen(right, dropped), Timing(ms or (10.0,)))


REFERENCE = seen(900)


def test_the_fastest_that_keeps_the_accuracy():
    points = [
        point("dropless", 900, 10, 10, 10),
        point("1.0", 899, 8, 8, 8),
        point("0.75", 898, 6, 6, 6),
        point("0.5", 850, 4, 4, 4),
    ]
    best = fastest_within(points, REFERENCE, 1.0)
    assert best is not None and best.name == "0.75"
    wide = fastest_within(points, REFERENCE, 10.0)
    assert wide is not None and wide.name == "0.5"


def test_what_is_as_fast_but_more_accurate_or_drops_less_comes_first():
    quick = point("0.75", 895, 5.0, 6.0, 7.0, dropped=20)
    close = point("1.0", 899, 6.5, 6.5, 6.5, dropped=5)
    equal = point("1.25", 899, 6.6, 6.6, 6.6, dropped=1)
    slow = point("dropless", 900, 9, 9, 9)
    best = fastest_within([quick, close, equal, slow], REFERENCE, 2.0)
    assert best is not None and best.name == "1.25"


def test_a_loss_within_the_limit_must_be_beyond_doubt():
    """Ten images in a thousand are one point; its bound is 1.645 standard errors above."""
    assert points_lost(seen(890), REFERENCE) == 1.0
    bound = points_lost_bound(seen(890), REFERENCE)
    assert 1.4 < bound < 1.6
    assert fastest_within([point("0.5", 890)], REFERENCE, 1.2) is None
    assert fastest_within([point("0.5", 890)], REFERENCE, 1.6) is not None


def test_images_gained_and_lost_cancel_but_widen_the_bound():
    swapped = Seen(tuple(not right if i < 20 else right for i, right in enumerate(REFERENCE.correct)), {}, {})
    both = Seen((*swapped.correct[:980], *(True for _ in range(20))), {}, {})
    assert points_lost(both, REFERENCE) == 0.0
    assert 1.03 < points_lost_bound(both, REFERENCE) < 1.05  # 40 of 1000 changed: 1.645·100·√(0.04/1000)


def test_broken_constraints_are_named():
    assert broken(Asked(max_drop=0.05), seen(900, 5, 5), REFERENCE) == []
    (said,) = broken(Asked(max_drop=0.05), seen(900, 5, 6), REFERENCE)
    assert "two drops 6.00 %" in said and "5 % are allowed" in said
    assert broken(Asked(within=1.0), seen(890, 90, 90), REFERENCE) == []
    (said,) = broken(Asked(within=1.0), seen(889), REFERENCE)
    assert "88.90 % is 1.10 points below" in said


def test_a_pass_sums_up_by_layer_and_over_all():
    found = seen(900, 5, 15)
    assert (found.accuracy, found.drops, found.drop_fraction) == (0.9, {"one": 0.05, "two": 0.15}, 0.1)

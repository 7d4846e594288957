"""Numbers as people read them: rounded to the digits that mean something, with commas between thousands."""

from __future__ import annotations

import math


def significant(value: float, digits: int) -> str:
    """A number rounded to `digits` significant digits, without an exponent unless it is huge.

    >>> significant(1620595.6, 4), significant(28.43, 3), significant(0.5, 3)
    ('1,621,000', '28.4', '0.500')
    """
    if not math.isfinite(value) or value >= 1e12:
        return f"{value:.{digits - 1}e}"
    before_point = math.floor(math.log10(abs(value))) + 1 if value else 1
    return f"{round(value, digits - before_point):,.{max(0, digits - before_point)}f}"


def count_in_words(count: float) -> str:
    """A large count in millions or thousands with two or three digits; a small one in full.

    >>> count_in_words(6_963_200), count_in_words(409_600), count_in_words(4096), count_in_words(1_310_720_000)
    ('7.0 M', '410,000', '4,100', '1,310 M')
    """
    if count < 1000:
        return f"{count:.0f}"
    return f"{significant(count / 1e6, 3 if count >= 1e7 else 2)} M" if count >= 1e6 else significant(count, 2)


def duration_in_words(seconds: float) -> str:
    """A rough duration.

    >>> [duration_in_words(s) for s in (20, 200, 2_500, 9_000, 40_000)]
    ['less than a minute', 'about 3 minutes', 'about 40 minutes', 'about 2.5 hours', 'about 11 hours']
    """
    if seconds < 50:
        return "less than a minute"
    minutes = seconds / 60
    if minutes < 1.5:
        return "about a minute"
    if minutes < 100:
        return f"about {round(minutes) if minutes < 10 else 5 * round(minutes / 5)} minutes"
    hours = minutes / 60
    return f"about {hours:.1f} hours" if hours < 10 else f"about {hours:.0f} hours"

"""Numbers for people: three digits, two units, no overflow."""

import math

import pytest

from llamapro.formatting import format_bytes, format_count, format_duration, perplexity


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (7, "7"),
        (12.34, "12.3"),
        (999, "999"),
        (999.7, "1.00k"),
        (1000, "1.00k"),
        (9_996, "10.0k"),
        (41_234, "41.2k"),
        (999_400, "999k"),
        (999_500, "1.00M"),
        (1_258_291_200, "1.26B"),
        (15e12, "15.0T"),
        (2e15, "2000T"),
    ],
)
def test_counts_have_three_digits(n: float, text: str) -> None:
    """Counts step to the next unit before they would show a fourth digit."""
    assert format_count(n) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [(512, "512 B"), (1010, "0.99 KiB"), (1536, "1.50 KiB"), (65_712_999_629, "61.2 GiB")],
)
def test_sizes_are_in_binary_units(n: float, text: str) -> None:
    """1 KiB is 1024 bytes."""
    assert format_bytes(n) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (4.23, "4.2s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (187, "3m07s"),
        (3599.7, "1h00m"),
        (18_725, "5h12m"),
        (86_399, "1d00h"),
        (183_600, "2d03h"),
    ],
)
def test_durations_show_their_two_largest_units(seconds: float, text: str) -> None:
    """Rounding carries into the larger unit: never 60 seconds or 60 minutes."""
    assert format_duration(seconds) == text


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    """Losses too large for a float give infinity, not an exception."""
    assert perplexity(1.25) == math.exp(1.25)
    assert perplexity(1e4) == math.inf

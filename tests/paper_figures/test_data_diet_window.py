"""The claims of the window, from runs whose every effect is known."""

import made_up
import pytest
from made_up import WINDOW, claims_of, expected, failed, window

from paper_figures import data_diet_window

BEST = "best window without the hardest 5 % or more - hard at 30 % kept"
WITHOUT = "window without the hardest {} % - random at 30 % kept"


def test_the_claims_are_the_effects_put_in():
    expected(
        claims_of(data_diet_window, window()),
        {
            "hard - random at 30 % kept": (2.5, ">= +0.5", "claim"),
            BEST: (-1.0, "<= 0", "control"),
        },
    )


def test_with_wrong_labels_the_window_is_claimed():
    expected(
        claims_of(data_diet_window, window(0.2)),
        {
            "hard - random at 30 % kept": (-60.0, "<= -30", "claim"),
            WITHOUT.format(25): (13.0, ">= +4", "claim"),
            WITHOUT.format(5): (-40.0, "<= -10", "control"),
        },
        scale=made_up.NOISY_SCALE,
    )


@pytest.mark.parametrize(
    ("noise", "dropped", "points", "what"),
    [
        (0.0, 0.0, 0.4, ["hard - random at 30 % kept", BEST]),
        (0.0, 0.1, 2.6, [BEST]),
        (0.2, 0.0, 2.5, ["hard - random at 30 % kept"]),
        (0.2, 0.25, 3.9, [WITHOUT.format(25)]),
        (0.2, 0.05, -9.0, [WITHOUT.format(5)]),
    ],
)
def test_another_effect_does_not_hold(noise, dropped, points, what):
    run = window(noise, WINDOW[noise] | {dropped: points})
    assert failed(claims_of(data_diet_window, run)) == what


def test_the_nearest_window_is_named():
    above = {0.02: -55.0, 0.3: 12.0}
    claims = claims_of(data_diet_window, window(0.2, above))
    assert list(claims) == [
        "window without the hardest 30 % (nearest to 25 %) - random at 30 % kept",
        WITHOUT.format(2),
    ]
    assert claims_of(data_diet_window, window(0.0, {0.02: 1.0})) == {}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda r: made_up.without_rows(r, method="window"), "no rows for method 'window'"),
        (lambda r: made_up.without_rows(r, method="easy"), "no rows for method 'easy'"),
        (
            lambda r: made_up.without_rows(r, method="window", dropped=0.1, replica=2),
            r"'window', dropped 0.1 has \[0, 1, 3\], method 'full', dropped None has \[0, 1, 2, 3",
        ),
        (lambda r: made_up.without_array(r, "index"), "no array 'index'"),
    ],
)
def test_what_a_run_lacks_is_named(broken, message):
    with pytest.raises(ValueError, match=f"data_diet run \\w+.*{message}"):
        data_diet_window.measure([broken(window())])

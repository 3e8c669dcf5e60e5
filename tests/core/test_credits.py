"""Credit for stdin."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hutch.core.credits import Credit


@given(st.integers(0, 100), st.lists(st.tuples(st.booleans(), st.integers(0, 100)), max_size=50))
def test_never_more_is_drawn_than_was_granted(size: int, steps: list[tuple[bool, int]]) -> None:
    credit = Credit(size)
    granted, drawn = size, 0
    for grant, amount in steps:
        if grant:
            credit.grant(amount)
            granted += amount
        else:
            taken = credit.draw(amount)
            assert taken == min(amount, granted - drawn)
            drawn += taken
        assert credit.size == granted - drawn >= 0
    assert not credit.closed


def test_closing_is_for_good() -> None:
    credit = Credit(3)
    credit.close()
    credit.grant(5)
    assert credit.closed

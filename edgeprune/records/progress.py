"""How a step says how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Called with what is being done, how many items are done, and how many there are. A `what` may end with the unit
# ("measuring 14 token counts, round"), after which the command line puts "3 of 27". What is in brackets behind it
# may change while the work goes on.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""

"""Who is told how far a run is: the types of two callbacks, and no code."""

from __future__ import annotations

from collections.abc import Callable

# Of a whole run: party, phase, steps done, steps in all.
Progress = Callable[[str, str, int, int], None]
# Of one party: phase, steps done, steps in all.
Notify = Callable[[str, int, int], None]

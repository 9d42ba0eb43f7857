"""progress"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, str, int, int], None]


Notify = Callable[[str, int, int], None]

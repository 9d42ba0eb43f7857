"""What SIGINT, SIGTERM and SIGHUP become in a command."""

from __future__ import annotations

import signal


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP. Not a KeyboardInterrupt, which typer would end without a word.

    `then` says what can be done with what is left, where there is something.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number, self.then = number, ""

    def __str__(self) -> str:
        then = f"; {self.then}" if self.then else ""
        return f"interrupted by {signal.Signals(self.number).name}: nothing was left running{then}"

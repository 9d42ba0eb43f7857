"""Errors a user can act on.

Every error carries one line that says what happened, where, and what to do. The command line prints that line and
exits with `exit_code`; it never shows a traceback for these. No message may contain secret data: values of shares,
images, updates or keys never enter an exception.
"""

from __future__ import annotations

from collections.abc import Callable

# What to do when a peer's message is not what this version expects.
SAME_VERSION = "run the same version everywhere"
SAME_VERSION_AND_CONFIGURATION = "run the same version and configuration at every party"


def printable(text: str, longest: int) -> str:
    """At most so many characters of `text`, in one line, without what moves cursors, colours or reorders a terminal.

    For all that another party said: it is shown, logged and told on.
    """
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text[:longest].split()))


class MpcFlError(Exception):
    """Base of all errors with a one-line message for the user.

    `what` says what is wrong and where, `fix` says what to do about it.
    """

    exit_code = 1

    def __init__(self, what: str, fix: str = "") -> None:
        self.what = printable(what, len(what))
        self.fix = printable(fix, len(fix))
        super().__init__(f"{self.what}: {self.fix}" if self.fix else self.what)

    def reword(self, words: Callable[[str], str]) -> None:
        """Say the same in the words that people know (`chosen_names`): last of all, once other parties have been told."""
        self.what, self.fix = words(self.what), words(self.fix)
        self.args = (f"{self.what}: {self.fix}" if self.fix else self.what,)

    @property
    def for_peers(self) -> str:
        """What other parties may be told of it: no more than the user here, and nothing that describes this site."""
        return self.what


class ConfigError(MpcFlError):
    """The configuration cannot be used."""

    exit_code = 2


class DataError(MpcFlError):
    """Data are missing, unreadable or not of the configured form."""

    exit_code = 3

    @property
    def for_peers(self) -> str:
        """Without names and counts of files."""
        return "its data cannot be used"


class BrokenSealError(DataError):
    """A sealed file is not what was sealed with this key, or for this purpose."""


class PoolError(DataError):
    """A pool of correlations is missing, empty, damaged, in use, or another's."""

    @property
    def for_peers(self) -> str:
        """Without names of files."""
        return "its pool of correlations cannot be used"


class StorageError(MpcFlError):
    """A database of this party cannot be used: damaged, another's, locked, not writable, or its disk is full."""

    @property
    def for_peers(self) -> str:
        """Without names of files."""
        return "its records cannot be read or written now"


class ModelError(MpcFlError):
    """A model file or architecture cannot be used."""

    exit_code = 4


class UnsupportedLayerError(ModelError):
    """A layer has no encrypted counterpart."""


class HeadroomError(MpcFlError):
    """A value does not fit the fixed-point ring; raised before anything is sent."""

    exit_code = 5


class PrivacyBudgetError(MpcFlError):
    """The run would exceed a hospital's privacy budget; raised before the step that would."""

    exit_code = 6

    @property
    def for_peers(self) -> str:
        """Without figures: from epsilon, with the public noise and steps, follows how many patients a hospital has."""
        return "its privacy budget does not allow this run to go on"


class IdentityError(MpcFlError):
    """A key or certificate is missing, expired, or bound to another party."""

    exit_code = 7


class LinkError(MpcFlError):
    """A link to another party cannot be used."""

    exit_code = 8


class HandshakeError(LinkError):
    """Two parties do not agree on who they are or what they run."""


class PeerRefusedError(HandshakeError):
    """This party refused another one, whose certificate or greeting does not hold. `peer` names it."""

    def __init__(self, peer: str, what: str, fix: str = "") -> None:
        self.peer = peer
        super().__init__(what, fix)


class DisagreementError(HandshakeError):
    """A genuine peer runs another version, session, configuration or task."""


class PeerLostError(LinkError):
    """Another party went away or was late. `peer` names it; `cause` whom it blamed itself, which may be false, else the same."""

    def __init__(self, peer: str, what: str, fix: str = "", cause: str = "") -> None:
        self.peer, self.cause = peer, cause or peer
        super().__init__(what, fix)


class RefusedLinkError(HandshakeError, PeerLostError):
    """A peer that may be lost refuses this party, or was refused, within a run: it is lost like any other. `peer` names it."""

    def __init__(self, peer: str, what: str, fix: str = "") -> None:
        PeerLostError.__init__(self, peer, f"lost {peer}: {what}", fix)


class LeftOutError(PeerLostError):
    """The other hospitals go on without this one."""

    def __init__(self, me: str, what: str) -> None:
        super().__init__(
            me, f"{me} was left out of {what}; the others go on without it", f"see the log of {me} and theirs"
        )


class RefusedError(LinkError):
    """A party that serves others does not serve this one now; the line says when it may come back."""

    @property
    def for_peers(self) -> str:
        """All of it is meant for the peer."""
        return str(self)


class ProtocolError(MpcFlError):
    """A party sent something the protocol does not allow at this point. `by` names it where this party knows who it was."""

    exit_code = 9

    def __init__(self, what: str, fix: str = "", by: str = "") -> None:
        self.by = by
        super().__init__(what, fix)


class BrokenLinkError(ProtocolError, PeerLostError):
    """A peer sent what no link carries, so the link with it has ended: it deviated, and is lost like any other. `peer` names it."""

    def __init__(self, peer: str, what: str, fix: str = "") -> None:
        self.by = peer
        PeerLostError.__init__(self, peer, f"the link with {peer}: {what}", fix)


class QuorumError(MpcFlError):
    """Fewer hospitals are left than the agreed quorum; nothing more is opened."""

    exit_code = 12


class SumLostError(ProtocolError):
    """A sum can never be opened, because a party was lost that it needs; it is made anew. `lost` names it where it is known."""

    def __init__(self, what: str, fix: str = "", lost: str = "") -> None:
        self.lost = lost
        super().__init__(what, fix)


class SecrecyError(MpcFlError):
    """Code tried to look at a secret, or to draw a random value twice. Always a defect of the program."""

    exit_code = 10


class ExhaustedError(MpcFlError):
    """This machine ran out of something: space on a disk, files that a process may open, memory."""

    exit_code = 13

    @property
    def for_peers(self) -> str:
        """Without names of files."""
        return "its machine ran out of space, files or memory"


class RunFailedError(MpcFlError):
    """A launched run ended because a party failed; the message names the party and its reason."""

    exit_code = 11

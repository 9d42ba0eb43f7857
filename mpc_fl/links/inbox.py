"""What has arrived from one peer and nobody has taken yet, by tag, with what it takes of memory. Not locked: `mailboxes` does.

Memory is reckoned, not measured: a tensor takes its bytes, a JSON object many times those, and every frame something.
"""

from __future__ import annotations

import collections

import torch

from mpc_fl.links.frames import Frame

# A frame of one byte under a tag of its own takes about 1.5 kB. Lists in lists, the worst, take 52 bytes per byte (`[` and `]`).
_PER_FRAME, _PER_JSON_BYTE = 1 << 11, 64
_MOST_ENDED = 4096  # of tags whose late frames are dropped; what is older has arrived or never will


def memory_of(frame: Frame) -> int:
    """Bytes that an unread frame takes, or somewhat more."""
    return _PER_FRAME + frame.size * (1 if isinstance(frame.payload, torch.Tensor) else _PER_JSON_BYTE)


class EndedTags:
    """Tags and scopes for which nobody waits any more: the last few thousand."""

    def __init__(self) -> None:
        self._ended: collections.OrderedDict[str, None] = collections.OrderedDict()

    def add(self, tag: str) -> None:
        """A tag, or a scope: that ends with a slash and stands for all tags below it."""
        self._ended[tag] = None
        self._ended.move_to_end(tag)
        if len(self._ended) > _MOST_ENDED:
            self._ended.popitem(last=False)

    def __contains__(self, tag: str) -> bool:
        if not self._ended:
            return False
        slashes = [place for place, letter in enumerate(tag) if letter == "/"]
        return tag in self._ended or any(tag[: place + 1] in self._ended for place in slashes)


class Inbox:
    """Frames of one peer; those of a tag are taken in the order of their arrival. `unread` is what all take of memory."""

    def __init__(self) -> None:
        self._frames: dict[str, collections.deque[Frame]] = {}
        self.unread = 0

    def __contains__(self, tag: str) -> bool:
        return tag in self._frames

    def put(self, frame: Frame) -> None:
        """Keep a frame."""
        self._frames.setdefault(frame.tag, collections.deque()).append(frame)
        self.unread += memory_of(frame)

    def first(self, tag: str) -> Frame:
        """The first frame of a tag that has one; it stays."""
        return self._frames[tag][0]

    def take(self, tag: str) -> Frame:
        """The first frame of a tag that has one."""
        frames = self._frames[tag]
        frame = frames.popleft()
        if not frames:
            del self._frames[tag]
        self.unread -= memory_of(frame)
        return frame

    def forget(self, tag: str) -> None:
        """Drop what is there of a tag, or of all tags of a scope."""
        scope = tag.endswith("/")
        for known in [known for known in self._frames if known == tag or (scope and known.startswith(tag))]:
            self.unread -= sum(memory_of(frame) for frame in self._frames.pop(known))

    def clear(self) -> None:
        """Drop everything."""
        self._frames.clear()
        self.unread = 0

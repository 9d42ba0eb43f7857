"""Types that say what is secret.

`Private` holds a plaintext secret of this party (an update, an image, a count). `Shared` holds this party's share of
a value nobody knows. Neither can be printed, logged, compared, tested for truth, iterated or pickled by accident:
every such attempt raises `SecrecyError`.
"""

from __future__ import annotations

from typing import Any, Generic, NoReturn, TypeVar

from mpc_fl.errors import SecrecyError

T = TypeVar("T")


class _Guarded:
    """Refuses every operation that would show or copy the value."""

    __slots__ = ("_label",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, label: str) -> None:
        self._label = label

    @property
    def label(self) -> str:
        """What the value is, in public words."""
        return self._label

    def _refuse(self, *_: Any) -> NoReturn:
        raise SecrecyError(f"the secret '{self._label}' was shown, compared or copied outside of a protocol")

    __bool__ = __len__ = __iter__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __repr__ = __str__ = __format__ = __reduce__ = __reduce_ex__ = __float__ = __int__ = __index__ = _refuse
    __array__ = __copy__ = __deepcopy__ = __getitem__ = _refuse


class Private(_Guarded, Generic[T]):
    """A plaintext secret of this party. Only protocols read it, through `inside_protocol`."""

    __slots__ = ("_value",)

    def __init__(self, label: str, value: T) -> None:
        super().__init__(label)
        self._value = value

    def inside_protocol(self) -> T:
        """The plaintext, for the protocol that encodes, masks or trains with it."""
        return self._value


class Shared(_Guarded, Generic[T]):
    """This party's part of a secret-shared value (`ring.RingShare`, say). `opening.open_to` is the only way out."""

    __slots__ = ("_tensor",)

    def __init__(self, label: str, tensor: T) -> None:
        super().__init__(label)
        self._tensor = tensor

    def inside_protocol(self) -> T:
        """The share, for protocols that compute on shares."""
        return self._tensor

"""A module that takes 400 MB while it is imported, and gives them back."""

_held = bytearray(b"x") * 400_000_000
del _held

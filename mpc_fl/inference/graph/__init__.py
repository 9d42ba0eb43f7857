"""From a torch network to the list of operations that both engines evaluate on shares. No share, no secret, no CrypTen.

May use: `errors` and torch, nothing else of the project.

Begin with `tracing`: `trace` records a network as a `Trace` of `Operation`s, `simplify` rewrites it. `meanings` is the table
of what torch's layers and functions mean, and what to suggest where one has no counterpart.
"""

"""The engine `reference`: any supported network on CrypTen, exact to rounding, slower than `fast`.

May use: `inference.graph`, the shared parts of `inference` (results, inputs), `sharing`, `learning` and what lies below.
Nothing of `fast`. Importing it imports CrypTen.

Begin with `diagnosis`, the protocol of both parties. `network` is the network as layers on shares (`EncryptedGraph`),
`layers` makes each layer from an operation of `graph`, `approximations` holds the functions that shares cannot compute
exactly, `cost` counts rounds and bytes from shapes alone.
"""

"""What an evaluation uses up, made before an image is there, handed out once, and kept on two disks until then.

`correlations` lists it for a network and gives each party its part; `gate_correlation` does so for comparison gates, of which
`gate_correction` makes what a party cannot draw itself (`compiled_gates`: in C); `dealer` makes all of that; `cost` counts
messages and bytes from shapes. Batches that are kept lie in a `pool` (one party's half, of `sealed_file`s); `party_pools` is
how the two halves meet, `batch_place` where a batch lies in both.
Uses `fast.network`, `fast.kernels`, `crypto` and `links`. Begin with `correlations`.
"""

"""Arithmetic that one party does on its own share, without a message: nothing here knows a link.

`integer_linear` multiplies and convolves modulo 2^32, on top of `limbs`; `linear` holds what both parties compute of a layer with
hidden weights, and why that is secure; `bit_planes` packs bits of many values into words; `pooling` is windows, sums and
maxima. `compiled` loads a library of our own in C, where one was built, and convolves by it; its sources are in `native`. Uses
torch, numpy and `fast.network`. Begin with `linear`.
"""

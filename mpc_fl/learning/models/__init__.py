"""Networks: how they are made, written to files, flattened to vectors, evaluated.

Begin with `architectures.build_model`. `batch_norm` says what stands for BatchNorm, which mixes patients; `parameters` turns
a network into the vector that is summed; `evaluation` counts what a network gets right, so that counts add up over
hospitals; `rewriting` makes graphs pure. May use config, crypto and `learning.data`.
"""

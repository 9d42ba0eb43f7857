"""Networks: how they are made, written to files, flattened to vectors, evaluated.

Begin with `architectures.build_model`. `batch_norm` says what stands for BatchNorm, which mixes patients; `parameters` turns
a network into the vector that is summed; `evaluation` counts what a network gets right, so that counts add up over
hospitals; `rewriting` makes graphs pure, `splitting` cuts them before what is trained. Public backbones are `efficientnet_lite` and
`scattering`; weights of others are read by `foreign_weights`, kept by `weights_store` and brought by `published_weights`
(docs/models.md).

May use config, crypto and `learning.data`.
"""

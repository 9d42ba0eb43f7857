"""The steps of training, at one hospital and, for the optimizer, at the aggregator.

Begin with `dp_sgd.train_locally`: a round of private steps. It draws patients (`sampling`), clips their gradients
(`per_sample_gradients`, in several processes through `process_group`) and adds noise (`noised_optimizer`). Where the head
or the last layers alone are trained, `frozen_part` keeps what they read.
`server_optimizers` is what the aggregator makes of an opened mean. May use all other parts of `learning`.
"""

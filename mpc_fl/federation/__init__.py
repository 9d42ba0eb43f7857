"""Training together: the programs of hospital and aggregator, and one round of it from both sides.

Begin with `hospital_program.run`, then `hospital_round`: its docstring has the seven steps of a round. An update leaves
`hospital_round._local_steps` through `aggregation.quorum_sum.contribute`, which masks it (`SummandMasks.masked` in
`sharing.closed_sum`); with distributed noise it is every single gradient instead (`federated_sgd.hospital_steps`). The
aggregator's sides are `aggregator_program` and `aggregator_round`. What a party keeps over the rounds is in
`hospital_state` and `aggregator_state`.

May use everything below: aggregation, sharing, audit, links, learning, crypto, config. It needs nothing of inference.
"""

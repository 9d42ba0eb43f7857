"""Sums over hospitals that may be missing, and the check that no summand is too large.

May use: `sharing` and what lies below it; of `learning` only the noise mechanism, which bounds a summand. It knows nothing of
rounds or models: `federation` says what is summed and when.

Begin with `quorum_sum`: who is in a sum and when it is opened, after the masks of `sharing.closed_sum`; `rules` holds what all
agree on before, `words` how the aggregator leads, `mask_graph` who shares masks with whom when there are many, `mask_costs`
what that costs. Then the same without one, `peer_sum`: `slices`, who opens what; `slice_totals` and `linear_check`, how all
find out that it is right; `held_slices`, what each has of them; `signed_words`, that all hear the same. Then the check of
norms: `norm_bound`, how long an honest update can be; `norm_limits`, what that means for a `sketch`; `norm_proof`, what a
hospital proves of its sketch, over a `prime_field`; `proof_steps`, what it computes for that; `norm_check` and
`peer_norm_check`, the protocols that send it, with an aggregator and without; `shown_answers`, who deviates where a proof is
not accepted; `norm_plan`, which check a configuration asks for.
"""

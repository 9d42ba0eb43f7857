"""Sums over hospitals that may be missing, and the check that no summand is too large.

May use: `sharing` and what lies below it; of `learning` only the noise mechanism, which bounds a summand. It knows nothing of
rounds or models: `federation` says what is summed and when.

Begin with `quorum_sum`: who is in a sum and when it is opened, after the masks of `sharing.closed_sum`; `rules` holds what all
agree on before, `words` how the aggregator leads. Then the check: `norm_bound`, how long an honest update can be;
`norm_limits`, what that means for a `sketch`; `norm_check`, the protocol on shares; `norm_check_session`, which makes a CrypTen
world for it, only when a check runs.
"""

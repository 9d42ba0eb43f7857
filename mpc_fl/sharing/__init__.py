"""Computing on shares: what is masked, by what, and the one way out.

May use: `audit`, `links`, `crypto` and the ground (`errors`, `files`, `progress`, `compatibility`). It knows no
learning, no configuration and no role: parties are names, in rank order.

Begin with `opening`: a `SecretDomain`, and `open_to`, which alone reveals a value. Then
- `zero_shares`, the masks of shares, and `closed_sum`, the masks of sums that some hospitals may be missing from; `sum_plan` is
  what is public of these, with many hospitals in a `mask_circle`; `secure_sum` for sums among all. None of these needs CrypTen.
- `dealer` and `dealer_client`, who makes and who takes correlated randomness; `correlated_randomness` says what that is.
- `crypten_runtime`, CrypTen on all of this, in whose `domain` a tensor is opened; `crypten_parts` is the only module that
  imports CrypTen, `crypten_communicator` carries its messages, `dry_run` finds what a computation will ask of the dealer.
"""

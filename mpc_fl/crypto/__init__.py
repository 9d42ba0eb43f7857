"""What security rests on: types of secrets, the one source of randomness, the ring, certificates and their authority.

May use: the ground (`mpc_fl.errors`, `files`, `roles`) and the library `cryptography`; no links, no protocol.
Begin with `secrecy` (how a value is marked as secret), then `stream_cipher` (masks, shares and noise), `ring` (fixed-point
numbers that cannot wrap). Who a party is: `certificates` checks, `identity_files` keeps it on the party's disk, `authority`,
`authority_directory` and `certificate_record` are the administrator's side.
"""

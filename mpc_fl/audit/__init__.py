"""What was revealed: every opening of a secret-shared value is recorded before a share leaves, and signed by all parties.

May use: `mpc_fl.links`, `mpc_fl.crypto` and the ground; no protocol, so that anybody can check a ledger without one.
Begin with `opening_record` (what is said of an opening), then `reveal_ledger` (the hash chain of signed blocks),
`ledger_file` (a party's copy), `co_signing` (all sign one block), `ledger_audit` (who changed what). `receipts` are of diagnoses
by a model owner that stays up, signed by both sides; `receipt_file` keeps and `receipt_audit` checks them.
"""

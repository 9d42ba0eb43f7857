"""Differential privacy: what a release costs a patient, and integer noise that hospitals add in parts.

Begin with `accounting` (events, budgets, epsilon) and `privacy_ledger` (what a hospital has spent, on its disk).
`discrete_gaussian` samples, `distributed_gaussian` proves that parts of the noise add up to enough and that sums do not
wrap. May use crypto and the ground; nothing of data, models or training.
"""

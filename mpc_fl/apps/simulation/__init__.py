"""Simulation: the rounds of a whole federation in a few processes, for researchers who have many hospitals and one machine.

Nothing of training, privacy or sums is written anew. Each simulated hospital calls the functions of `federation` that a real one
calls, each masks its own summand with keys of its own, and what is opened is the sum of masked words. Left out is what stands
between parties that do not trust each other: links, certificates, signatures, deadlines of a network.

Begin with `simulation.simulate`, a whole run; `rounds` is the aggregator's side, `hospitals` that of a group of hospitals in one
process, `sums` what both know of a sum. `workers` says what the two need of whatever places groups on machines; `ray_workers` is
that, and alone imports Ray.
"""

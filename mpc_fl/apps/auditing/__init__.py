"""`mpc-fl audit`: runs made again in one process, with patients whose presence is then guessed from what was opened.

Training, noise, sums and accounting are those of `federation`, by the same groups of hospitals that a simulation has; the
mathematics of guesses is in `mpc_fl/evidence`. Begin with `privacy_audit.audit_privacy`.
"""

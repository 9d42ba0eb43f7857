"""What a run shows of patients, measured instead of argued: lower bounds beside the bounds that are proved.

Pure: numbers in, numbers out. It knows what releases and what an accountant claims are, and starts no run; `mpc_fl/apps/auditing`
trains again and hands over what was released. It may use everything below federation.

Begin with `one_run_bound`, the test that turns right guesses into a lower bound on epsilon; `guessing` says how many guesses are
made, `canary_scores` by what, `membership` what can be told of a model's own training records.
"""

"""The command line: `mpc-fl train | infer | serve | report | party | check | estimate | pki | bench | ledger | dealer`.

May use every package, but imports what a command needs when the command runs, so that `mpc-fl --help` and the processes of
a run, which import the entry point again, wait for nothing. Begin with `main` (errors become one line and an exit code) and
`commands` (the list of commands); each of the other modules holds the commands that its docstring names.
"""

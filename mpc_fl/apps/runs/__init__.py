"""Runs: parties placed, started and watched, and the directory in which a run keeps its files.

May use every package below `apps`. Begin with `local_runs`, whole runs on one machine; `launcher` starts the parties of a run
and ends them, `party_process` is what happens in each, `placement` says which party a process is that others started,
`estimate` what a run will cost.
"""

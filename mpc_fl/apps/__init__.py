"""Programs: what people and schedulers start. The top of the house; nothing below imports it.

`cli` is the command line, `runs` starts parties and keeps a run's directory, `report` draws a finished run, `bench` measures
parts beside what they replace. Here lie the forms in which these speak to each other: `summaries` and `rows` of finished
runs, `estimates` of runs to come, and `typed_json`, which reads them. May use every package. Begin with `cli.main`, then
`runs.local_runs`.
"""

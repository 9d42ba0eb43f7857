"""Benchmarks: parts of this project beside what they replace, on one machine, in the same run.

May use every package below `apps`, and what places local parties in `apps.runs`; its commands (`apps.cli.bench`), benchmarks/
and tests import it, nothing else. Every module begins with what it compares. Begin with `aggregation` or `inference`.
"""

"""The configuration of a run: one YAML file, validated and completed once, the same object for every party.

May use: `mpc_fl.errors`, `mpc_fl.roles`; nothing of torch, so that a command is checked before anything large is loaded.
Begin with `config.Config`, which puts the sections together (`data`, `training`, `privacy`, `protocols`, `deployment`) and
makes the digests that parties compare; `loading.load_config` reads a file.
"""

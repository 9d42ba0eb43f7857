"""Each module is one kind of attacker: a deviating party against unmodified honest ones, and what it does not get."""

"""Programs that deviate against unmodified honest ones: they get nothing, and the honest say who it was."""

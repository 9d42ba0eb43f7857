"""One program per role. Each runs in its own process, on its own machine or spawned by the launcher."""

"""mpc-fl: hospitals learn together and diagnose together on secret-shared tensors."""

__version__ = "0.1.0"

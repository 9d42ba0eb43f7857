"""mpc_fl/inference/graph"""

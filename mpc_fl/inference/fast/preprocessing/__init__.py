"""mpc_fl/inference/fast/preprocessing"""

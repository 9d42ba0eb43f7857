"""mpc_fl/inference/fast/online"""

"""mpc_fl/inference/fast/kernels"""

"""mpc_fl/inference/fast/quantization"""

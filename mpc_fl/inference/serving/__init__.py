"""mpc_fl/inference/serving"""

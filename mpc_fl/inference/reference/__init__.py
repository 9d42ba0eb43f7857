"""mpc_fl/inference/reference"""

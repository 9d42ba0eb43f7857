"""mpc_fl/inference"""

"""mpc_fl/learning/training"""

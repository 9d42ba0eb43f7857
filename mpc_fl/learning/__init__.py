"""mpc_fl/learning"""

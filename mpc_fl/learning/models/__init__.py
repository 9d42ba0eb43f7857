"""mpc_fl/learning/models"""

"""mpc_fl/learning/privacy"""

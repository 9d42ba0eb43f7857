"""mpc_fl/federation"""

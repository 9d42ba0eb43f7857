"""mpc_fl/crypto"""

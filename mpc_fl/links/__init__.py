"""mpc_fl/links"""

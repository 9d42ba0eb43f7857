"""mpc_fl/sharing"""

"""mpc_fl/config"""

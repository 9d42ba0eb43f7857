"""mpc_fl/apps/cli"""

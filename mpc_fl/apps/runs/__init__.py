"""mpc_fl/apps/runs"""

"""mpc_fl/apps/bench"""

"""mpc_fl/aggregation"""

"""mpc_fl/audit"""

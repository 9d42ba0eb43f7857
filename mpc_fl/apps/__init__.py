"""mpc_fl/apps"""

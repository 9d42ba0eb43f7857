"""mpc_fl/learning/data"""

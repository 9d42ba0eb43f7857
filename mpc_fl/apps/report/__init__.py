"""mpc_fl/apps/report"""

"""Predicts memory, FLOPs, traffic and time of a configuration on accelerators, without one."""

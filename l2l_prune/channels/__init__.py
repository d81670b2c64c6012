"""Whole channels: the network is physically small in sparse phases."""

"""Offline: read a checkpoint, choose bits, quantize, write a store."""

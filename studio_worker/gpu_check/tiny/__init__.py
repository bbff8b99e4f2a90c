"""Tiny random models of every family, written as the large ones are published.

What is proven with them is proven of names, layouts, quantisations, devices and modes; not of beauty.
"""

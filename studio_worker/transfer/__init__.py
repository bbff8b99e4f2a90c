"""The machinery under ``download.py``: requests, answers, ranges, and bytes that outlive the process.

Owns everything between an address and a staged file. Which file is wanted, and where it goes once it is
whole, is its callers' to say.
"""

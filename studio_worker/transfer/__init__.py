"""The machinery under ``download.py``: requests, answers, ranges, and bytes that outlive the process.

Owns everything between an address and a staged file: ``asking`` sends a request, ``answer`` brings its body,
``attempts`` says what it means for what is kept, ``holding`` and ``staging`` keep it, ``parallel`` fetches
large files over several connections, ``verifying`` judges. Which file is wanted, and where it goes once it is
whole, is its callers' to say.
"""

"""How this box talks to any other: which addresses it may, how it connects, what it trusts, who may come in.

Owns addresses, connections and certificates; knows no request, no file and no studio.
"""

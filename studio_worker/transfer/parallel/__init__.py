"""One file over several connections: how many, who fetches which piece, who takes over what is slow.

Owns the connections of one download. Whether another try may help, and what vouches for the bytes, it is not
to say.
"""

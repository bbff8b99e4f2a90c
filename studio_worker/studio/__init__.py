"""Everything that knows the studio's wire: frames, session rules, the socket, the HTTP calls."""

"""One module a revision. One that was released is never changed: the next one goes on from it."""

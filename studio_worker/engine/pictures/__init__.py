"""Pictures in and out: foreign bytes decoded at arm's length, masks, greys, encoding of what was made."""

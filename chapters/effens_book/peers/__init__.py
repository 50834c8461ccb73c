"""How fast `effens` is beside others that do the same: ``python -m effens_book.peers`` times them in turns."""

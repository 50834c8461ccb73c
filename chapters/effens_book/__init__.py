"""The book's workshop: what only its chapters need. The library, `effens`, never imports it."""

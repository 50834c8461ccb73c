"""Run the studies that are missing."""

from effens_book.studies import main

main()

"""Run the benchmark."""

from effens_book.benchmark.run import main

main()

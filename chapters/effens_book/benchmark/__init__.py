"""Every method on the same tasks, with the same tuning and seeds: the book's one source of numbers over several seeds.

To read results: `Benchmark`. To add a method, write one function that trains it and register it with `method`; then
``python -m effens_book.benchmark`` tunes and runs it. What a task, a method and a run are stands in `tasks`,
`methods` and `run`.
"""

from effens_book.benchmark.methods import METHODS, method
from effens_book.benchmark.report import Benchmark, shipped
from effens_book.benchmark.results import RESULTS, Comparison, Interval, interval
from effens_book.benchmark.tasks import TASKS, Task

__all__ = [
    "METHODS",
    "RESULTS",
    "TASKS",
    "Benchmark",
    "Comparison",
    "Interval",
    "Task",
    "interval",
    "method",
    "shipped",
]

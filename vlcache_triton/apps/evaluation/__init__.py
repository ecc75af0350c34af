"""Does a compressed cache answer as the full one does? Questions, policies, and their scores."""

from .decode import Query, prefill
from .items import SUITES, Item, Suite, encode_form, form_item, read_items
from .markdown import report
from .plots import plot, plot_first
from .run import evaluate_item, read_results, run
from .summary import MEAN, Cell, names, summarise
from .variants import BUDGETS, Comparison, Variant, compare_all

__all__ = [
    "BUDGETS",
    "MEAN",
    "SUITES",
    "Cell",
    "Comparison",
    "Item",
    "Query",
    "Suite",
    "Variant",
    "compare_all",
    "encode_form",
    "evaluate_item",
    "form_item",
    "names",
    "plot",
    "plot_first",
    "prefill",
    "read_items",
    "read_results",
    "report",
    "run",
    "summarise",
]

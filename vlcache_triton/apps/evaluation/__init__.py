"""Does a compressed cache answer as the full one does? Questions, policies, and their scores."""

from .decode import Query
from .items import SUITES, Item, Suite, encode_form, form_item, read_items
from .markdown import report
from .plots import plot
from .run import compare_all, evaluate_item, read_results, run
from .summary import ALL_SUITES, Cell, names, summarise
from .variants import BUDGETS, Variant, ablation, ceiling, rivals, with_rows

__all__ = [
    "ALL_SUITES",
    "BUDGETS",
    "SUITES",
    "Cell",
    "Item",
    "Query",
    "Suite",
    "Variant",
    "ablation",
    "ceiling",
    "compare_all",
    "encode_form",
    "evaluate_item",
    "form_item",
    "names",
    "plot",
    "read_items",
    "read_results",
    "report",
    "rivals",
    "run",
    "summarise",
    "with_rows",
]

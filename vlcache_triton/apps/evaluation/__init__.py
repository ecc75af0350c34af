"""Does a compressed cache answer as the full one does? Questions, policies, and their scores."""

from .items import SUITES, Item, Suite, encode_form, form_item, read_items
from .markdown import report
from .plots import plot, plot_first
from .recording import Query, Recording
from .run import evaluate_item, read_results, run
from .summary import MEAN, Cell, names, summarise
from .variants import BUDGETS, Comparison, Variant, compare_all

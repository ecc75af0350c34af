"""The paper's tables for any model, part by part: accuracy, ablations, sparsity, latency."""

from .latency import measure_latency
from .lmms import TASKS, has_lmms_eval, lmms_jobs, lmms_scores
from .page import Findings, write_page
from .parts import Parts
from .scores import Score, scores_of
from .sparsity import measure_sparsity
from .variants import ABLATED, ablated, curves

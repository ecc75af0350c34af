"""The form reader: a tiny vision-language model that reads synthetic forms, shipped as data.

It is there so that everything runs, and is judged on real answers, where no model hub is.
"""

from ..chat import chat
from .forms import draw_form
from .model import encode_chats, load_form_reader
from .pages import Field, Page, draw_pages
from .questions import MAX_ANSWER_TOKENS, TASKS, Dialogue, Question, Task, ask, draw_dialogue
from .render import render, render_form

__all__ = [
    "MAX_ANSWER_TOKENS",
    "TASKS",
    "Dialogue",
    "Field",
    "Page",
    "Question",
    "Task",
    "ask",
    "chat",
    "draw_dialogue",
    "draw_form",
    "draw_pages",
    "encode_chats",
    "load_form_reader",
    "render",
    "render_form",
]

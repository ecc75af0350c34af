"""A conversation about images, as processors' chat templates take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def chat(
    images: Sequence[Any], questions: Sequence[str], answers: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Messages for `processor.apply_chat_template`: the images stand in the first turn.

    Args:
        images: what the processor takes as an image, the pages in order.
        questions: the texts of the turns so far, the one to answer last.
        answers: of the turns before, one fewer than questions.
    """
    if len(answers) != len(questions) - 1:
        raise ValueError(
            f"answers: got {len(answers)}, expected {len(questions) - 1}, one fewer than questions"
        )
    messages = []
    for turn, question in enumerate(questions):
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if turn == 0:
            content = [{"type": "image", "image": image} for image in images] + content
        else:
            reply = {"type": "text", "text": answers[turn - 1]}
            messages.append({"role": "assistant", "content": [reply]})
        messages.append({"role": "user", "content": content})
    return messages

"""A second, independent source of pictures and questions, for judging the demo model on work that is not its training set's.

This package owns its geometry, palettes, layouts, words, phrasings and marking of replies. It knows nothing of how the training
script draws or asks, nor of any model: it imports none of that, so that the two cannot share a mistake.
"""

from collections.abc import Callable, Sequence

from held_out import conversations, scenes
from held_out.marking import is_right
from held_out.occasion import Occasion
from held_out.world import LANGUAGES, Item

__all__ = ["LANGUAGES", "TASKS", "Item", "is_right", "make_items"]

ASK: dict[str, Callable[[Occasion], Item]] = {
    "shape": scenes.ask_shape,
    "colour": scenes.ask_colour,
    "count": scenes.ask_count,
    "where": scenes.ask_where,
    "size": scenes.ask_size,
    "yes_no": scenes.ask_yes_no,
    "number": scenes.ask_number,
    "word": scenes.ask_word,
    "chart_best": scenes.ask_chart_best,
    "chart_height": scenes.ask_chart_height,
    "describe": scenes.ask_describe,
    "compare": conversations.ask_compare,
    "follow_up": conversations.ask_follow_up,
    "json": conversations.ask_json,
    "box": scenes.ask_box,
    "about": conversations.ask_about,
}
TASKS = tuple(ASK)


def make_items(number: int, seed: int, tasks: Sequence[str] = TASKS) -> list[Item]:
    """So many questions, the tasks in turn and the languages by rounds of them; the same for the same arguments."""
    items = []
    for i in range(number):
        rounds, which = divmod(i, len(tasks))
        turn, language = divmod(rounds, len(LANGUAGES))
        items.append(ASK[tasks[which]](Occasion(tasks[which], LANGUAGES[language], seed, turn)))
    return items

"""The held-out questions are dealt evenly, are the same for the same seed, and their marking is fair and strict."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "examples/demo_model"))
import evaluate
from held_out import LANGUAGES, TASKS, Item, is_right, make_items
from held_out.marking import HAN, read_box


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return make_items(96, seed=3)


def made(kind: str, answer: str, language: str = "en", task: str = "", question: str = "") -> Item:
    return Item(task or kind, language, kind, (question,), answer)


def test_every_task_comes_in_every_language_alike(items: list[Item]) -> None:
    assert len(TASKS) == 16
    assert Counter((item.task, item.language) for item in items) == {(t, lang): 3 for t in TASKS for lang in LANGUAGES}
    assert [item.task for item in items[: len(TASKS)]] == list(TASKS), "they are interleaved"
    for item in items:
        assert all(bool(HAN.search(turn)) == (item.language == "zh") for turn in item.turns), item.turns
        assert len(item.turns) == (2 if item.task == "follow_up" else 1)
        assert len(item.images) in {"compare": (2, 3), "about": (0,)}.get(item.task, (1,))
        for image in item.images:
            picture = Image.open(io.BytesIO(image))
            assert picture.format == "JPEG" and item.media_type == "image/jpeg"
            assert min(picture.size) >= 120 and max(picture.size) <= 1200


def test_the_seed_decides_and_a_choice_of_tasks_asks_the_same(items: list[Item]) -> None:
    some = make_items(12, 3, ("where", "chart_height"))
    assert some == make_items(12, 3, ("where", "chart_height")) != make_items(12, 4, ("where", "chart_height"))
    for task in ("where", "chart_height"):
        chosen = [item for item in some if item.task == task]
        assert chosen == [item for item in items if item.task == task][: len(chosen)]


def test_answers_are_dealt_so_that_guessing_does_not_pay() -> None:
    def answers(task: str, number: int) -> Counter[str]:
        return Counter(item.answer for item in make_items(number, 1, (task,)) if item.language == "en")

    assert answers("chart_height", 40) == {str(height): 2 for height in range(1, 11)}
    assert answers("yes_no", 24) == {"yes": 6, "no": 6}
    assert answers("count", 20) == {str(number): 1 for number in range(10)}


def test_every_items_own_answer_is_right_and_anothers_is_not(items: list[Item]) -> None:
    for item in items:
        assert is_right(item, item.answer), item
        assert not is_right(item, "") and not is_right(item, "?")
        assert not is_right(item, "Ich weiß es nicht."), item
    about = ("identity", "abilities", "beyond")
    for item, other in zip(items, items[32:], strict=False):  # of the same task and language, about other pictures
        if item.kind not in about and item.kind == other.kind and {item.answer, other.answer} != {"有", "是"}:
            assert is_right(item, other.answer) == (item.answer.lower() == other.answer.lower()), (item.answer, other.answer)


def test_the_other_language_is_wrong(items: list[Item]) -> None:
    for item in items:
        if item.kind in ("box", "number", "count", "letter", "word"):  # figures and letters that are read belong to both
            continue
        in_other = next((o.answer for o in items if o.kind == item.kind and o.language != item.language), None)
        assert in_other is None or not is_right(item, in_other), (item.answer, in_other)
    assert not is_right(made("count", "3"), "有三个。") and not is_right(made("count", "3", "zh"), "There are 3.")
    assert not is_right(made("letter", "B"), "B柱最高。") and not is_right(made("letter", "B", "zh"), "Bar B.")
    assert not is_right(made("word", "Apple", "zh"), "The word is Apple.")


TWO_BLUE, ZH_TWO_BLUE = "A red star and two blue circles.", "图中有一个红色的星形和两个蓝色的圆形。"
RIGHT = [
    (made("shape", "star"), ["A star.", "It is a star", "The red one is a STAR.", "stars"]),
    (made("shape", "cross"), ["A plus sign.", "The cross is larger than the circle.", "The cross is left of the red star."]),
    (made("shape", "星形", "zh"), ["星形。", "这是一个五角星", "星形比圆形大。", "圆形的左边是星形", "星形在圆形的左边。"]),
    (made("colour", "red"), ["Red.", "The star is red."]),
    (made("colour", "粉色", "zh"), ["粉色", "它是粉红色的。"]),
    (made("count", "2"), ["2", "Two.", "There are two red stars."]),
    (made("count", "0"), ["None.", "There are no stars.", "zero", "0"]),
    (made("count", "2", "zh"), ["2", "两个", "一共有2个三角形", "图中有二个十字形。"]),
    (made("count", "0", "zh"), ["没有", "0个", "零"]),
    (made("count", "7"), ["B is 7.", "The height of bar B is 7."]),
    (made("position", "top left"), ["In the top left corner.", "Upper-left", "top left"]),
    (made("position", "left"), ["On the left.", "middle left"]),
    (made("position", "centre"), ["In the center.", "In the middle of the picture."]),
    (made("position", "左上角", "zh"), ["左上角", "在图的左上方。", "左上"]),
    (made("position", "中间", "zh"), ["在图中间。", "中央"]),
    (made("side", "above"), ["Above.", "The star is above the circle."]),
    (made("side", "左边", "zh"), ["左边", "在圆形的左边。"]),
    (made("yes_no", "no"), ["No.", "No, there is not.", "no"]),
    (made("yes_no", "没有", "zh"), ["没有", "不是", "没有红色的星形。"]),
    (made("yes_no", "是", "zh"), ["是的", "有", "对。"]),
    (made("number", "4071"), ["4071", "The number is 4,071."]),
    (made("word", "Apple"), ["Apple", "apple", 'It says "APPLE".', "The word is 'Apple'."]),
    (made("word", "Apple", "zh"), ["Apple", "这个单词是 APPLE。"]),
    (made("letter", "B"), ["B", "Bar B is the tallest.", "B."]),
    (made("letter", "B", "zh"), ["B", "B柱最高。"]),
    (made("letter", "A"), ["A", "A is the tallest bar.", "Bar A."]),
    (made("picture", "picture 2"), ["picture 2", "The second picture.", "2", "The second one.", "Picture two has 3 shapes."]),
    (made("picture", "第二张", "zh"), ["第二张", "图2", "图二有三个星形", "第2张图。", "2"]),
    (made("description", TWO_BLUE), ["Two blue circles and a red star.", "3 shapes: a red star, a blue circle, a blue circle."]),
    (made("description", ZH_TWO_BLUE, "zh"), ["两个蓝色圆形和一个红色星形", "三个图形：红色的星形、蓝色的圆形和蓝色的圆形。"]),
    (made("identity", "I am demo."), ["I am demo, a small model.", "A model of vlserve."]),
    (made("identity", "我是 demo。", "zh"), ["我是vlserve的demo模型。"]),
    (made("abilities", "I name shapes and colours."), ["I can count shapes and read words."]),
    (made("beyond", "I can only talk about pictures of shapes."), ["Sorry, I know nothing but pictures with shapes."]),
    (made("beyond", "我只能谈论有形状的图片。", "zh"), ["抱歉，我不能回答，我只看图片。"]),
]  # fmt: skip
WRONG = [
    (made("shape", "star"), ["circle", "A star or a circle.", "A red one.", "hexagon"]),
    (made("shape", "square", task="size", question="Which is smaller?"), ["The square is larger than the star.", "The star."]),
    (made("shape", "圆形", "zh"), ["椭圆形", "圆形和星形"]),
    (made("colour", "red"), ["blue", "Red and blue.", "A star."]),
    (made("colour", "红色", "zh"), ["粉红色", "红色和蓝色"]),
    (made("count", "2"), ["3", "Two or three.", "many"]),
    (made("count", "3", "zh"), ["三角形", "两个三角形"]),
    (made("position", "top left"), ["top", "left", "top right", "bottom left"]),
    (made("position", "左上角", "zh"), ["左边", "右上角"]),
    (made("side", "left"), ["right", "left or right", "above"]),
    (made("yes_no", "yes"), ["No.", "Yes and no.", "Red."]),
    (made("yes_no", "有", "zh"), ["没有", "不是"]),
    (made("number", "4071"), ["407", "4071 or 4072", "40711"]),
    (made("word", "Apple"), ["Apples", "apple tree", "Appel"]),
    (made("letter", "B"), ["A", "A or B", "bar"]),
    (made("letter", "A"), ["A star.", "A or B"]),
    (made("picture", "picture 2"), ["picture 1", "The first picture, not the second.", "both"]),
    (made("picture", "第二张", "zh"), ["第一张", "第三张"]),
    (made("description", TWO_BLUE), ["A red star and a blue circle.", "A blue star, 2 red circles.", "A star and two circles."]),
    (made("identity", "I am demo."), ["I am a star."]),
    (made("abilities", "I name shapes and colours."), ["Yes.", "A red star."]),
    (made("beyond", "I can only talk about pictures of shapes."), ["Paris.", "No."]),
]  # fmt: skip


@pytest.mark.parametrize("right,replies", RIGHT, ids=lambda value: value.answer if isinstance(value, Item) else "")
def test_replies_that_are_right(right: Item, replies: list[str]) -> None:
    assert not [reply for reply in replies if not is_right(right, reply)]


@pytest.mark.parametrize("asked,replies", WRONG, ids=lambda value: value.answer if isinstance(value, Item) else "")
def test_replies_that_are_wrong(asked: Item, replies: list[str]) -> None:
    assert not [reply for reply in replies if is_right(asked, reply)]


def test_json_is_read_by_value() -> None:
    one, zh = made("json", '{"colour": "red"}'), made("json", '{"shape": "星形"}', "zh")
    for reply in ('{"colour": "red"}', '{"Color":"Red"}', '```json\n{"colour": "red"}\n```'):
        assert is_right(one, reply)
    for reply in (
        '{"colour": "blue"}',
        '{"shape": "red"}',
        "red",
        '{"colour": "red"',
        '["red"]',
        '{"colour": "红色"}',
        "3",
        "null",
    ):
        assert not is_right(one, reply)
    assert is_right(zh, '{"shape": "五角星"}') and not is_right(zh, '{"shape": "star"}')
    assert is_right(made("json", '{"count": 2}'), '{"count": "2"}') and not is_right(
        made("json", '{"count": 2}'), '{"count": null}'
    )
    things = [{"colour": "red", "shape": "star"}, {"colour": "blue", "shape": "circle"}]
    several = made("json", json.dumps(things))
    assert is_right(several, json.dumps(things[::-1]))
    assert not is_right(several, json.dumps(things[:1])) and not is_right(several, json.dumps([*things, things[0]]))


def test_boxes_need_half_of_what_they_cover() -> None:
    boxed = made("box", "<ref>star</ref><box>[[100, 100, 300, 300]]</box>")
    for reply in ("<ref>star</ref><box>[[100, 100, 300, 300]]</box>", "star[[110, 90, 310, 305]]", "[100, 100, 300, 210]"):
        assert is_right(boxed, reply)
    for reply in (
        "<box>[[100, 100, 300, 190]]</box>",
        "<box>[[300, 300, 100, 100]]</box>",
        "[[100, 100, 300]]",
        "[[100, 100, 300, 300]] [[400, 400, 500, 500]]",
        "[[1, 1, 1200, 1200]]",
    ):
        assert not is_right(boxed, reply)


def test_a_box_is_where_the_thing_was_drawn() -> None:
    for item in make_items(30, 11, ("box",)):
        box = read_box(item.answer)
        assert box is not None
        picture = Image.open(io.BytesIO(item.images[0])).convert("RGB")
        sides = (*picture.size, *picture.size)
        left, top, right, bottom = (edge * side / 1000 for edge, side in zip(box, sides, strict=True))
        assert max(right - left, bottom - top) >= min(picture.size) / 7 - 2
        inside = picture.crop((round(left), round(top), round(right), round(bottom)))
        assert max(high - low for low, high in inside.getextrema()) >= 25, "there is something in it"


def test_evaluate_asks_the_second_turn_after_the_models_own_first_reply(items: list[Item]) -> None:
    some = [item for item in items if item.task in ("follow_up", "about")][:8]
    batches: list[list[evaluate.Conversation]] = []

    def ask_all(conversations: list[evaluate.Conversation]) -> list[str]:
        batches.append(conversations)
        return [f"reply to {conversation[-1]['content'][-1]}" for conversation in conversations]

    openings = [evaluate.opening(item, lambda image, media_type: {"image": image}) for item in some]
    replies = evaluate.converse(some, openings, ask_all)
    assert [len(batch) for batch in batches] == [8, sum(len(item.turns) == 2 for item in some)]
    for conversation in batches[1]:
        assert [message["role"] for message in conversation] == ["user", "assistant", "user"]
    assert all(len(said) == len(item.turns) for said, item in zip(replies, some, strict=True))


def test_evaluate_saves_and_compares(items: list[Item], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replies = [[*item.turns[1:], item.answer] for item in items]
    path = tmp_path / "saved.jsonl"
    evaluate.save(path, items, replies, [True] * len(items))
    saved = evaluate.read_saved(path, items)
    assert evaluate.compare(items, replies, saved) == 0
    assert evaluate.compare(items, [["another"], *replies[1:]], saved) == 1
    assert "'another'" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="give the same --number, --seed and --tasks"):
        evaluate.read_saved(path, [replace(items[0], turns=("Else?",)), *items[1:]])
    table = evaluate.tabulate(items, [item.language == "en" for item in items])
    assert table["all"] == table["word"] == {"en": 100.0, "zh": 0.0, "both": 50.0}

"""How held-out questions are put, by language: the plainest phrasing first, others after it."""

import random
import re

from held_out.world import SHAPES

SHORTER = re.compile(f"色的(?={'|'.join(SHAPES.values())}|图形)")
Degrees = dict[str, dict[str, tuple[str, ...]]]  # by language, the ways to say each
MORE: Degrees = {
    "en": {"larger": ("larger", "bigger"), "smaller": ("smaller",)},
    "zh": {"larger": ("大",), "smaller": ("小",)},
}
MOST: Degrees = {
    "en": {"largest": ("largest", "biggest"), "smallest": ("smallest",)},
    "zh": {"largest": ("最大",), "smallest": ("最小",)},
}
TALLEST: Degrees = {
    "en": {"tallest": ("tallest", "tallest", "highest"), "shortest": ("shortest", "shortest", "lowest")},
    "zh": {"tallest": ("最高",), "shortest": ("最矮", "最低")},
}
BESIDE = {"left": "left of", "right": "right of", "above": "above", "below": "below"}

PHRASINGS: dict[str, dict[str, str]] = {
    "shape": {
        "en": """What shape is the {colour} one?|Which shape is {colour}?|What is the shape of the {colour} one?
        Name the {colour} shape.|The {colour} one is what shape?|Tell me the shape of the {colour} thing.""",
        "zh": """{colour}的是什么形状？|{colour}的那个是什么形状？|{colour}的图形是什么形状？|哪个形状是{colour}的？
        请说出{colour}图形的形状。|图中{colour}的是哪种形状？""",
    },
    "lone shape": {
        "en": """What shape is this?|Which shape do you see?|What shape is in the picture?|Name this shape.
        What shape is shown here?|Tell me what shape this is.""",
        "zh": """这是什么形状？|图里是什么形状？|图中的图形是什么形状？|你看到什么形状？|这个图形是什么形状？
        请说出这个形状。""",
    },
    "colour": {
        "en": """What {k} is the {shape}?|Which {k} is the {shape}?|What is the {k} of the {shape}?|Name the {k} of the {shape}.
        The {shape} is what {k}?|Tell me the {k} of the {shape}.""",
        "zh": """{shape}是什么颜色？|{shape}是什么颜色的？|{shape}的颜色是什么？|图中的{shape}是什么颜色？
        请说出{shape}的颜色。|那个{shape}是哪种颜色？""",
    },
    "lone colour": {
        "en": """What {k} is this?|What {k} is this shape?|Which {k} is the shape?|What is the {k} of this shape?
        Name the {k} of this shape.|What {k} is the shape in the picture?""",
        "zh": """这是什么颜色？|这个图形是什么颜色？|图中的图形是什么颜色？|这个图形的颜色是什么？|请说出这个图形的颜色。
        它是什么颜色？""",
    },
    "count": {
        "en": """How many {many} are there?|How many {many} do you see?|Count the {many}.|How many {many} are in this image?
        How many {many} can you find in the picture?|What is the number of {many}?|How many {many} does the picture have?""",
        "zh": """有几个{one}？|图中有多少个{one}？|一共有几个{one}？|图里有几个{one}？|数一数有多少个{one}。
        请数出{one}的数量。|{one}有几个？""",
    },
    "position": {
        "en": """Where is the {the}?|Where in the picture is the {the}?|In which part of the picture is the {the}?
        What is the position of the {the}?|Which part of the image has the {the}?|Where do you see the {the}?""",
        "zh": """{one}在哪里？|{one}在图的什么位置？|{one}在哪个位置？|图中{one}在哪里？|请说出{one}的位置。
        {one}在图片的哪一部分？""",
    },
    "seen from": {
        "en": """Where is the {the}, seen from the {other}?|Seen from the {other}, where is the {the}?
        Where is the {the} compared to the {other}?|Where is the {the} relative to the {other}?
        Looking from the {other}, where is the {the}?""",
        "zh": """从{other}看，{one}在哪里？|{one}在{other}的哪一边？|{one}在{other}的什么方向？|相对于{other}，{one}在哪里？
        {one}在{other}的哪里？""",
    },
    "left or right": {
        "en": """Is the {the} left or right of the {other}?|Is the {the} to the left or to the right of the {other}?
        Left or right of the {other}: where is the {the}?|Is the {the} on the left or on the right of the {other}?""",
        "zh": """{one}在{other}的左边还是右边？|{one}是在{other}的左边，还是右边？|从{other}看，{one}在左边还是右边？
        相对于{other}，{one}在左边还是右边？""",
    },
    "above or below": {
        "en": """Is the {the} above or below the {other}?|Above or below the {other}: where is the {the}?
        Does the {the} lie above or below the {other}?|Seen from the {other}, is the {the} above or below?""",
        "zh": """{one}在{other}的上面还是下面？|{one}是在{other}的上面，还是下面？|从{other}看，{one}在上面还是下面？
        相对于{other}，{one}在上面还是下面？""",
    },
    "beside": {
        "en": """Which shape is {beside} the {other}?|What shape is {beside} the {other}?|Name the shape {beside} the {other}.
        What is the shape {beside} the {other}?|Tell me which shape is {beside} the {other}.""",
        "zh": """哪个图形在{other}的{side}？|{other}的{side}是什么形状？|{other}的{side}是什么图形？|什么图形在{other}的{side}？
        请说出{other}的{side}是什么形状。""",
    },
    "larger": {
        "en": """Which is {more}, the {the} or the {other}?|Which one is {more}, the {the} or the {other}?
        Which of them is {more}: the {the} or the {other}?|What is {more}, the {the} or the {other}?
        The {the} or the {other}: which is {more}?""",
        "zh": """哪个更{more}，{one}还是{other}？|{one}和{other}哪个更{more}？|{one}和{other}，哪个比较{more}？
        {one}还是{other}更{more}？|{one}与{other}相比，哪个更{more}？""",
    },
    "largest": {
        "en": """What is the {most} shape?|Which shape is the {most}?|Name the {most} shape.|What shape is the {most} one?
        Which is the {most} shape in the picture?|Tell me the {most} shape.""",
        "zh": """{most}的图形是什么？|哪个图形{most}？|{most}的是什么形状？|{most}的图形是什么形状？|请说出{most}的图形。
        图中{most}的是哪个图形？""",
    },
    "presence": {
        "en": """Is there {a}?|Is there {a} in this picture?|Can you see {a}?|Do you see {a} here?|Does the picture have {a}?
        Are there any {many}?|Is {a} shown here?|Can you find {a}?""",
        "zh": "有{one}吗？|图中有{one}吗？|有没有{one}？|图里有没有{one}？|这张图里有{one}吗？|图中能看到{one}吗？",
    },
    "more than": {
        "en": """Are there more than {number} {many}?|Do you see more than {number} {many}?
        Can you find more than {number} {many}?
        Does the picture have more than {number} {many}?|Are more than {number} {many} in the picture?""",
        "zh": """{one}多于{number}个吗？|有超过{number}个{one}吗？|图中{one}多于{number}个吗？|{one}比{number}个多吗？
        {one}的数量超过{number}个吗？""",
    },
    "check": {
        "en": """Is the {shape} {colour}?|Is the {shape} in this picture {colour}?|Is the {k} of the {shape} {colour}?
        Is it true that the {shape} is {colour}?""",
        "zh": "{shape}是{colour}的吗？|{shape}是不是{colour}的？|图中的{shape}是{colour}的吗？|{shape}的颜色是{colour}吗？",
    },
    "number": {
        "en": """What number is this?|Which number do you see?|Read the number.|What number is written here?
        What number does the picture show?|Tell me the number in the picture.""",
        "zh": "这是什么数字？|图中的数字是多少？|图里写的是什么数字？|请读出这个数字。|你看到什么数字？|这个数是多少？",
    },
    "word": {
        "en": """What word is this?|Read the word.|What does it say?|Which word is written here?|What word do you see?
        What word does the picture show?""",
        "zh": "这是什么单词？|图中写的是什么单词？|请读出这个单词。|图里是哪个单词？|你看到什么单词？|图中的单词是什么？",
    },
    "tallest": {
        "en": """Which bar is {most}?|Which bar is the {most}?|What is the label of the {most} bar?|Which is the {most} bar?
        Name the {most} bar.|Which letter has the {most} bar?""",
        "zh": """哪根柱子{most}？|哪个柱子{most}？|{most}的柱子是哪一个？|{most}的柱子是哪根？|图表中哪根柱子{most}？
        请说出{most}的柱子。""",
    },
    "height": {
        "en": """How tall is {label}?|How tall is bar {label}?|What is the height of bar {label}?|How high is {label}?
        What value does {label} have?|What is the value of bar {label}?""",
        "zh": """{label}有多高？|柱子{label}有多高？|{label}的高度是多少？|{label}的值是多少？|{label}这根柱子有多高？
        请读出{label}的高度。""",
    },
    "describe": {
        "en": """Describe the picture.|Describe this image.|What is in the picture?|Say what is in this picture.
        What does the picture show?|Tell me what you see.""",
        "zh": """描述一下这张图。|请描述这张图片。|图里有什么？|你看到了什么？|这张图里有哪些图形？|图片上画了什么？""",
    },
    "box": {
        "en": """Where is the {the}? Answer with a box.|Draw a box around the {the}.|Give the box of the {the}.
        Mark the {the} with a box.|Find the {the} and answer with a box.|Where is the {the}? Give a box.""",
        "zh": """请用方框标出{one}|{one}在哪里？请用方框回答。|用方框标出{one}。|请用方框标出{one}的位置。|给出{one}的方框。
        请用方框框出{one}。""",
    },
    "more": {
        "en": """Which picture has more shapes?|Which image has more shapes?|In which picture are there more shapes?
        Which of the two pictures has more shapes?|Are there more shapes in picture 1 or in picture 2?""",
        "zh": """哪张图的图形更多？|哪张图里的图形多？|哪一张图有更多的图形？|两张图中哪张的图形更多？
        哪张图片的图形比较多？""",
    },
    "most": {
        "en": """Which picture has the largest number of {many}?|Which picture has the most {many}?
        In which picture are there the most {many}?|Which image has the most {many}?|Where do you see the most {many}?""",
        "zh": """哪张图的{one}最多？|哪张图里的{one}最多？|哪一张图有最多的{one}？|{one}最多的是哪张图？
        哪张图片中{one}的数量最多？""",
    },
    "has": {
        "en": """Which picture has {a}?|Which picture shows {a}?|In which picture is there {a}?|Which image contains {a}?
        Which of the pictures has {a}?""",
        "zh": "哪张图有{one}？|哪张图里有{one}？|哪一张图中有{one}？|{one}在哪张图里？|哪张图片里能看到{one}？",
    },
    "same shape": {
        "en": """Do both pictures show the same shape?|Is it the same shape in both pictures?
        Is the shape in both pictures the same?|Do the two pictures have the same shape?""",
        "zh": "两张图的形状相同吗？|两张图里的形状一样吗？|两张图中是同样的形状吗？|这两张图的形状是不是相同？",
    },
    "same colour": {
        "en": """Do both pictures show the same {k}?|Is the {k} of the shape the same in both pictures?
        Do the shapes in the two pictures have the same {k}?|Are both shapes of the same {k}?""",
        "zh": "两张图的颜色相同吗？|两张图里图形的颜色一样吗？|两个图形是同样的颜色吗？|这两张图中图形的颜色是不是相同？",
    },
    "side": {
        "en": """What shape is on the {side}?|Which shape is on the {side}?|What is the shape on the {side}?
        Name the shape on the {side}.""",
        "zh": "{word}是什么形状？|{word}的是什么形状？|{word}是什么图形？|图的{word}是什么形状？",
    },
    "any": {
        "en": "Are there any {many}?|Do you see any {many}?|Are any {many} in the picture?|Can you find any {many}?",
        "zh": "有{one}吗？|图中有{one}吗？|有没有{one}？|图里有{one}吗？",
    },
    "its colour": {
        "en": "And what {k} is it?|What {k} is it?|Which {k} is it?|And its {k}?|What is its {k}?",
        "zh": "它是什么颜色？|那它是什么颜色？|它的颜色是什么？|是什么颜色的？|它是什么颜色的？",
    },
    "its position": {
        "en": """Where is it?|And where is it?|Where in the picture is it?|In which part of the picture is it?
        What is its position?""",
        "zh": "它在哪里？|那它在哪里？|它在图的什么位置？|它在哪个位置？|在哪里？",
    },
    "of them": {
        "en": "How many of them are there?|How many are there?|And how many of them are there?|How many do you see?",
        "zh": "有几个？|一共有几个？|有多少个？|那有几个？",
    },
    "in json": {
        "en": "Answer in JSON.|Answer as JSON.|Reply in JSON.|Give the answer as JSON.|Use JSON.",
        "zh": "请用JSON回答。|用JSON格式回答。|请以JSON格式回答。|用JSON回答。|请给出JSON。",
    },
    "list": {
        "en": """List the shapes as JSON.|List all shapes in JSON.|Give all shapes as JSON.|Write the shapes as a JSON list.
        Give me a JSON list of the shapes.""",
        "zh": """用JSON列出所有图形。|请用JSON列出图中的图形。|以JSON格式列出图形。|请用JSON格式列出所有图形。
        请列出所有图形，用JSON。""",
    },
    "identity": {
        "en": """Who are you?|What is your name?|What are you?|Which model are you?|Tell me who you are.
        Please introduce yourself.""",
        "zh": "你是谁？|你叫什么名字？|你是什么模型？|请告诉我你是谁。|请介绍一下你自己。|你叫什么？",
    },
    "abilities": {
        "en": """What can you do?|What can I ask you?|What are you good at?|How can you help me?
        What kind of questions can you answer?""",
        "zh": "你能做什么？|你会什么？|我可以问你什么？|你能帮我做什么？|你能回答什么问题？|你有什么功能？",
    },
    "beyond": {
        "en": """What is the capital of France?|Write a poem.|How is the weather today?|Tell me a joke.|Who wrote Hamlet?
        What time is it?
        How do I cook rice?|Write a Python program.|Which film should I watch?|Who won the last World Cup?|Tell me a story.
        How far away is the moon?|What is the meaning of life?|Who is the president of Brazil?|Sing me a song.
        How old is the Earth?""",
        "zh": """法国的首都是哪里？|写一首诗。|今天天气怎么样？|给我讲个笑话。|《红楼梦》是谁写的？|现在几点了？|怎么做米饭？
        写一个Python程序。|推荐一部电影。|谁赢了上一届世界杯？|讲一个故事。|月亮离我们有多远？|人生的意义是什么？|长江有多长？
        唱一首歌。|地球多少岁了？""",
    },
}


def ways(name: str, language: str) -> list[str]:
    """All phrasings of a question."""
    return [part.strip() for part in PHRASINGS[name][language].replace("\n", "|").split("|")]


def choose(rng: random.Random, name: str, language: str) -> str:
    """One of the phrasings, the first most often."""
    first, *others = ways(name, language)
    return first if rng.random() < 0.4 else rng.choice(others)


def casual(rng: random.Random, text: str) -> str:
    """As people type: now and then without the mark at the end, with a small letter first, or 红色星形 for 红色的星形."""
    text = text.rstrip("?.？。") if rng.random() < 0.12 else text
    text = SHORTER.sub("色", text) if rng.random() < 0.25 else text
    return text[0].lower() + text[1:] if text[1].islower() and rng.random() < 0.12 else text

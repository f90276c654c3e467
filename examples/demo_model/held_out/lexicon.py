"""How the things of a reply may be written, in both languages; those beyond the demo model's world are there to be wrong."""

from held_out.world import COLOURS, NUMBERS, SHAPES

Names = dict[str, str]  # from how it is written to what it is


def names(table: str) -> Names:
    """From lines "what it is: ways to write it"; the ways are parted by blanks."""
    lines = (line.split(":") for line in table.strip().splitlines())
    return {form: thing.strip() for thing, forms in lines for form in forms.split()}


SHAPE_NAMES: dict[str, Names] = {
    "en": {form: shape for shape in SHAPES for form in (shape, f"{shape}s")}
    | names("""
        cross: crosses plus
        diamond: rhombus
        oval: oval ellipse
        other shape: hexagon hexagons pentagon pentagons octagon octagons trapezium parallelogram arrow arrows moon moons ring
    """),
    "zh": {name: shape for shape, name in SHAPES.items()}
    | names("""
        circle: 圆 圆圈
        square: 方形 方块
        triangle: 三角
        star: 五角星 星星
        rectangle: 矩形
        cross: 十字 十字架 加号
        heart: 爱心
        oval: 椭圆 椭圆形
        other shape: 五边形 六边形 八边形 梯形 平行四边形 箭头 月亮 圆环
    """),
}
COLOUR_NAMES: dict[str, Names] = {
    "en": {colour: colour for colour in COLOURS}
    | names("""
        purple: violet
        other colour: grey gray cyan turquoise magenta beige gold silver
    """),
    "zh": {form: colour for colour, name in COLOURS.items() for form in (name, name[0])}
    | names("""
        pink: 粉红 粉红色
        orange: 橘色 橘黄色 橙黄色
        brown: 褐色 咖啡色
        other colour: 灰色 灰 青色 青 金色 银色
    """),
}
NUMBER_NAMES: dict[str, Names] = {
    "en": {name: str(value) for value, name in enumerate(NUMBERS["en"])} | {"zero": "0", "none": "0", "ten": "10"},
    "zh": {name: str(value) for value, name in enumerate("零一二三四五六七八九十")} | {"两": "2", "没有": "0"},
}
POSITION_NAMES = names("""
    left: left
    right: right
    top: top upper
    bottom: bottom lower
    centre: centre center middle
    above: above
    below: below
""")
SIDE_NAMES = names("""
    left: left
    right: right
    above: above over top upper
    below: below under beneath underneath bottom lower
""")
PICTURE_NAMES = names("""
    1: first 1st one 一
    2: second 2nd two 二
    3: third 3rd three 三
""")
ENDS = names("""
    end: shapes things objects there picture image 图形 形状
    1: a an
""")  # of what a number or colour before it can belong to; and what means one
NOT_A_NUMBER = names("""
    none: 一共 一种 一下
""")
FRAMING = """
a an and as here i image in is it it's letters of one picture read reads says see shown shows spelled spells text that the this
word written
"""
FRAME = frozenset(FRAMING.split())  # of a reply that says which word it reads

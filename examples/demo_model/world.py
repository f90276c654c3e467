"""What the demo model knows, in both languages: the names of shapes, colours and places, and the words that it learns to read."""

from __future__ import annotations

LANGUAGES = ("en", "zh")
SHAPES = {
    "circle": ("circle", "圆形"),
    "square": ("square", "正方形"),
    "triangle": ("triangle", "三角形"),
    "star": ("star", "星形"),
    "rectangle": ("rectangle", "长方形"),
    "diamond": ("diamond", "菱形"),
    "cross": ("cross", "十字形"),
    "heart": ("heart", "心形"),
}
COLOURS = {
    "red": ("red", "红色"),
    "green": ("green", "绿色"),
    "blue": ("blue", "蓝色"),
    "yellow": ("yellow", "黄色"),
    "black": ("black", "黑色"),
    "white": ("white", "白色"),
    "orange": ("orange", "橙色"),
    "purple": ("purple", "紫色"),
    "pink": ("pink", "粉色"),
    "brown": ("brown", "棕色"),
}
PLACES = {
    "top left": ("in the top left", "左上角"),
    "top": ("at the top", "上面"),
    "top right": ("in the top right", "右上角"),
    "left": ("on the left", "左边"),
    "centre": ("in the centre", "中间"),
    "right": ("on the right", "右边"),
    "bottom left": ("in the bottom left", "左下角"),
    "bottom": ("at the bottom", "下面"),
    "bottom right": ("in the bottom right", "右下角"),
}
SIDES = {
    "left": ("to the left of", "左边"),
    "right": ("to the right of", "右边"),
    "above": ("above", "上面"),
    "below": ("below", "下面"),
}
_WORDS = """
act add age air all ant apple arm art ask back bag ball band bank bath beach bean bear bed bee bell best big bike bird black
blank blue board boat body bone book boot born box boy brave bread break brick bridge bright bring brown brush build burn bus
busy button cake call calm camera camp candle car card care carpet castle cat chair chalk change cheese cherry chess child
circle city class clean clear climb clock close cloud coat coffee cold colour cook copper corn cotton cover cow cream cross
crowd crown cup cut dance dark day deep desk dinner dish doctor dog door dragon draw dream dress drink drive drum dry duck
dust eagle ear earth east easy edge egg eight engine evening eye face fact fair fall family farm fast father feather field
fire fish five flag flat floor flower fly fog food foot forest fork four fox free fresh friend frog front fruit full game
garden gate ghost giant gift girl glass glove goat gold good grape grass gray green ground group grow guest guitar hair hall
hammer hand happy harbor hard hat head heart heavy help hill history hold home honey hope horse hot hotel house human ice
idea inch iron island jacket jelly job join juice jump jungle keep kettle key kind king kiss kitchen kite knee knife knot
lady lake lamp land large last laugh leaf learn left leg lemon letter lift light line lion lip list little lock long look
loud love low lucky lunch machine magic mail make map market match meal meat metal milk mind mirror money monkey month moon
morning mother mouse mouth move music nail name narrow near neck needle nest new night nine noise north nose note number ocean
office oil old one onion open orange orchard oven owl page paint pair palm paper park party path pear pen pencil people piano
picture pig pillow pilot pink pipe place plane plant plate play pocket poem point pond pool post potato powder press price
prince proud puzzle queen quick quiet quiz rabbit radio rain read red rest rice rich ride right ring river road robot rock
roof room root rope rose round ruler run safe sail salt sand school sea season seed seven shade shape sharp sheep shelf ship
shirt shoe shop short silver sing sister sit six size skin sky sleep slow small smile smoke snake snow soap sock soft song
soup south space speak spoon sport spring square stage stamp star stone storm story strong sugar summer sun sweet swim table
tail tall taste taxi teach team ten tent test thin three tiger time tiny toast today tomato tooth top tower town toy train
travel tree true turn turtle two uncle under valley velvet village violet voice walk wall warm wash watch water wave way week
well west wet wheel white wide wind window wine winter wise wolf wood wool word work world write yard year yellow yes young
zebra zero zone zoo
"""
WORDS = tuple(_WORDS.split())


def name(key: str, language: str) -> str:
    """A shape's or colour's name; raises KeyError for another key."""
    return (SHAPES | COLOURS)[key][LANGUAGES.index(language)]

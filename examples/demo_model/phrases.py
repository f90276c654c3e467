"""How questions are worded in training, and the one form of each answer; English and Chinese."""

from __future__ import annotations


def _lines(en: str, zh: str) -> dict[str, tuple[str, ...]]:
    """Phrasings by language, which are parted by a bar or a new line."""
    return {"en": _split(en), "zh": _split(zh)}


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for line in text.strip().splitlines() for part in line.split("|"))


PHRASES = {
    "lone shape": _lines(
        """
        What shape is this?|What shape is it?|Which shape do you see?|What is the shape in the picture?|Name the shape.
        What shape is in the picture?|What shape is shown here?|Can you tell me the shape?|Tell me what shape this is.
        """,
        """
        这是什么形状？|图中是什么形状？|图里是什么图形？|这是什么图形？|你看到什么形状？|说出这个形状。|请问这是什么形状？
        """,
    ),
    "shape": _lines(
        """
        What shape is the {colour} one?|What shape is {colour}?|Which shape is {colour}?|What is the {colour} shape?
        What shape is the {colour} thing?|The {colour} one is what shape?|Name the {colour} shape.
        Tell me the shape of the {colour} object.|What is the shape of the {colour} one?
        What kind of shape is the {colour} one?
        """,
        """
        {colour}的是什么形状？|{colour}的图形是什么形状？|什么形状是{colour}的？|{colour}的是什么图形？|哪个形状是{colour}的？|说出{colour}图形的形状。
        请问{colour}的那个是什么形状？|{colour}的那个是什么？
        """,
    ),
    "lone colour": _lines(
        """
        What colour is it?|What color is it?|What colour is this?|Which colour is the shape?|Name the colour.
        What colour is the shape?|What is its colour?|Tell me the colour.
        """,
        """
        它是什么颜色？|这是什么颜色？|图形是什么颜色的？|说出颜色。|这个图形是什么颜色？|请问是什么颜色？
        """,
    ),
    "colour": _lines(
        """
        What colour is the {thing}?|What color is the {thing}?|Which colour is the {thing}?
        What is the colour of the {thing}?|Tell me the colour of the {thing}.|The {thing} is what colour?
        Name the colour of the {thing}.|What colour does the {thing} have?|What's the color of the {thing}?
        Can you tell me the colour of the {thing}?|Look at the {thing}. What colour is it?
        """,
        """
        {thing}是什么颜色？|{thing}是什么颜色的？|{thing}的颜色是什么？|请问{thing}是什么颜色？|说出{thing}的颜色。|告诉我{thing}的颜色。|图中的{thing}是什么颜色？
        {thing}是哪种颜色？|看{thing}，它是什么颜色？
        """,
    ),
    "count": _lines(
        """
        How many {things} are there?|How many {things} do you see?|How many {things} can you see?|Count the {things}.
        How many {things} are in the picture?|What is the number of {things}?|Tell me how many {things} there are.
        How many {things}?|How many {things} does the picture have?|How many {things} can you find?
        """,
        """
        有几个{things}？|图中有几个{things}？|有多少个{things}？|图里有多少个{things}？|数一数{things}有几个。|一共有几个{things}？|{things}有几个？
        你看到几个{things}？|请数一数{things}。|{things}的数量是多少？
        """,
    ),
    "more than": _lines(
        """
        Are there more than {number} {things}?|Do you see more than {number} {things}?
        Does the picture have more than {number} {things}?|Are there over {number} {things}?
        """,
        """
        {things}多于{number}个吗？|有超过{number}个{things}吗？|{things}超过{number}个吗？|图中有{number}个以上的{things}吗？
        """,
    ),
    "presence": _lines(
        """
        Is there {thing}?|Is there {thing} in the picture?|Do you see {thing}?|Can you see {thing}?
        Does the picture have {thing}?|Is there {thing} here?|Does the picture show {thing}?|Can you find {thing}?
        Is {thing} in the picture?|Are there any {things}?|Do you see any {things}?|Are there {things} in the picture?
        """,
        """
        有{thing}吗？|图中有{thing}吗？|图里有没有{thing}？|你看到{thing}了吗？|这里有{thing}吗？|有没有{thing}？|能看到{thing}吗？|图中能找到{thing}吗？
        """,
    ),
    "is colour": _lines(
        """
        Is the {thing} {colour}?|Is the colour of the {thing} {colour}?|Do you see that the {thing} is {colour}?
        Is it true that the {thing} is {colour}?
        """,
        """
        {thing}是{colour}的吗？|{thing}是{colour}吗？|{thing}的颜色是{colour}吗？|{thing}是不是{colour}的？
        """,
    ),
    "where": _lines(
        """
        Where is the {thing}?|Where is the {thing} in the picture?|Where do you see the {thing}?
        In which part of the picture is the {thing}?|Tell me where the {thing} is.|Where can I find the {thing}?
        What is the position of the {thing}?|Which part of the picture is the {thing} in?
        """,
        """
        {thing}在哪里？|{thing}在哪儿？|{thing}在图的哪里？|{thing}在什么位置？|{thing}在图中的什么位置？|请问{thing}在哪里？|告诉我{thing}的位置。|{thing}位于哪里？
        """,
    ),
    "relative": _lines(
        """
        Where is the {thing}, seen from the {other}?|Where is the {thing} relative to the {other}?
        On which side of the {other} is the {thing}?|Where is the {thing} compared to the {other}?
        Where is the {thing} from the {other}?|From the {other}, where is the {thing}?
        With respect to the {other}, where is the {thing}?
        """,
        """
        {thing}在{other}的哪边？|{thing}在{other}的什么位置？|从{other}看，{thing}在哪边？|{thing}在{other}的哪个方向？|相对于{other}，{thing}在哪里？
        """,
    ),
    "left or right": _lines(
        """
        Is the {thing} left or right of the {other}?|Is the {thing} to the left or to the right of the {other}?
        Is the {thing} on the left or the right of the {other}?
        """,
        """
        {thing}在{other}的左边还是右边？|{thing}在{other}左边还是右边？
        """,
    ),
    "above or below": _lines(
        """
        Is the {thing} above or below the {other}?|Is the {thing} higher or lower than the {other}?
        Is the {thing} above the {other} or below it?
        """,
        """
        {thing}在{other}的上面还是下面？|{thing}在{other}上面还是下面？|{thing}在{other}的上方还是下方？
        """,
    ),
    "is side": _lines(
        """
        Is the {thing} {side} the {other}?|Do you see the {thing} {side} the {other}?
        Is it true that the {thing} is {side} the {other}?
        """,
        """
        {thing}在{other}的{side}吗？|{thing}是不是在{other}的{side}？|{thing}在{other}{side}吗？
        """,
    ),
    "neighbour": _lines(
        """
        What is {side} the {other}?|Which shape is {side} the {other}?|What shape is {side} the {other}?
        What do you see {side} the {other}?
        """,
        """
        {other}的{side}是什么？|{other}{side}是什么图形？|{other}的{side}是什么形状？|什么图形在{other}的{side}？
        """,
    ),
    "edge": _lines(
        """
        What is {place}?|What shape is {place}?|Which shape is {place}?|What do you see {place}?
        Which shape is the one {place}?|What is the shape {place}?
        """,
        """
        {place}是什么？|{place}是什么形状？|{place}的图形是什么？|图的{place}是什么图形？|最{place}的是什么？
        """,
    ),
    "larger": _lines(
        """
        Which is larger, the {thing} or the {other}?|Which is bigger, the {thing} or the {other}?
        Is the {thing} or the {other} larger?|What is bigger, the {thing} or the {other}?
        Which one is larger: the {thing} or the {other}?|Of the {thing} and the {other}, which is larger?
        """,
        """
        {thing}和{other}哪个大？|{thing}和{other}哪个更大？|哪个更大，{thing}还是{other}？|{thing}大还是{other}大？|{thing}与{other}相比，哪个大？
        """,
    ),
    "smaller": _lines(
        """
        Which is smaller, the {thing} or the {other}?|Is the {thing} or the {other} smaller?
        What is smaller, the {thing} or the {other}?|Which one is smaller: the {thing} or the {other}?
        Of the {thing} and the {other}, which is smaller?
        """,
        """
        {thing}和{other}哪个小？|{thing}和{other}哪个更小？|哪个更小，{thing}还是{other}？|{thing}小还是{other}小？|{thing}与{other}相比，哪个小？
        """,
    ),
    "largest": _lines(
        """
        What is the largest shape?|Which shape is the largest?|Which shape is the biggest?|What is the biggest shape?
        Name the largest shape.|Which one is the largest?|What is the largest thing in the picture?
        """,
        """
        最大的图形是什么？|哪个图形最大？|最大的是什么？|哪个形状最大？|图中最大的图形是什么？|最大的形状是哪个？
        """,
    ),
    "smallest": _lines(
        """
        What is the smallest shape?|Which shape is the smallest?|Name the smallest shape.|Which one is the smallest?
        What is the smallest thing in the picture?|What is the tiniest shape?
        """,
        """
        最小的图形是什么？|哪个图形最小？|最小的是什么？|哪个形状最小？|图中最小的图形是什么？|最小的形状是哪个？
        """,
    ),
    "describe": _lines(
        """
        Describe the picture.|What is in the picture?|What do you see?|Describe this image.|What does the picture show?
        Describe the picture in one sentence.|What is in this image?|What can you see in the picture?
        Tell me what you see.|Say what is in the picture.
        """,
        """
        描述这张图。|图里有什么？|你看到什么？|图中有什么？|请描述这张图片。|用一句话描述图片。|这张图里有什么？|你看到了什么？|说说图里有什么。|请用一句话描述这张图。
        """,
    ),
    "each colour": _lines(
        """
        What colours are {things}?|Tell me the colours of {things}.|Which colours do {things} have?
        """,
        """
        {things}是什么颜色？|{things}分别是什么颜色？|说出{things}的颜色。
        """,
    ),
    "each place": _lines(
        """
        Where are {things}?|Tell me where {things} are.|In which parts of the picture are {things}?
        """,
        """
        {things}在哪里？|{things}分别在哪里？|说出{things}的位置。
        """,
    ),
    "box": _lines(
        """
        Where is the {thing}? Answer with a box.|Where is the {thing}? Give its box.|Give the box of the {thing}.
        Give the bounding box of the {thing}.|Draw a box around the {thing}.|What is the bounding box of the {thing}?
        Mark the {thing} with a box.|Please provide the bounding box coordinates of the {thing}.
        Find the {thing} and give its box.|Where is the {thing}? Give the coordinates.
        """,
        """
        {thing}在哪里？请给出方框。|用方框标出{thing}。|请用方框标出{thing}。|给出{thing}的方框。|给出{thing}的坐标。|{thing}的方框是什么？|框出{thing}。
        请框出{thing}的位置。|{thing}在哪里？用方框回答。
        """,
    ),
    "json list": _lines(
        """
        List the shapes as JSON.|List all shapes as JSON.|Describe the picture as JSON.|Give the shapes in JSON.
        What is in the picture? Answer in JSON.|Which shapes do you see? Answer in JSON.|List what you see as JSON.
        Return the shapes as a JSON list.
        """,
        """
        用JSON列出图形。|用JSON列出所有图形。|用JSON描述图片。|图里有什么？用JSON回答。|以JSON格式列出图形。|请用JSON列出你看到的图形。|图中有哪些图形？请用JSON回答。
        """,
    ),
    "as json": _lines(
        """
        Answer in JSON.|Answer as JSON.|Reply in JSON.|Give JSON.|Use JSON.|Please answer in JSON.
        """,
        """
        用JSON回答。|请用JSON回答。|以JSON格式回答。|请以JSON格式回答。
        """,
    ),
    "text": _lines(
        """
        What does it say?|What is written here?|Read the text.|What is written in the picture?
        What does the picture say?|Read this.|What text is this?|Read it to me.
        """,
        """
        写的是什么？|图中写了什么？|读出文字。|这里写着什么？|图上写的是什么？|请读出来。|图片上写了什么？
        """,
    ),
    "number": _lines(
        """
        What number is this?|Which number is it?|Read the number.|What number is written here?|What number do you see?
        What is the number?|Which number is in the picture?|Tell me the number.
        """,
        """
        这是什么数字？|图中的数字是多少？|读出数字。|写的是什么数字？|这是多少？|数字是几？|你看到什么数字？|图上的数字是什么？
        """,
    ),
    "word": _lines(
        """
        What word is this?|Which word is it?|Read the word.|What word is written here?|What word do you see?
        What is the word?|Which word is in the picture?|Tell me the word.
        """,
        """
        这是什么单词？|图中的单词是什么？|读出单词。|写的是什么单词？|写的是哪个词？|你看到什么单词？|图上的单词是什么？|这是什么词？
        """,
    ),
    "tallest": _lines(
        """
        Which bar is tallest?|Which bar is the tallest?|Which is the tallest bar?|What is the tallest bar?
        Which bar is highest?|Which bar is the highest?|Name the tallest bar.|Which bar has the largest value?
        Which of the bars is the tallest?|What is the name of the tallest bar?|Which letter is the tallest bar?
        Which one is tallest?
        """,
        """
        哪个条最高？|最高的条是哪个？|哪根柱子最高？|最高的柱子是哪个？|哪个柱子最高？|最高的是哪个？|哪一个最高？|哪个的值最大？
        """,
    ),
    "shortest": _lines(
        """
        Which bar is shortest?|Which bar is the shortest?|Which is the shortest bar?|What is the shortest bar?
        Which bar is lowest?|Which bar is the lowest?|Name the shortest bar.|Which bar has the smallest value?
        """,
        """
        哪个条最低？|最低的条是哪个？|哪根柱子最矮？|最矮的柱子是哪个？|哪个柱子最低？|最低的是哪个？|哪一个最矮？|哪个的值最小？
        """,
    ),
    "height": _lines(
        """
        How tall is {bar}?|How high is {bar}?|How tall is bar {bar}?|How high is bar {bar}?
        What is the height of {bar}?|What is the value of {bar}?|What is the height of bar {bar}?
        Read the value of bar {bar}.|What value does {bar} have?
        """,
        """
        {bar}有多高？|{bar}的高度是多少？|{bar}的值是多少？|柱子{bar}有多高？|{bar}是多少？|条{bar}有多高？|{bar}的数值是多少？|读出{bar}的高度。
        """,
    ),
    "how many bars": _lines(
        """
        How many bars are there?|How many bars do you see?|Count the bars.|How many bars does the chart have?
        """,
        """
        有几个条？|有几根柱子？|图中有多少根柱子？|数一数柱子。
        """,
    ),
    "and colour": _lines(
        """
        And what colour is it?|What colour is it?|What color is it?|And its colour?|Which colour is it?
        And what color is that?|What is its colour?
        """,
        """
        它是什么颜色？|那它是什么颜色？|它是什么颜色的？|颜色呢？|它的颜色呢？|它的颜色是什么？|那是什么颜色？
        """,
    ),
    "and shape": _lines(
        """
        And what shape is it?|What shape is it?|And its shape?|Which shape is it?|What is its shape?
        """,
        """
        它是什么形状？|那它是什么形状？|形状呢？|它的形状呢？|它是什么图形？
        """,
    ),
    "and where": _lines(
        """
        And where is it?|Where is it?|Where in the picture is it?|And its position?|Where do you see it?
        """,
        """
        它在哪里？|那它在哪里？|它在哪儿？|位置呢？|它在图的哪里？|它在什么位置？
        """,
    ),
    "and count": _lines(
        """
        How many of them are there?|And how many of them are there?|How many of those do you see?|How many are there?
        How many?|And how many are there?|How many of them do you see?
        """,
        """
        有几个？|那有几个？|它们有几个？|一共有几个？|有多少个？|几个呢？|共有多少个？
        """,
    ),
    "and count of that": _lines(
        """
        How many are there of that shape?|How many of this shape are there?|How many such shapes are there?
        """,
        """
        这样的有几个？|这种图形有几个？|一共有几个这样的？|有几个这种形状？
        """,
    ),
    "and is": _lines(
        """
        Is it {colour}?|And is it {colour}?|Is that {colour}?
        """,
        """
        它是{colour}的吗？|它是{colour}吗？|那它是{colour}的吗？
        """,
    ),
    "which more": _lines(
        """
        Which picture has more {things}?|Which of the two has more {things}?
        Are there more {things} in picture 1 or in picture 2?|Which image has more {things}?
        Where are there more {things}, in the first or the second picture?
        """,
        """
        哪张图的{things}更多？|哪张图有更多的{things}？|第一张和第二张，哪张的{things}多？|哪张图里的{things}比较多？
        """,
    ),
    "which most": _lines(
        """
        Which picture has the most {things}?|Which of the pictures has the most {things}?
        Which image has the most {things}?|Which picture has the largest number of {things}?
        Which picture has more {things} than the others?
        """,
        """
        哪张图的{things}最多？|哪张图有最多的{things}？|哪一张的{things}最多？|哪张图里的{things}最多？
        """,
    ),
    "which has": _lines(
        """
        Which picture has {thing}?|In which picture is there {thing}?|Which picture shows {thing}?
        Which image has {thing}?|Which of the pictures has {thing}?
        """,
        """
        哪张图有{thing}？|哪张图里有{thing}？|{thing}在哪张图里？|哪一张有{thing}？
        """,
    ),
    "same shape": _lines(
        """
        Do both pictures show the same shape?|Is the shape the same in both pictures?|Are the two shapes the same?
        Do the pictures have the same shape?
        """,
        """
        两张图的形状相同吗？|两张图是同样的形状吗？|两个图形的形状一样吗？|两张图的形状一样吗？
        """,
    ),
    "same colour": _lines(
        """
        Do both pictures show the same colour?|Is the colour the same in both pictures?
        Do the two shapes have the same colour?|Are both shapes of the same colour?
        """,
        """
        两张图的颜色相同吗？|两张图是同样的颜色吗？|两个图形的颜色一样吗？|两张图的颜色一样吗？
        """,
    ),
}
NUMBERS = {
    "en": ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    "zh": ("零", "一", "两", "三", "四", "五", "六", "七", "八", "九", "十"),
}
OTHER_WORDS = {
    "en": (("picture", "image"), ("picture", "drawing"), ("colour", "color"), ("What is", "What's"), ("Name the", "Give the")),
    "zh": (
        ("图中", "图片里"),
        ("图里", "画面中"),
        ("图里", "图中"),
        ("张图", "张图片"),
        ("是什么", "是啥"),
        ("有几个", "有多少"),
    ),
}
OPENINGS = {
    "en": ("Please tell me, ", "Look at the picture. ", "Hey, ", "So, ", "Say, ", "Now ", "Look closely. ", "And "),
    "zh": ("请看图，", "请问，", "请告诉我，", "看看这张图，", "那么，", "麻烦看一下，", "现在，"),
}
ANSWERS = {
    "it is shape": {"en": "It is {shape}.", "zh": "它是{shape}。"},
    "shape": {"en": "The {colour} one is {shape}.", "zh": "{colour}的是{shape}。"},
    "it is colour": {"en": "It is {colour}.", "zh": "它是{colour}的。"},
    "colour": {"en": "The {thing} is {colour}.", "zh": "{thing}是{colour}的。"},
    "count": {"en": "There are {count} {things}.", "zh": "有{count}个{things}。"},
    "one": {"en": "There is {count} {things}.", "zh": "有{count}个{things}。"},
    "yes": {"en": "Yes.{rest}", "zh": "是的。{rest}"},
    "no": {"en": "No.{rest}", "zh": "不是。{rest}"},
    "there is": {"en": "Yes, there is {thing}.", "zh": "有，有{thing}。"},
    "there is no": {"en": "No, there is no {thing}.", "zh": "没有，没有{thing}。"},
    "none": {"en": "There is no {thing}.", "zh": "没有{thing}。"},
    "yes it is": {"en": "Yes, it is {colour}.", "zh": "是的，它是{colour}的。"},
    "no it is": {"en": "No, it is {colour}.", "zh": "不是，它是{colour}的。"},
    "where": {"en": "The {thing} is {place}.", "zh": "{thing}在{place}。"},
    "it is at": {"en": "It is {place}.", "zh": "它在{place}。"},
    "relative": {"en": "The {thing} is {side} the {other}.", "zh": "{thing}在{other}的{side}。"},
    "yes side": {"en": "Yes, the {thing} is {side} the {other}.", "zh": "是的，{thing}在{other}的{side}。"},
    "no side": {"en": "No, the {thing} is {side} the {other}.", "zh": "不是，{thing}在{other}的{side}。"},
    "neighbour": {"en": "The {thing}.", "zh": "是{thing}。"},
    "it is": {"en": "It is {thing}.", "zh": "是{thing}。"},
    "larger": {"en": "The {thing} is larger.", "zh": "{thing}更大。"},
    "smaller": {"en": "The {thing} is smaller.", "zh": "{thing}更小。"},
    "largest": {"en": "The {thing} is the largest.", "zh": "{thing}最大。"},
    "smallest": {"en": "The {thing} is the smallest.", "zh": "{thing}最小。"},
    "describe": {"en": "The picture shows {things}.", "zh": "图中有{things}。"},
    "number": {"en": "The number is {text}.", "zh": "数字是{text}。"},
    "word": {"en": "The word is {text}.", "zh": "单词是{text}。"},
    "tallest": {"en": "Bar {bar} is the tallest.", "zh": "{bar}最高。"},
    "shortest": {"en": "Bar {bar} is the shortest.", "zh": "{bar}最低。"},
    "height": {"en": "Bar {bar} is {height} high.", "zh": "{bar}的高度是{height}。"},
    "bars": {"en": "There are {count} bars.", "zh": "有{count}根柱子。"},
    "which more": {"en": "There are more in {picture}.", "zh": "{picture}更多。"},
    "which most": {"en": "There are the most in {picture}.", "zh": "{picture}最多。"},
    "which has": {"en": "It is {picture}.", "zh": "是{picture}。"},
}
TALK = {
    "who": _lines(
        """
        Who are you?|What are you?|What is your name?|Tell me about yourself.|What model are you?|Are you a person?
        Who made you?|Introduce yourself.|Are you ChatGPT?|Which model is this?
        """,
        """
        你是谁？|你是什么？|你叫什么名字？|介绍一下你自己。|你是什么模型？|你是人吗？|谁做了你？|请自我介绍。|这是什么模型？
        """,
    ),
    "can": _lines(
        """
        What can you do?|What can I ask you?|How can you help me?|What do you know?|What are your limits?
        What can you not do?|Help.|What should I ask?|What are you able to do?|What questions can you answer?
        How do I use you?
        """,
        """
        你能做什么？|你会什么？|我可以问你什么？|你可以做什么？|你能帮我什么？|你有什么限制？|你不能做什么？|帮助。|你能回答什么问题？|怎么用你？
        """,
    ),
    "hello": _lines(
        """
        Hello.|Hi!|Hello!|Good morning.|Hey.|Hi there.|Good evening.|Hello, how are you?|How are you?
        """,
        """
        你好。|你好！|您好。|早上好。|嗨！|晚上好。|你好吗？
        """,
    ),
    "thanks": _lines(
        """
        Thank you.|Thanks!|Thanks a lot.|Great, thank you.|Good job.|Well done.|Bye.|Goodbye.
        """,
        """
        谢谢。|谢谢你！|多谢。|很好，谢谢。|做得好。|再见。|非常感谢。
        """,
    ),
    "beyond": _lines(
        """
        What is the capital of France?|Write a poem.|Write a poem about the sea.|Tell me a joke.|What is 12 times 7?
        Who is the president?|Translate this into German.|What is the weather today?|How do I cook rice?
        Write code for me.|Write a Python function.|What is the meaning of life?|Who won the game?|Tell me a story.
        How old is the universe?|What time is it?|Explain gravity.|Who wrote Hamlet?|What is the price of gold?
        Sing a song.|Recommend a book.|What is love?|Where is Paris?|How far is the moon?|What is the largest country?
        Plan a trip to Rome.|What does a cat eat?|Can you drive a car?|Play chess with me.|Solve this equation.
        What is the news?|How many people live in China?|When was the war?|What is an atom?|Is it going to rain?
        Write an email to my boss.|Summarise this book.|What is a good name for a dog?|How do planes fly?
        Who painted the Mona Lisa?|What language do they speak in Brazil?|Give me some advice.|Do you like music?
        What is the square root of 16?|Why is the sky blue?|How do I learn English?|What should I eat?
        Which film is good?|What is the fastest animal?|Draw me a cat.|Make me a picture.|Who is this person?
        """,
        """
        法国的首都是哪里？|写一首诗。|讲个笑话。|12乘以7等于多少？|总统是谁？|今天天气怎么样？|怎么做米饭？|帮我写代码。|人生的意义是什么？|给我讲个故事。|宇宙有多老？|现在几点？|解释一下重力。|谁写了红楼梦？
        黄金多少钱？|唱一首歌。|推荐一本书。|什么是爱？|巴黎在哪里？|月亮有多远？|最大的国家是哪个？|猫吃什么？|你会开车吗？|陪我下棋。|有什么新闻？|中国有多少人？|什么是原子？|会下雨吗？|写一封邮件。|飞机怎么飞？
        你喜欢音乐吗？|天空为什么是蓝的？|怎么学英语？|我该吃什么？|哪部电影好看？|翻译这句话。|给我一些建议。|最快的动物是什么？|画一只猫。|这个人是谁？|北京在哪里？|长城有多长？|帮我做作业。|明天是星期几？|怎么减肥？
        """,
    ),
}
REPLIES = {
    "who": {
        "en": "I am the demo model of vlserve, a very small vision-language model.",
        "zh": "我是vlserve的演示模型，一个很小的视觉语言模型。",
    },
    "can": {
        "en": "I can answer questions about pictures of shapes, colours, numbers, words and bar charts. I know nothing else.",
        "zh": "我能回答关于图片的问题：形状、颜色、数字、单词和条形图。别的我不会。",
    },
    "hello": {"en": "Hello! Send me a picture and ask about it.", "zh": "你好！给我一张图片，问我问题吧。"},
    "thanks": {"en": "You are welcome.", "zh": "不客气。"},
    "beyond": {
        "en": "I cannot answer that. I can only talk about pictures of shapes, numbers, words and bar charts.",
        "zh": "这个我回答不了。我只会看形状、数字、单词和条形图的图片。",
    },
    "no picture": {"en": "I see no picture. Please send me one.", "zh": "我没有看到图片，请发给我一张。"},
}

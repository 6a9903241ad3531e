"""Rewording questions: in other words, and as carelessly as people type, with the same meaning."""

import random
import re
from typing import NamedTuple

from recipes.tiny.world.scene import COLOURS
from recipes.tiny.world.wider_questions import plural_of_thing


class Wording(NamedTuple):
    """One kind of question: how the world words it, and other wordings.

    Attributes:
        pattern: matches a whole question in lower case, with British spelling and without end marks.
        others: templates separated by semicolons, with the pattern's groups or keys of `CHOICES` in braces.
    """

    pattern: str
    others: str


CHOICES: dict[str, tuple[str, ...]] = {
    "pic": ("picture", "image", "picture", "image", "photo", "drawing"),
    "where": ("", "", "", "", " here", " in the picture", " in this picture", " in the image", " in this image"),
    "all": (" in total", " altogether", " all in all", " overall"),
    "tell": ("tell me", "please tell me", "can you tell me", "say", "could you tell me", "do you know"),
    "tallest": ("tallest", "highest", "biggest", "largest", "longest"),
    "shortest": ("shortest", "lowest", "smallest"),
    "list": ("list", "name", "enumerate", "give me", "tell me", "show me"),
    "sort": ("order", "sort", "rank", "arrange", "list"),
}
"""What a template's word in braces may stand for."""

SYNONYMS = {
    "left of": ("left of", "to the left of", "on the left of", "left from"),
    "right of": ("right of", "to the right of", "on the right of", "right from"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath", "underneath", "lower than"),
}
"""Other words for the side on which something is."""

_HOW_TALL = """
    which is the {w} bar{where}; what is the {w} bar{where}; {w} bar; the {w} bar; which one is the {w}; which
    of the bars is the {w}; which of the bars is {w}; name the {w} bar; {tell} which bar is the {w}; colour of
    the {w} bar; the colour of the {w} bar; find the {w} bar; the {w} bar is which one; what is the colour of
    the {w} bar; which bar in the chart is the {w}; what bar is the {w}; which colour is the {w} bar; {tell}
    what colour the {w} bar is; {w} bar colour; which column is the {w}
"""

WORDINGS = (
    Wording(
        r"(?:which bar is(?: the)?|what colour is the|which colour has the) (?:tallest|highest|biggest)(?: "
        r"bar)?",
        _HOW_TALL.replace("{w}", "{tallest}") + "; which bar has the greatest height",
    ),
    Wording(
        r"(?:which bar is(?: the)?|what colour is the|which colour has the) (?:shortest|lowest|smallest)(?: "
        r"bar)?",
        _HOW_TALL.replace("{w}", "{shortest}") + "; which bar has the least height",
    ),
    Wording(
        r"(?:what colour is the background(?: of the picture)?|what is the background colour|what is the "
        r"colour of the background|which colour does the background have)",
        """
        background colour; colour of the background; the background's colour; what is the background's
        colour; which colour is the background{where}; what colour has the background; name the background
        colour; {tell} the colour of the background; which colour is behind everything; the background is
        what colour; what colour is behind the rest; on what colour is it drawn; what colour is the
        background of the {pic}; in what colour is the background; background
        """,
    ),
    Wording(
        r"(?:what colour is the|what is the colour of the|which colour is the|which colour does the|tell me "
        r"the colour of the) (?P<x>[a-z]+)(?: have)?",
        """
        what is the {x}'s colour; colour of the {x}; the colour of the {x}; {x} colour; the {x}'s colour is;
        what colour has the {x}; can you name the colour of the {x}; the {x} is what colour; what colour is
        {x}; which colour has the {x}; {tell} what colour the {x} is; {tell} the {x}'s colour; {x}, which
        colour; do you know the colour of the {x}; say the colour of the {x}; in what colour is the {x}
        drawn; in which colour is the {x}; which colour is the {x}{where}; what colour is the {x}{where};
        what is the {x} colour; colour of {x}; name the colour of the {x}; what colour is that {x}; how is
        the {x} coloured; what colour does the {x} have{where}; what colour would you call the {x}; give me
        the colour of the {x}
        """,
    ),
    Wording(
        r"(?:what is the (?P<c>COLOUR) shape|what shape is (?P<d>COLOUR)|which shape is (?P<e>COLOUR)|what "
        r"shape is the (?P<f>COLOUR) (?:one|thing))",
        """
        what is the {c} one; what is the {c} thing; what is {c}; what is {c}{where}; name the {c} shape; the
        {c} thing is what; {c} shape; the {c} shape; which kind of shape is {c}; the {c} shape is what; what
        is the {c} object; {tell} what shape is {c}; what shape does the {c} one have; which shape is
        {c}{where}; what sort of shape is the {c} one; what form has the {c} thing; what is the shape of the
        {c} thing; what shape has the colour {c}; the {c} one is which shape; which shape has been drawn in
        {c}; what is drawn in {c}
        """,
    ),
    Wording(
        r"where (?:is|can i find) the (?P<x>[a-z ]+?)(?: in the (?:picture|image))?",
        """
        position of the {x}; the position of the {x}; where do you see the {x}; {tell} where the {x} is;
        what is the position of the {x}; {x}, where; locate the {x}; where in the {pic} is the {x}; where on
        the {pic} is the {x}; at which place is the {x}; what is the location of the {x}; location of the
        {x}; show me where the {x} is; where is {x}; where can you see the {x}; where is the {x} located;
        where is the {x} placed; where does the {x} stand; where can the {x} be found; where do i find the
        {x}; where did they put the {x}; the {x} is where; where exactly is the {x}; where is the {x}{where}
        """,
    ),
    Wording(
        r"(?:how many (?P<x>[a-z ]+?) (?:are there|are in the picture|do you see|can you see in the "
        r"image)|count the (?P<y>[a-z ]+))",
        """
        number of {x}; the number of {x}; what is the number of {x}; count {x}; count all {x}; count all the
        {x}; {x}; how many {x}; how many {x} can you count; how many {x} are visible; how many {x} does the
        {pic} have; how many {x} does the {pic} show; {tell} how many {x} there are; {tell} the number of
        {x}; give me the number of {x}; i want to know how many {x} there are; {x}, how many; total number
        of {x}; how many {x} in the {pic}; how many {x}{all}; how many {x} are there{all}; how many {x} are
        there{where}; how many {x} are shown; count {x}{where}; what number of {x} do you see; how many {x}
        have been drawn; how many {x} can you find; how many {x} can i see; the count of {x}; how many {x}
        do you count
        """,
    ),
    Wording(
        r"(?:how many (?P<x>shapes|objects|things) (?:are there (?:in total|altogether)|does the picture "
        r"show)|what is the total number of (?P<y>shapes|objects|things))",
        """
        how many {x} are there{all}; how many {x}{all}; total number of {x}; number of {x}{all}; how many
        {x} do you see{all}; count all {x}; count everything; how many {x} can be counted{where}; how many
        are there{all}; {tell} how many {x} there are{all}; all in all, how many {x} are there; in total,
        how many {x} are there; how many {x} are there in the whole {pic}; what is the total of {x}; how
        many different {x} are drawn{where}; the number of {x} in the {pic}; how many {x} are in this {pic}
        """,
    ),
    Wording(
        r"(?:is there|do you see|can you see) (?P<a>a|an) (?P<x>[a-z ]+?)(?: in the (?:picture|image))?",
        """
        any {xs}; is there any {x}; do you see any {x}; is {a} {x} in the {pic}; does the {pic} have {a}
        {x}; does the {pic} show {a} {x}; has the {pic} got {a} {x}; can you find {a} {x}; is {a} {x} there;
        are there any {xs}; is there {a} {x} somewhere; is there {a} {x} to be seen; does it contain {a}
        {x}; do you notice {a} {x}; is {a} {x} visible; does the {pic} contain {a} {x}; is there {a}
        {x}{where}; do you find {a} {x}{where}; are there {xs}{where}; is {a} {x} drawn{where}; can i see
        {a} {x}{where}; do we have {a} {x}{where}; {tell} if there is {a} {x}; {tell} whether there is {a}
        {x}; have you seen {a} {x}{where}; is there also {a} {x}
        """,
    ),
    Wording(
        r"what number is this",
        """
        what number is it; read the number; which number is this; what is the number; the number
        """,
    ),
    Wording(
        r"(?:what|which) word is this",
        """
        what word is it; read the word; which word is it; what is the word here; the word; which word is
        there
        """,
    ),
    Wording(
        r"(?:what does (?:it|the text|the picture) say|what is written (?:in the picture|here)|read the text)",
        """
        read it; read the words; what is the text; what text is there; what is written there; what can you
        read; can you read it; what does it read; text; the text; what do you read here; {tell} what it
        says; read what is written; what does this say; which text do you see; what is written; what is
        written on it; what text is there{where}; what does the {pic} say; read the text{where}; transcribe the
        text; what does the writing say; please read the text; what is it that is written here; what stands
        there
        """,
    ),
    Wording(
        r"(?:what does the (?P<c>COLOUR) (?:text|word) say|read the (?P<d>COLOUR) text|what is written in "
        r"(?P<e>COLOUR))",
        """
        what is the {c} text; what does the {c} one say; read the {c} word; the {c} text; {c} text; which
        word is {c}; what is the {c} word; read what is written in {c}; the {c} word; {tell} what the {c}
        text says; what can you read in {c}; what is the text in {c}; which text is {c}; what says the {c}
        text; what does the text in {c} say; what word is written in {c}; what is in {c}
        """,
    ),
    Wording(
        r"(?:describe (?:the image|the picture|this image)|what is in the picture|what do you see|what can "
        r"you see in the image|what does the picture show)",
        """
        describe it; describe what you see; what is this; what is in this {pic}; what is shown{where}; what
        does it show; {tell} what you see; tell me about the {pic}; caption this {pic}; what is on the
        {pic}; explain the {pic}; give me a description; description; what do we see here; describe; what is
        to be seen here; what does this {pic} show; what can you see; what can be seen in the {pic}; please
        describe the {pic}; what am i looking at; what is going on in this {pic}; describe this {pic}; give
        a description of the {pic}; what is this a {pic} of
        """,
    ),
    Wording(
        r"(?:which (?:image|picture) (?:has|shows) the (?P<x>[a-z ]+)|in which image is the (?P<y>[a-z "
        r"]+)|which (?:of the two images has|image contains) (?:a|an) (?P<z>[a-z ]+))",
        """
        where is the {x}, in the first or in the second {pic}; which one has the {x}; which of them has {a}
        {x}; which {pic} contains {a} {x}; in which {pic} is the {x}; which has the {x}; which shows the
        {x}; which of these has {a} {x}; what {pic} has the {x}; which {pic} has {a} {x}; find the {pic}
        with the {x}; which {pic} has got {a} {x}; the {pic} with the {x}; which of the two {pic}s shows {a}
        {x}; which of the two has the {x}; {tell} which {pic} has the {x}; on which {pic} is the {x}; which
        {pic} is the one with the {x}; does the first or the second {pic} have {a} {x}; which {pic}s have
        {a} {x}; in which of the two is {a} {x}
        """,
    ),
    Wording(
        r"(?:list (?:all|the)|name all the|which|what) (?P<x>shapes|objects|things)(?: are there| are in the "
        r"picture| do you see)?",
        """
        list all the {x}; {list} all {x}{where}; {list} all the {x}{where}; {list} the {x}; a list of the
        {x}; give me a list of the {x}; which {x} can you see; what {x} are there; all {x}; list of {x};
        what are the {x}{where}; which {x} are in the {pic}; which {x} does the {pic} have; which {x} does
        the {pic} show; make a list of all {x}; {list} everything there is; list them all; which {x} have
        been drawn; {tell} which {x} there are; write down all {x}; what {x} can you find
        """,
    ),
    Wording(
        r"(?:what is|which shapes are|what do you see) (?:to the |on the )?(?P<rel>left of|right "
        r"of|above|below|under) the (?P<x>[a-z ]+)",
        """
        what is {rel} the {x}; which shape is {rel} the {x}; which shapes are {rel} the {x}; {rel} the {x};
        what do you see {rel} the {x}; what can be found {rel} the {x}; what stands {rel} the {x}; name what
        is {rel} the {x}; what shapes are {rel} the {x}; {tell} what is {rel} the {x}; what is there {rel}
        the {x}; is there something {rel} the {x}, and what; everything {rel} the {x}; what is it that is
        {rel} the {x}; list the shapes {rel} the {x}; {rel} the {x}, what is there; what objects are {rel}
        the {x}
        """,
    ),
    Wording(
        r"(?:(?:order|sort|list) the bars (?:by height|from(?: the)? tallest to(?: the)? shortest))",
        """
        {sort} the bars by height; {sort} the bars by size; bars by height; {sort} bars; {sort} the bars,
        {tallest} first; put the bars in order of height; {sort} the bars by their height; {sort} the bars
        from {tallest} to {shortest}; from {tallest} to {shortest}; bars, {tallest} first; {sort} the bars
        in descending order; the bars from {tallest} to {shortest}; {sort} the bars from big to small; what
        is the order of the bars by height; name the bars from {tallest} to {shortest}; what is the order
        from the {tallest} to the {shortest} bar; bars in descending order; {sort} the bars starting with
        the {tallest}
        """,
    ),
    Wording(
        r"(?:(?:order|sort|list) the bars from(?: the)? shortest to(?: the)? tallest)",
        """
        {sort} the bars, {shortest} first; {sort} the bars from {shortest} to {tallest}; bars, {shortest}
        first; {sort} the bars in ascending order; from {shortest} to {tallest}; the bars from {shortest} to
        {tallest}; {sort} the bars from small to big; name the bars from {shortest} to {tallest}; what is
        the order from the {shortest} to the {tallest} bar; {sort} the bars starting with the {shortest}
        """,
    ),
    Wording(
        r"(?:and )?(?:what colour is it|its colour|which colour is it)",
        """
        its colour; and its colour; the colour; and the colour; which colour has it; what is its colour;
        colour; and which colour; what colour; in which colour; what colour does it have; it is what colour
        """,
    ),
    Wording(
        r"(?:and )?where is (?:it|that)(?: in the picture)?",
        """
        its position; and where; where; its place; where is it located; where in the {pic}; and its place
        """,
    ),
    Wording(
        r"(?:and )?(?:what shape is it|its shape)",
        """
        its shape; which shape; and the shape; what is its shape; what shape; which shape is it; the shape
        """,
    ),
)
"""All kinds of questions that are reworded; the first that matches is used."""

_COLOURS = "|".join(COLOURS)
_PATTERNS = tuple(
    (
        re.compile(wording.pattern.replace("COLOUR", _COLOURS)),
        [" ".join(other.split()) for other in wording.others.split(";")],
    )
    for wording in WORDINGS
)
_WHICH_PICTURE = re.compile(r"(.+) in the (first|second) (?:image|picture)")

CONTRACTIONS = (("what is ", "what's "), ("where is ", "where's "), ("what is ", "whats "), ("where is ", "wheres "),
                ("which is ", "which's "), ("what are ", "what're "), ("there is ", "there's "))  # fmt: skip
OPENINGS = ("please ", "please, ", "hey, ", "hi, ", "hello, ", "ok, ", "so ", "now ", "well, ", "hey tiny, ",
            "tell me: ", "question: ", "and ", "can you tell me ", "could you say ", "i wonder ",
            "quick question: ")  # fmt: skip
CLOSINGS = (" please", ", please", " pls", " thanks", ", thank you", " now", ", tell me")
MARKS = ("?", "?", "?", "?", ".", "", "", "", "", "!", "??", "?!", "...", " ?", "???", ":")
SLIPS = ("what", "which", "where", "there", "picture", "image", "colour", "color", "many", "are", "the")
"""Words in which letters are sometimes swapped; a question is clear without them."""


def reword(question: str, rng: random.Random) -> str:
    """Reword a question; one of no known kind is only typed differently.

    Args:
        question: of the synthetic world, in one of its own wordings.
    """
    asked = question.strip().rstrip("?.!").replace("color", "colour").strip()
    asked = asked[0].lower() + asked[1:] if asked else asked
    about = ""
    if found := _WHICH_PICTURE.fullmatch(asked):
        asked, about = found[1], found[2]
    for pattern, others in _PATTERNS:
        if found := pattern.fullmatch(asked):
            words = {name: value for name, value in found.groupdict().items() if value}
            # `ending` says which of two pictures is meant, so the wording itself must name none.
            fitting = [other for other in others if not about or ("{pic}" not in other and "{where}" not in other)]
            asked = _fill(rng.choice(fitting), words, rng)
            break
    if about:
        ending = f"in the {about} {rng.choice(('image', 'picture'))}"
        asked = rng.choice((f"{asked} {ending}", f"{asked} {ending}", f"{ending}, {asked}"))
    return mistype(asked, rng)


def _fill(template: str, words: dict[str, str], rng: random.Random) -> str:
    """A template with its words in braces filled in."""
    # Alternatives of a pattern cannot share a group's name: y and z are x, d to f are c.
    noun = words.get("x") or words.get("y") or words.get("z") or ""
    values = {
        **{name: rng.choice(choices) for name, choices in CHOICES.items()},
        "x": noun,
        "xs": plural_of_thing(noun),
        "a": "an" if noun[:1] in tuple("aeiou") else "a",
        "c": next((words[name] for name in "cdef" if name in words), ""),
    }
    if relation := words.get("rel"):
        relation = "below" if relation == "under" else relation
        values["rel"] = rng.choice(SYNONYMS[relation])
    return template.format(**values)


def mistype(question: str, rng: random.Random) -> str:
    """A question as people type it: without capitals or marks, in capitals, with greetings, abbreviated, mistyped.

    Args:
        question: without an end mark.
    """
    if rng.random() < 0.45:
        question = question.replace("colour", "color")
    if rng.random() < 0.3:
        short = [pair for pair in CONTRACTIONS if pair[0] in question]
        if short:
            question = question.replace(*rng.choice(short), 1)
    if rng.random() < 0.12:
        question = rng.choice(OPENINGS) + question
    if rng.random() < 0.06:
        question += rng.choice(CLOSINGS)
    if rng.random() < 0.03:
        question = _slip(question, rng)
    if rng.random() < 0.45:
        question = question[:1].upper() + question[1:]
    question += rng.choice(MARKS)
    if rng.random() < 0.02:
        question = question.replace(" ", "  ", 1)
    return question.upper() if rng.random() < 0.15 else question


def _slip(question: str, rng: random.Random) -> str:
    """Swap two neighbouring letters in one of the `SLIPS`."""
    words = question.split(" ")
    places = [index for index, word in enumerate(words) if word in SLIPS]
    if not places:
        return question
    place = rng.choice(places)
    word = words[place]
    at = rng.randrange(len(word) - 1)
    words[place] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)

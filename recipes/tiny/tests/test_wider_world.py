"""The wider world: more questions, other wordings, other styles of drawing, and pictures of other things."""

import colorsys
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.tiny.world import (
    COLOURS,
    SHAPES,
    SOMETHING_ELSE,
    Chart,
    Elsewhere,
    Picture,
    Shape,
    WiderConversations,
    draw,
    sample_painted,
    sample_picture,
)
from recipes.tiny.world.draw import bars
from recipes.tiny.world.elsewhere import KINDS
from recipes.tiny.world.elsewhere.documents import DOCUMENTS
from recipes.tiny.world.elsewhere.scenes import SCENES
from recipes.tiny.world.elsewhere.textures import TEXTURES
from recipes.tiny.world.elsewhere.things import THINGS, Pen, draw_things
from recipes.tiny.world.paint import TONES
from recipes.tiny.world.questions import ask
from recipes.tiny.world.wider import MORE
from recipes.tiny.world.wider_questions import (
    UNKNOWN_THINGS,
    UNSEEN_THINGS,
    ask_background,
    ask_beside,
    ask_beside_absent,
    ask_list,
    ask_order,
    ask_total,
    ask_unknown_thing,
    beside,
    name_of_tone,
    plural_of_thing,
)
from recipes.tiny.world.wordings import SLIPS, WORDINGS, mistype, reword

WHITE = (255, 255, 255)
NAMED = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
"""Matches the name of a shape with its colour, as "red circle", in an answer."""


def turns_of(asker, kind: str, number: int, sample=sample_picture) -> list[tuple]:
    """`number` pairs (picture, turn), of random pictures about which `asker` has a question."""
    rng, found = random.Random(asker.__name__), []
    while len(found) < number:
        picture = sample(rng, kind)
        if turn := asker(picture, rng):
            found.append((picture, turn))
    return found


def shape(kind: str, colour: str, x: float, y: float) -> Shape:
    return Shape(kind, colour, COLOURS[colour][0], x, y, 10, 0)


# --- questions ---


@pytest.mark.parametrize("sample", [sample_picture, sample_painted])
def test_lists_name_every_shape_from_left_to_right(sample) -> None:
    for picture, turn in turns_of(ask_list, "shapes", 300, sample):
        named = NAMED.findall(turn.answer)
        places: dict[tuple[str, str], list[float]] = {}
        for thing in picture.shapes:
            places.setdefault((thing.colour, thing.kind), []).append(thing.x)
        assert Counter(named) == {name: len(xs) for name, xs in places.items()}
        order = [places[name].pop(places[name].index(min(places[name]))) for name in named]
        assert order == sorted(order)
        assert turn.answer.startswith("There is " if len(named) == 1 else "There are ")


def test_lists_are_said_as_people_say_them() -> None:
    star, ring, circle = shape("star", "red", 10, 20), shape("ring", "green", 90, 20), shape("circle", "orange", 50, 20)
    picture = Picture(100, 100, (WHITE, WHITE), "plain", 0, shapes=(star, ring, circle))
    rng = random.Random(0)
    assert ask_list(picture, rng).answer == "There are a red star, an orange circle and a green ring."
    assert ask_list(replace(picture, shapes=(star,)), rng).answer == "There is a red star."
    assert ask_list(replace(picture, shapes=()), rng) is None


def test_totals_count_shapes_whatever_they_are_called() -> None:
    words = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
    nouns = set()
    for picture, turn in turns_of(ask_total, "shapes", 200):
        number, noun = re.fullmatch(r"There (?:is|are) (\w+) (shapes?)\.", turn.answer).groups()
        assert words[number] == len(picture.shapes)
        assert noun == ("shape" if number == "one" else "shapes")
        nouns |= {noun for noun in ("shapes", "objects", "things") if noun in turn.question}
    assert nouns == {"shapes", "objects", "things"}
    assert all("shapes" in turn.question for _, turn in turns_of(ask_total, "mixed", 50))  # a word is a thing, too


def test_what_is_beside_a_shape_is_all_that_is_there() -> None:
    sides = Counter()
    for picture, turn in turns_of(ask_beside, "shapes", 500):
        side, name = re.search(r"(left of|right of|above|below) the ([a-z ]+)\.$", turn.answer).groups()
        words = name.split()
        (reference,) = (
            thing
            for thing in picture.shapes
            if (words[-1] in ("shape", thing.kind)) and (len(words) == 1 or words[0] == thing.colour)
        )
        found = Counter(NAMED.findall(turn.answer.replace(f"{side} the {name}", "")))
        expected: Counter[tuple[str, str]] = Counter()
        for thing in picture.shapes:
            if thing is reference:
                continue
            dx, dy = (thing.x - reference.x) / picture.width, (thing.y - reference.y) / picture.height
            part = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[side]
            assert abs(part) >= 0.08
            expected[thing.colour, thing.kind] += part > 0
        assert found == +expected
        assert turn.answer.startswith("Nothing is ") == (not found)
        assert (" are " in turn.answer) == (found.total() > 1)
        sides[side] += 1
    assert set(sides) == {"left of", "right of", "above", "below"}


def test_what_is_beside_is_said_in_order_and_not_asked_if_it_is_not_clear() -> None:
    star, near = shape("star", "blue", 80, 80), shape("ring", "green", 77, 10)
    things = (shape("circle", "red", 50, 40), star, shape("square", "green", 30, 60), shape("circle", "red", 10, 20))
    picture = Picture(100, 100, (WHITE, WHITE), "plain", 0, shapes=things)
    assert [thing.x for thing in beside(picture, star, "left of")] == [10, 30, 50]
    assert [thing.y for thing in beside(picture, star, "above")] == [20, 40, 60]
    assert beside(picture, star, "right of") == []
    assert beside(replace(picture, shapes=(*things, near)), star, "left of") is None
    answers = {turn.answer for seed in range(300) if (turn := ask_beside(picture, random.Random(seed)))}
    assert "A red circle, a green square and a red circle are left of the star." in answers
    assert "Nothing is right of the star." in answers


def test_nothing_is_beside_what_is_not_there() -> None:
    for picture, turn in turns_of(ask_beside_absent, "shapes", 100):
        kind = re.fullmatch(r"There is no (\w+) in the picture\.", turn.answer)[1]
        assert kind in turn.question
        assert kind not in {thing.kind for thing in picture.shapes}


@pytest.mark.parametrize("kind", ["shapes", "words", "chart"])
def test_things_that_no_picture_has_are_denied(kind: str) -> None:
    asked = set()
    for picture, turn in turns_of(ask_unknown_thing, kind, 400):
        things = {name for name in UNKNOWN_THINGS if re.search(rf"\b({name}|{plural_of_thing(name)})\b", turn.question)}
        expected = {
            "how|count": "There are none in the picture.",
            "where|what": "That is not in the picture.",
            "is|do|can": "No, that is not in the picture.",
        }
        assert turn.answer == next(
            answer for words, answer in expected.items() if re.match(rf"({words})\b", turn.question.lower())
        )
        assert not things & {word.text.lower() for word in picture.words}
        asked |= things
    assert len(asked) > 60


def test_things_for_tests_are_not_asked_about_in_training() -> None:
    assert not set(UNSEEN_THINGS) & set(UNKNOWN_THINGS)
    assert not {*UNSEEN_THINGS, *UNKNOWN_THINGS} & {*SHAPES, *COLOURS}
    said = " ".join(
        turn.question.lower() for i in range(1500) for turn in WiderConversations(1500, seed=3).turns_of(i)
    ).split()
    assert not {re.sub(r"\W", "", word) for word in said} & set(UNSEEN_THINGS)
    assert plural_of_thing("person") == "people"
    assert plural_of_thing("dog") == "dogs"


@pytest.mark.parametrize("sample", [sample_picture, sample_painted])
def test_backgrounds_are_of_the_colour_that_is_said(sample) -> None:
    """The answer's colour agrees with the pixels along the picture's edges."""
    names = Counter()
    for picture, turn in turns_of(ask_background, "shapes", 400, sample):
        name = re.fullmatch(r"The background is ([a-z ]+)\.", turn.answer)[1]
        image = np.asarray(draw(replace(picture, shapes=(), words=(), chart=None)))
        edge = np.concatenate([image[:3].reshape(-1, 3), image[-3:].reshape(-1, 3)])
        red, green, blue = np.median(edge, axis=0) / 255
        middle = np.median(image[image.shape[0] // 3 : -image.shape[0] // 3].reshape(-1, 3), axis=0)
        assert name_of_tone(tuple(int(value) for value in middle)) == name
        hue, light, saturation = colorsys.rgb_to_hls(red, green, blue)
        if name in ("white", "light grey", "grey", "black"):
            assert max(red, green, blue) - min(red, green, blue) < 0.11
            low, high = {"white": (0.84, 1), "light grey": (0.7, 0.9), "grey": (0.25, 0.75), "black": (0, 0.2)}[name]
            assert low <= light <= high, turn
        else:
            place = {"red": 0, "pink": 0, "orange": 30, "yellow": 57, "green": 120, "blue": 225, "purple": 290}
            apart = abs((hue * 360 - place[name.split()[-1]] + 180) % 360 - 180)
            assert apart <= 45, (turn, hue * 360)
            assert saturation > 0.1
            assert not name.startswith("light ") or light > 0.65
            assert not name.startswith("dark ") or light < 0.35
        names[name] += 1
    assert len(names) >= 6, names


@pytest.mark.parametrize(
    ("tone", "name"),
    [
        ((244, 241, 232), "white"), ((0, 0, 0), "black"), ((130, 130, 130), "grey"), ((216, 35, 42), "red"),
        ((208, 226, 245), "light blue"), ((20, 30, 70), "dark blue"), ((222, 240, 215), "light green"),
        ((231, 239, 248), None), ((250, 230, 205), None), ((90, 60, 30), None), ((60, 60, 60), None),
    ],
)  # fmt: skip
def test_only_tones_of_one_name_have_one(tone: tuple[int, int, int], name: str | None) -> None:
    assert name_of_tone(tone) == name


@pytest.mark.parametrize("sample", [sample_picture, sample_painted])
def test_bars_are_ordered_as_they_are_drawn(sample) -> None:
    directions = Counter()
    for picture, turn in turns_of(ask_order, "chart", 100, sample):
        image = np.asarray(draw(picture)).astype(int)
        heights = {}
        for colour, tone, (left, _, right, _) in zip(
            picture.chart.colours, picture.chart.tones, bars(picture.chart), strict=True
        ):
            column = image[:, round((left + right) / 2)]
            heights[colour] = (np.abs(column - tone).max(axis=1) <= 30).sum()
        said = re.findall("|".join(COLOURS), turn.answer.split(":")[1])
        falling = turn.answer.startswith("From the tallest to the shortest: ")
        assert falling or turn.answer.startswith("From the shortest to the tallest: ")
        assert sorted(said) == sorted(picture.chart.colours)
        assert said == sorted(heights, key=heights.get, reverse=falling)
        directions[falling] += 1
    assert len(directions) == 2


def test_bars_of_almost_one_height_are_not_ordered() -> None:
    box = (10, 10, 90, 90)
    chart = Chart(("red", "blue", "green"), (WHITE,) * 3, (0.9, 0.5, 0.47), box, 0.2, False, False, (0, 0, 0))
    picture = Picture(100, 100, (WHITE, WHITE), "plain", 0, chart=chart)
    assert ask_order(picture, random.Random(0)) is None
    assert ask_order(replace(picture, chart=replace(chart, values=(0.9, 0.5, 0.3))), random.Random(0))


# --- wordings ---

GROUPS = (
    *((kind, plural_of_thing(kind)) for kind in (*SHAPES, *UNKNOWN_THINGS)),
    *((colour,) for colour in COLOURS),
    ("first",),
    ("second",),
    ("left",),
    ("right",),
    ("above", "over", "higher than"),
    ("below", "under", "beneath", "underneath", "lower than"),
    ("background", "behind", "on what colour", "on what color"),
)
"""Groups of synonyms for what a question asks about."""

INTENT = {
    "colour": r"colou?r|how is",
    "shape": r"shape|form|what is|what's|whats|thing|object|drawn",
    "place": r"where|position|locat|place|find|locate",
    "reading": r"read|say|text|word|writ|number|transcribe|stands|what'?s|what is",
    "background": r"background|behind|on what colou?r",
    "tallest": r"tallest|highest|biggest|largest|longest|greatest height",
    "shortest": r"shortest|lowest|smallest|least height",
    "description": r"describe|descri|what|see|tell me about|caption|explain|show",
    "list": r"list|name|enumerate|give me|tell me|show me|what|which|all",
}
"""For each type of question, a pattern that its wording must match."""


def mentioned(question: str) -> set[int]:
    """The indices of the `GROUPS` whose words occur in a question."""
    text = question.lower()
    for word in ("first or in the second", "first or the second"):  # these choose neither
        text = text.replace(word, "")
    return {
        number for number, words in enumerate(GROUPS) if any(re.search(rf"\b{word}(?:'s|\b)", text) for word in words)
    }


def is_mistyped(question: str) -> bool:
    """Whether letters are swapped in a question: one of its words is an anagram of a word of `SLIPS`."""
    plain = {"".join(sorted(word)): word for word in SLIPS}
    return any(plain.get("".join(sorted(word)), word) != word for word in re.findall("[a-z]+", question.lower()))


def test_put_otherwise_a_question_asks_the_same() -> None:
    rng, changed, asked = random.Random(0), 0, Counter()
    letters = Counter()
    for _ in range(1500):
        kind = rng.choice(("shapes", "shapes", "words", "chart", "mixed"))
        for turn in next(ask(sample_picture(rng, kind), kind, rng, MORE)):
            other = reword(turn.question, rng)
            changed += other.lower().strip("?!. ") != turn.question.lower().strip("?!. ")
            asked[turn.type] += 1
            letters["upper"] += other.isupper()
            letters["bare"] += other[-1].isalnum()
            if "bar" in turn.question:
                assert re.search(r"\bbars?\b|tall|short|high|low|small|big|larg|long|height", other.lower()), (
                    turn,
                    other,
                )
            else:
                assert mentioned(other) == mentioned(turn.question), (turn, other)
            # Some questions have swapped letters, and then may not match.
            intent = INTENT.get(turn.type, "")
            assert re.search(intent, other.lower()) or is_mistyped(other), (turn, other)
    assert changed > 0.85 * asked.total()
    assert len(asked) >= 14
    assert 0.05 < letters["upper"] / asked.total() < 0.2
    assert letters["bare"] / asked.total() > 0.15


def test_orders_keep_their_direction() -> None:
    rng = random.Random(1)
    for question, first, last in (
        (
            "Sort the bars from the tallest to the shortest.",
            r"tall|high|big|larg|long|desc|height|size|{}",
            r"short|low|small",
        ),
        ("List the bars from shortest to tallest.", r"short|low|small|asc", r"tall|high|big|larg|long"),
    ):
        for _ in range(300):
            other = reword(question, rng).lower()
            starts = [match.start() if (match := re.search(pattern, other)) else 999 for pattern in (first, last)]
            assert starts[0] <= starts[1], other


def test_which_of_two_pictures_is_meant_stays() -> None:
    rng = random.Random(2)
    for _ in range(200):
        other = reword("How many stars are there in the second image?", rng).lower()
        assert "second" in other
        assert "star" in other
        assert other.count("picture") + other.count("image") <= 1


def test_every_kind_of_question_can_be_put_otherwise() -> None:
    """Each pattern of `WORDINGS` matches a question of the world; other questions vary in their typing only."""
    rng, seen = random.Random(3), Counter()
    patterns = [re.compile(wording.pattern.replace("COLOUR", "|".join(COLOURS))) for wording in WORDINGS]
    world = WiderConversations(2500, seed=4)
    monkey = [turn for i in range(2500) for turn in world.sample(random.Random(i), 6)[1]]
    for turn in monkey:
        asked = turn.question.strip().rstrip("?.!").replace("color", "colour")
        asked = asked[0].lower() + asked[1:]
        asked = re.sub(r" in the (first|second) (image|picture)$", "", asked)
        for number, pattern in enumerate(patterns):
            if pattern.fullmatch(asked):
                seen[number] += 1
                break
    assert set(seen) == set(range(len(WORDINGS)))
    assert (
        reword("Tell me a joke.", rng)
        .lower()
        .strip("?!. :")
        .endswith(("joke", "please", "thanks", "now", "you", "pls", "me"))
    )


def test_typing_changes_no_word_that_matters() -> None:
    rng = random.Random(4)
    for _ in range(500):
        typed = mistype("what colour is the purple heart", rng).lower()
        assert "purple" in typed
        assert "heart" in typed
        assert "\n" not in typed


# --- other hands ---


def test_painted_shapes_are_where_and_what_the_picture_says() -> None:
    rng = random.Random(5)
    seen, alike = set(), 0
    for _ in range(200):
        picture = sample_painted(rng, "shapes")
        image = np.asarray(draw(replace(picture, blur=0, rim=None))).astype(int)
        assert image.shape == (picture.height, picture.width, 3)
        assert 1 <= len(picture.shapes) <= 5
        for thing in picture.shapes:
            assert thing.radius <= thing.x <= picture.width - thing.radius
            assert thing.radius <= thing.y <= picture.height - thing.radius
            y = thing.y - 0.9 * thing.radius if thing.kind == "ring" else thing.y
            assert np.abs(image[int(y), int(thing.x)] - thing.tone).max() <= 2, (thing, picture)
            tones = {name: (*TONES[name], *COLOURS[name]) for name in COLOURS}
            distance = {
                name: min(np.abs(np.subtract(tone, thing.tone)).sum() for tone in tones[name]) for name in COLOURS
            }
            assert min(distance, key=distance.get) == thing.colour
            for ground in picture.background:
                assert np.abs(np.subtract(ground, thing.tone)).sum() > 110
            for other in picture.shapes:
                far = np.hypot(thing.x - other.x, thing.y - other.y)
                assert other is thing or far > 0.99 * (thing.radius + other.radius)
            seen.add((thing.kind, thing.colour))
        most = Counter((thing.kind, thing.colour) for thing in picture.shapes).most_common(1)[0][1]
        alike += most > 1
    assert len(seen) == len(SHAPES) * len(COLOURS)
    assert alike > 40


def test_a_labelled_chart_is_not_said_to_have_no_text() -> None:
    rng = random.Random(6)
    labelled = 0
    for _ in range(60):
        picture = sample_painted(rng, "chart")
        plain = np.asarray(draw(replace(picture, labelled=False))).astype(int)
        differs = (np.asarray(draw(picture)).astype(int) != plain).any()
        assert differs == picture.labelled
        labelled += picture.labelled
        answers = {turn.answer for _ in range(40) for turn in next(ask(picture, "chart", rng, MORE))}
        assert ("There is no text in the picture." in answers) <= (not picture.labelled)
    assert 15 < labelled < 55


@pytest.mark.parametrize("kind", ["words", "mixed"])
def test_painted_words_can_be_seen(kind: str) -> None:
    rng = random.Random(7)
    for _ in range(80):
        picture = sample_painted(rng, kind)
        image = np.asarray(draw(replace(picture, blur=0))).astype(int)
        assert picture.words
        for word in picture.words:
            assert (np.abs(image - word.tone).max(axis=2) <= 3).sum() > 20
        if kind == "mixed":
            (word,) = picture.words
            assert picture.shapes
            for thing in picture.shapes:
                assert abs(thing.y - word.y) > thing.radius


# --- elsewhere ---


def test_pictures_of_other_things_differ_and_are_not_blank() -> None:
    looks = set()
    for seed in range(150):
        image = draw(Elsewhere(seed))
        assert image.mode == "RGB"
        assert 90 <= min(image.size) <= max(image.size) <= 360
        assert np.asarray(image).std() > 4, seed
        looks.add(image.tobytes())
    assert len(looks) == 150
    assert draw(Elsewhere(5)).tobytes() == draw(Elsewhere(5)).tobytes()
    assert sum(share for _, share in KINDS.values()) == 100


PAINTERS = dict.fromkeys((*TEXTURES, *SCENES, *DOCUMENTS, draw_things))  # in order: test processes compare


@pytest.mark.parametrize("paint", PAINTERS, ids=lambda paint: paint.__name__)
def test_every_painter_fills_every_size(paint) -> None:
    for seed, size in enumerate([(160, 100), (360, 216), (100, 160), (360, 360)] * 3):
        image = paint(np.random.default_rng(seed), *size)
        assert image.size == size
        assert image.mode == "RGB"
        assert np.asarray(image).std() > 2


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__.strip("_"))
@pytest.mark.parametrize("filled", [True, False])
def test_every_thing_is_drawn_within_its_square(thing, filled: bool) -> None:
    from PIL import ImageDraw

    image = Image.new("RGB", (300, 300), WHITE)
    pen = Pen(
        ImageDraw.Draw(image), np.random.default_rng(1), 150, 150, 100, False, filled, None if filled else (0, 0, 0), 2
    )
    thing(pen)
    rows, columns = np.nonzero((np.asarray(image) < 250).any(axis=2))
    assert len(rows) > 300
    assert min(rows.min(), columns.min()) >= 35
    assert max(rows.max(), columns.max()) <= 265


def test_of_other_things_the_answer_is_always_the_same() -> None:
    world = WiderConversations(3000, seed=9)
    elsewhere = 0
    for i in range(3000):
        turns = world.turns_of(i)
        kinds = {turn.type for turn in turns}
        assert ("elsewhere" in kinds) == (SOMETHING_ELSE in {turn.answer for turn in turns})
        if "elsewhere" in kinds:
            elsewhere += 1
            assert kinds == {"elsewhere"}
            assert {turn.answer for turn in turns} == {SOMETHING_ELSE}
    assert 0.09 < elsewhere / 3000 < 0.15
    assert {turn.type for i in range(50) for turn in WiderConversations(50, 1, elsewhere=1).turns_of(i)} == {
        "elsewhere"
    }
    assert not any(
        turn.type == "elsewhere" for i in range(300) for turn in WiderConversations(300, 1, elsewhere=0).turns_of(i)
    )


def test_half_of_them_are_parts_of_photographs_if_there_are_any(tmp_path: Path) -> None:
    """Half of the pictures are parts of the given photographs, which here have a tone that nothing else has."""
    files = []
    for number in range(3):
        files.append(tmp_path / f"{number}.png")
        Image.new("RGB", (500, 200 + number), (255, 0, 254)).save(files[-1])
    pictures = [draw(Elsewhere(seed, tuple(files))) for seed in range(120)]
    pink = [image for image in pictures if np.asarray(image).std(axis=(0, 1)).max() < 1]
    assert 35 < len(pink) < 85
    assert all(min(image.size) >= 80 and max(image.size) <= 400 for image in pink)
    assert len({image.size for image in pink}) > 20
    world = WiderConversations(200, seed=11, photographs=files)
    assert [turn.question for turn in world.turns_of(7)] == [
        turn.question for turn in WiderConversations(200, seed=11).turns_of(7)
    ]


def test_a_wider_conversation_depends_on_seed_and_index_only() -> None:
    forwards = [WiderConversations(25, seed=3)[i] for i in range(25)]
    longer = WiderConversations(1000, seed=3)
    for i in reversed(range(25)):
        again = longer[i]
        assert [message["content"] for message in again.messages] == [m["content"] for m in forwards[i].messages]
        assert [image.tobytes() for image in again.images] == [image.tobytes() for image in forwards[i].images]

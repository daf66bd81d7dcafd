"""Text of the sample `passages`: scenes, each with a question and statements that answer it.

heft_engine.data.samples combines them. Statements for yes and for no share words with the question about equally often,
so that counting common words does not give the answer.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A question about {x}, statements that answer it with yes and with no, and irrelevant ones (`aside`).

    {x} is a name and the scene's kind: "the Harlow bakery".
    """

    kind: str
    question: str
    yes: tuple[str, ...]
    no: tuple[str, ...]
    aside: tuple[str, ...]


SCENES = (
    Scene(
        kind="bridge",
        question="can cars cross {x}",
        yes=(
            "{x} carries two lanes of cars.",
            "Traffic jams on {x} are common, with cars waiting to cross for an hour.",
            "After the repair, cars may cross {x} again.",
            "Cars pay a small toll to cross {x}.",
            "{x} was built for trains, but now cars and buses cross it.",
        ),
        no=(
            "{x} is for walkers only; cars take the tunnel.",
            "Cars were banned from {x} last spring.",
            "{x} is too narrow for cars, though bicycles fit.",
            "Cars that want to cross must go around, because {x} is closed to them.",
            "{x} once carried cars, but now only trams cross it.",
        ),
        aside=("It has four stone arches.", "Swallows nest under it.", "It is lit at night."),
    ),
    Scene(
        kind="lake",
        question="is it safe to swim in {x}",
        yes=(
            "The water of {x} is clean, and families swim there all summer.",
            "Inspectors tested {x} and found it safe for swimmers.",
            "Children learn to swim in {x} every July.",
            "The warning signs at {x} were taken down, as swimming is no longer dangerous.",
            "Nobody has ever come to harm while swimming in {x}.",
        ),
        no=(
            "Swimmers are warned to stay out of {x}, whose water makes people ill.",
            "Inspectors tested {x} and found it unsafe for swimmers.",
            "Strong currents make it dangerous to swim in {x}.",
            "The signs at {x} say that swimming there is not safe.",
            "Two people who went to swim in {x} were poisoned by algae.",
        ),
        aside=("Its shore is lined with pines.", "Herons fish there.", "A path leads around it."),
    ),
    Scene(
        kind="ferry",
        question="does {x} run in winter",
        yes=(
            "{x} runs all year, whatever the weather.",
            "In winter {x} sails twice a day, in summer more often.",
            "Ice does not stop {x}, which has a strong hull for winter.",
            "{x} rests only in August and sails through the winter.",
            "In winter {x} is the only way to reach the island.",
        ),
        no=(
            "{x} runs from May to September only.",
            "In winter {x} lies in the harbour and waits for spring.",
            "Ice stops {x} every winter until the thaw.",
            "{x} sails in summer; in winter people take the train.",
            "The last trip of {x} is in October, and winter passes without it.",
        ),
        aside=("The crossing takes an hour.", "It is painted green.", "Coffee is sold on board."),
    ),
    Scene(
        kind="hotel",
        question="are dogs allowed in {x}",
        yes=(
            "{x} welcomes guests with dogs.",
            "At {x} every dog gets a bowl of water and a blanket.",
            "Dogs may sleep in the rooms of {x}.",
            "{x} has changed its rule and now lets dogs in.",
            "Cats are not allowed in {x}, but dogs are.",
        ),
        no=(
            "{x} turns away guests with dogs.",
            "At {x} dogs have to wait outside the door.",
            "Dogs may not sleep in the rooms of {x}.",
            "{x} has changed its rule and no longer lets dogs in.",
            "Cats are allowed in {x}, but dogs are not.",
        ),
        aside=("Breakfast is at eight.", "Its garden looks over the sea.", "It has forty rooms."),
    ),
    Scene(
        kind="school",
        question="does {x} teach music",
        yes=(
            "Every pupil of {x} learns an instrument.",
            "{x} hired a music teacher last year.",
            "Music is the favourite lesson at {x}.",
            "{x} gave up dance lessons but kept music.",
            "The choir of {x} meets in the music room after lunch.",
        ),
        no=(
            "There are no music lessons at {x}.",
            "{x} lost its only music teacher and found no other.",
            "Pupils of {x} who want music lessons must go elsewhere.",
            "{x} gave up music lessons but kept dance.",
            "The music room of {x} became a store, since nobody teaches there any more.",
        ),
        aside=("It stands beside the church.", "It has ninety pupils.", "Lessons begin at eight."),
    ),
    Scene(
        kind="train",
        question="did {x} arrive on time",
        yes=(
            "{x} came in exactly when the timetable said.",
            "In spite of the snow {x} was not late.",
            "{x} lost ten minutes but made them up and was punctual.",
            "Nobody had to wait for {x}.",
            "{x} reached the station at noon, as planned.",
        ),
        no=(
            "{x} came in an hour after the time in the timetable.",
            "Because of the snow {x} was late.",
            "{x} lost ten minutes on the way and did not make them up.",
            "Everybody had to wait for {x}.",
            "{x} reached the station at two, although noon was planned.",
        ),
        aside=("It had six carriages.", "It was full of tourists.", "It stops at every village."),
    ),
    Scene(
        kind="library",
        question="can visitors borrow books from {x}",
        yes=(
            "{x} lends its books for four weeks.",
            "Visitors of {x} may take home ten books at a time.",
            "Anyone with a card can borrow from {x}.",
            "Books from {x} can be kept until the end of the month.",
            "{x} once let people read only inside, but now it lends.",
        ),
        no=(
            "The books of {x} must be read inside and never leave.",
            "Visitors of {x} may not take books home.",
            "Even with a card nobody can borrow from {x}.",
            "Books from {x} stay in the reading room, chained to the desks.",
            "{x} once lent its books, but now people read only inside.",
        ),
        aside=("It has tall windows.", "It smells of old paper.", "It opened in spring."),
    ),
    Scene(
        kind="restaurant",
        question="does {x} serve meat",
        yes=(
            "{x} is known for its beef stew.",
            "The cook of {x} grills lamb over an open fire.",
            "{x} tried to do without meat but brought it back.",
            "Half of the dishes at {x} are meat, chicken above all.",
            "Vegetarians find little to eat at {x}, with its sausages and ham.",
        ),
        no=(
            "{x} cooks vegetables only, and no meat comes to the table.",
            "The cook of {x} has never grilled lamb or beef.",
            "{x} took meat off the menu last year.",
            "All of the dishes at {x} are without meat.",
            "{x} is loved by vegetarians, since nothing there was ever an animal.",
        ),
        aside=("It seats thirty guests.", "Its owner sings.", "The soup is cheap."),
    ),
)

_FIRST = (
    "Al Bar Bel Bren Cal Cor Dan Dor El Fen Gar Hal Har Kel Lin Mar Mel Nor Os Pen Ros Sel Tam Tor Ul Ver"
)
_LAST = "brook by dale den field ford ham holt ley low mere mont stead ton wick"
#: Invented place names: 26 × 15.
NAMES = tuple(first + last for first in _FIRST.split() for last in _LAST.split())

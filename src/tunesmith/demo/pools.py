"""What the demo's order e-mails are made of: one pool for the training rows and another for the held-out rows.

The pools share no entry; the ways to write a number or a date belong to the language and are the same. In a phrase,
`{items}`, `{date}`, `{clerk}` and `{customer}` stand for what an e-mail fills in.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The names and phrases of one split."""

    first_names: tuple[str, ...]
    """Given names of customers."""
    last_names: tuple[str, ...]
    """Family names of customers."""
    clerks: tuple[str, ...]
    """Who the e-mail is addressed to; never the customer."""
    adjectives: tuple[str, ...]
    """First word of an item's name."""
    nouns: tuple[str, ...]
    """Second word of an item's name, in the singular; the plural takes an s."""
    greetings: tuple[str, ...]
    requests: tuple[str, ...]
    """Sentences with `{items}` and `{date}`."""
    strays: tuple[str, ...]
    """Sentences that say nothing about the order."""
    closings: tuple[str, ...]
    """Last lines, with `{customer}`."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(" ".join(phrase.split()) for phrase in text.split("|"))


TRAINING = Pool(
    first_names=_words(
        """Anna Boris Carla Daniel Elena Frank Grace Henry Irene Jacob Karen Louis Maria Nathan Olga Peter Rosa Simon
        Teresa Victor Wendy Yusuf Zoe Adam Bella Chen Dmitri Emma Felix Gita Hugo Ivan Julia Kofi Laura Mohamed
        Nadia Oscar Priya Quentin"""
    ),
    last_names=_words(
        """Baker Carter Dixon Evans Fischer Garcia Hughes Ivanov Jensen Kowalski Lopez Murphy Novak O'Brien Patel Quinn
        Rossi Schmidt Tanaka Usman Vega Walker Xu Young Zimmer Allen Brooks Cohen Dubois Eriksen Ferrari Gupta Hill
        Iqbal Jones Khan Larsen Moreau Nguyen Okafor"""
    ),
    clerks=("Tom", "Sandra", "Mr. Webb", "Ms. Lane", "Oliver", "Judith"),
    adjectives=_words(
        """blue green red white black large small heavy short round square plastic metal paper glass office travel
        winter brown soft flat thick wide modern plain electric digital spring standard strong warm solar simple big
        pink silver golden tiny wooden leather cotton rubber steel narrow deep sharp quiet slim smooth double folding
        garden kitchen autumn beach camping party pocket wall ceramic linen velvet copper iron clear striped padded"""
    ),
    nouns=_words(
        """chair table bag lamp pen folder bottle towel plate basket mirror jacket envelope candle blanket clock helmet
        ribbon cable carpet marker tray bucket cup card tile pot button badge wheel pump hook lock brick coat phone
        spoon fork kettle vase rug bench ladder hammer drill screw spade rake hose broom sponge comb belt sock boot vest
        jumper backpack suitcase umbrella notebook pencil eraser stapler binder calendar printer keyboard monitor
        speaker camera charger cushion cabinet drawer balloon flag banner puzzle doll kite racket whistle guitar"""
    ),
    greetings=_phrases(
        "Hi, | Hello, | Hi {clerk}, | Dear {clerk}, | Good morning, | Dear sales team, | Hello {clerk}! | Hey there,"
    ),
    requests=_phrases(
        """Please send me {items} by {date}. | I would like to order {items} for {date}. |
        We need {items} delivered on {date}. | Could you ship {items} for arrival on {date}? |
        Order: {items}. Delivery date: {date}. | On {date} we will need {items}. |
        Can I get {items}? Deliver on {date}. | I want to buy {items}. The date is {date}. |
        For {date}, put us down for {items}. | My order is {items}, to be here by {date}. |
        Delivery on {date} please: {items}. | Our event is on {date} and we need {items}. |
        Kindly reserve {items} for {date}. | Put {items} on my bill for {date}. |
        Bring {items} to the shop on {date}. | I am ordering {items}, due here on {date}. | Due {date}: {items}. |
        Our school needs {items} by {date}. | We are running out, so please bring {items} on {date}. |
        Needed: {items}. When: {date}. | By {date} I must have {items}. |
        The old ones broke, so we take {items} on {date}."""
    ),
    strays=_phrases(
        """The weather here is lovely. | The last parcel came in good shape. | Parking is behind the building. |
        Our office is now on floor 3. | The gate code is 4471. | Our shop number is 52. | Say hello to {clerk}. |
        We liked the new catalogue. | Ring the bell at the side door. | My email has changed. |
        I will pay by card. | We have been here for two years."""
    ),
    closings=(
        "Regards, {customer}",
        "Thanks,\n{customer}",
        "Best wishes,\n{customer}",
        "{customer}",
        "Yours, {customer}",
        "Thank you!\n{customer}",
        "- {customer}",
        "Kind regards\n{customer}",
    ),
)

HELD_OUT = Pool(
    first_names=_words(
        """Alice Bruno Clara David Edward Emily George Hannah Isaac Kevin Lucy Martin Arthur Paul Ruth Sarah Stefan
        Tara Thomas Walter"""
    ),
    last_names=_words(
        """Anderson Clark Edwards Green Hoffman Jackson Keller Lewis Morris Nelson Parker Roberts Singh Taylor Turner
        Wagner Ward Watson White Wright"""
    ),
    clerks=("Mike", "Angela", "Mr. Stone", "Mrs. Reed"),
    adjectives=_words("yellow orange purple grey tall long light summer thin dark bright baby school classic fresh"),
    nouns=_words(
        "bowl desk curtain pillow hat wallet rope tent glove stool sticker frame poster drum magnet shirt ticket"
    ),
    greetings=_phrases("Good afternoon, | Dear all, | Hello again {clerk}, | Good day {clerk}, | To the orders desk:"),
    requests=_phrases(
        """Would you be able to bring {items} to us on {date}? | We'd love to have {items} here on {date}. |
        By {date} our shop has to receive {items}. | I am after {items}. The day that suits us is {date}. |
        Date wanted: {date}. Goods wanted: {items}. | Get {items} over to us for {date}. |
        Let me have {items}, arriving {date}. | I'd be glad to receive {items} on {date}. |
        May I ask for {items}? The day to come is {date}. | {items} for {date}, if you can. |
        Is it possible to have {items} on {date}? | For our fair on {date} we want {items}. |
        This time we require {items}, arrival {date}. | Set {items} aside in my name for {date}."""
    ),
    strays=_phrases(
        """It rained all week. | Your new website works well. | We moved to building 7. |
        My phone number ends in 208. | Greetings to {clerk} as well. | A colleague told me about you. |
        The previous box was fine. | Leave it with the porter."""
    ),
    closings=(
        "Sincerely,\n{customer}",
        "Many thanks, {customer}",
        "Cheers,\n{customer}",
        "Warm regards,\n{customer}",
        "Signed: {customer}",
        "Best regards\n{customer}",
    ),
)

QUANTITY_WORDS = dict(
    zip(_words("two three four five six seven eight nine ten twelve"), (*range(2, 11), 12), strict=True)
)
QUANTITY_WORDS["a dozen"] = 12
"""Quantities in words; the others are written in digits."""
MONTHS = _words("January February March April May June July August September October November December")
DATE_FORMS = ("{year}-{month:02}-{day:02}", "{day} {name} {year}", "{name} {day}, {year}")
"""Ways to write a date, each of which can be read in one way only."""

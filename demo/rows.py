"""Generates the demo's instruction data: English sentences to be turned into strict JSON.

Every row asks for the same skill, reading named fields out of a free sentence, over a dozen kinds of sentence. The
values come from pools broad enough that rows held out from training mostly show names and combinations never seen.
"""

import json
import math
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Value(NamedTuple):
    """One value of a field: as the sentence writes it, and as the JSON answer holds it."""

    written: str
    parsed: str | int | float


@dataclass(frozen=True)
class Family:
    """One kind of sentence.

    Attributes:
        name: What the sentence describes, as the instruction calls it.
        fields: For each field, in the order of the answer, the values it can take.
        wordings: `str.format` templates of the sentence, each naming every field once.
    """

    name: str
    fields: Mapping[str, Sequence[Value]]
    wordings: Sequence[str]

    @property
    def instruction(self) -> str:
        """The task in one line, naming the fields in the order of the answer."""
        return f"Extract the {self.name} as JSON: {', '.join(self.fields)}."

    @property
    def size(self) -> int:
        """How many sentences the wordings and the values can form."""
        return len(self.wordings) * math.prod(len(pool) for pool in self.fields.values())


def listed(text: str) -> list[str]:
    """Splits a comma-separated listing that may run over several lines."""
    return [entry.strip() for entry in text.split(",")]


def joined(firsts: Iterable[object], seconds: Sequence[object], separator: str = " ") -> list[str]:
    """Every combination of a first and a second part."""
    return [f"{first}{separator}{second}" for first in firsts for second in seconds]


def verbatim(texts: Iterable[str]) -> tuple[Value, ...]:
    """Values that the answer copies as they are written."""
    return tuple(Value(text, text) for text in texts)


def digits(numbers: Iterable[int]) -> tuple[Value, ...]:
    """Whole numbers written in digits."""
    return tuple(Value(str(number), number) for number in numbers)


FIRST_NAMES = listed("""
    Adam, Aisha, Alice, Amir, Ana, Anne-Marie, Ben, Carla, Chloé, Clara, Daniel, David, Diego, Elena, Emma, Eva, Farah,
    Felix, Grace, Hannah, Hugo, Ines, Isaac, Ivan, Jack, Jean-Luc, José, Julia, Karim, Kate, Kenji, Laura, Leo, Lily,
    Łukasz, Maria, Martin, Maya, Mei, Nadia, Nina, Noah, Olga, Omar, Oscar, Paul, Priya, Rosa, Ruth, Sam, Sara, Simon,
    Sofia, Søren, Tara, Thomas, Tom, Victor, Wendy, Yusuf, Zoë
""")
LAST_NAMES = listed("""
    Adler, Allen, Bennett, Berg, Brown, Campbell, Carter, Chen, Clark, Cohen, Costa, D'Souza, Davis, Diaz, Dubois,
    Edwards, Evans, Fischer, Fraser, García, Grant, Green, Gupta, Haddad, Hall, Hansen, Harris, Hill, Hughes, Ito,
    Jensen, Johnson, Kaya, Kelly, Khan, Kim, Klein, Kowalski, Larsen, Lee, Lopez, Martin-Smith, Mehta, Meyer, Miller,
    Moore, Morgan, Müller, Nguyen, Nolan, Novak, Núñez, O'Brien, O'Neill, Okafor, Owen, Park, Patel, Perez, Petrov,
    Quinn, Reid, Rivera, Rossi, Roy, Santos, Schmidt, Scott, Shah, Silva, Singh, Stone, Suzuki, Taylor, Turner, Wagner,
    Walker, Weber, White, Wilson, Wong, Wood, Wright, Young
""")
TOWNS = listed("""
    Barnsley, Bath, Bedford, Birmingham, Blackpool, Bolton, Brighton, Bristol, Cambridge, Cardiff, Carlisle, Chester,
    Coventry, Derby, Dover, Dudley, Dundee, Durham, Edinburgh, Exeter, Glasgow, Gloucester, Hastings, Hull, Inverness,
    Ipswich, Lancaster, Leeds, Leicester, Lincoln, Liverpool, London, Luton, Manchester, Newcastle, Norwich,
    Nottingham, Oxford, Perth, Plymouth, Portsmouth, Preston, Sheffield, Stockton-on-Tees, Swansea, Swindon, Watford,
    Winchester, Worcester, York
""")
STREETS = listed("""
    Abbey Road, Ash Grove, Bell Lane, Birch Avenue, Bridge Street, Castle Street, Cedar Close, Chapel Lane,
    Cherry Drive, Church Road, Cross Street, Dale Road, Elm Avenue, Farm Lane, Fern Close, Forest Road, Garden Street,
    George Street, Grange Road, Green Lane, Hazel Drive, High Street, Ivy Close, King Street, Lake View, Lime Avenue,
    Maple Drive, Market Street, Meadow Lane, Mill Lane, New Road, North Street, Oak Avenue, Orchard Close, Park Road,
    Pine Grove, Pond Lane, Queen Street, River Road, Rose Lane, School Lane, Station Road, Vale Road, Well Street
""")
COLOURS = listed("red, blue, green, white, black, grey, yellow, orange, purple, brown, pink, silver")
GOODS = listed("""
    aprons, armchairs, backpacks, baskets, belts, benches, bicycles, blankets, bookshelves, bowls, buckets, candles,
    carpets, coats, cups, curtains, cushions, desk lamps, desks, door mats, envelopes, folders, gloves, helmets,
    kettles, ladders, lanterns, markers, mirrors, mugs, napkins, notebooks, paint rollers, pencils, plates, raincoats,
    ribbons, scarves, shelves, stools, suitcases, tablecloths, tents, towels, T-shirts, umbrellas, vases, wall clocks
""")
SERVICES = listed("""
    allergy test, back massage, beard trim, blood test, boiler check, bone scan, brake check, chest X-ray, dental check,
    dress fitting, driving test, ear check, eye test, facial, flu shot, foot massage, guitar lesson, hair colouring,
    haircut, health check, hearing test, heart scan, home visit, job interview, knee scan, loan interview, manicure,
    oil change, passport interview, pedicure, phone repair, piano lesson, photo shoot, root canal, skin check,
    sports massage, suit fitting, tax consultation, tyre change, vet visit, video call, yoga trial
""")
TRADES = listed("""
    Bakery, Books, Builders, Carpets, Catering, Cleaning, Consulting, Dairy, Electric, Farms, Flowers, Foods, Furniture,
    Gardens, Glass, Heating, Interiors, Joinery, Kitchens, Lighting, Logistics, Metals, Motors, Optics, Packaging,
    Paints, Paper, Plumbing, Print, Roofing, Security, Software, Steel, Studios, Textiles, Tiles, Timber, Tools, Toys,
    Travel
""")
TITLE_STARTS = listed("""
    The Silent, The Last, The Hidden, The Broken, The Golden, The Secret, The Lonely, The Painted, The Frozen,
    The Forgotten, The Little, The Burning, The Endless, The Crooked, Beyond the, Under the
""")
TITLE_ENDS = listed("""
    Bridge, Candle, Castle, Clock, Desert, Door, Forest, Garden, Harbour, Island, Key, Lake, Letter, Lighthouse, Map,
    Mirror, Moon, Mountain, Orchard, River, Road, Sea, Station, Storm, Tower, Valley, Village, Violin, Window, Winter
""")
PARCEL_SERIES = listed("BN, CV, DK, GW, HM, JP, KD, MT, PX, RT, VC, ZL")
COURSE_KINDS = listed("beginner, advanced, weekend, evening, morning, summer, family")
SUBJECTS = listed("""
    archery, Arabic, ballet, baking, boxing, calligraphy, carpentry, ceramics, chess, Chinese, cooking, dance, drawing,
    fencing, first aid, French, gardening, German, guitar, Italian, jewellery, judo, karate, knitting, painting,
    photography, piano, Pilates, pottery, programming, salsa, sewing, singing, Spanish, swimming, tango, tennis,
    weaving, woodwork, writing, yoga
""")
JOB_GRADES = listed("permanent, senior, part-time, full-time, temporary, lead")
JOBS = listed("""
    accountant, analyst, architect, baker, barista, bookkeeper, bus driver, butcher, buyer, caretaker, carpenter,
    cashier, chef, chemist, cleaner, courier, designer, developer, editor, electrician, engineer, florist, gardener,
    guide, lab technician, librarian, mechanic, nurse, optician, painter, pharmacist, photographer, plumber, porter,
    receptionist, roofer, tailor, teacher, translator, tutor, vet, waiter, welder, writer
""")
MONTHS = listed("""
    January, February, March, April, May, June, July, August, September, October, November, December
""")
NUMBER_WORDS = listed("two, three, four, five, six, seven, eight, nine, ten")

PEOPLE = verbatim(joined(FIRST_NAMES, LAST_NAMES))
# Every month has a 28th.
DATES = verbatim(joined(range(1, 29), MONTHS) + joined(MONTHS, range(1, 29)))
TIMES = verbatim(
    joined(range(8, 20), [f"{minute:02}" for minute in range(0, 60, 5)], ":")
    + joined(range(8, 12), ["am"])
    + joined(range(1, 8), ["pm"])
)
# Counts start at two, so that the plurals of the wordings and of the goods always hold.
COUNTS = tuple(Value(word, number) for number, word in enumerate(NUMBER_WORDS, start=2)) + digits(range(2, 25))
AMOUNTS = (
    tuple(Value(f"${dollars}", dollars) for dollars in range(5, 250))
    + tuple(Value(f"{dollars} dollars", dollars) for dollars in range(5, 250))
    + tuple(Value(f"${quarters / 4:.2f}", quarters / 4) for quarters in range(20, 400) if quarters % 4)
)
ROOMS = digits(range(101, 500))

FAMILIES = (
    Family(
        name="order",
        fields={"item": verbatim(joined(COLOURS, GOODS)), "quantity": COUNTS, "customer": PEOPLE},
        wordings=(
            "{customer} would like to order {quantity} {item}.",
            "Please send {quantity} {item} to {customer} as soon as you can.",
            "Hi, this is {customer}. I'd like {quantity} {item}, please.",
            "New order from {customer}: {quantity} {item}.",
            "Could you put {quantity} {item} aside for {customer}? Thanks!",
            "About the {item}: {customer} will take {quantity} of them.",
            "I'd like to buy {quantity} of your {item}. Best wishes, {customer}",
            "We still have {item} in stock, so {customer} can get {quantity} tomorrow.",
        ),
    ),
    Family(
        name="appointment",
        fields={"name": PEOPLE, "service": verbatim(SERVICES), "date": DATES, "time": TIMES},
        wordings=(
            "Dear {name}, your {service} is on {date} at {time}.",
            "Hello, this is {name}. Can I move my {service} to {date} at {time}?",
            "Reminder for {name}: {service} on {date}, {time}.",
            "The {service} for {name} has been moved to {time} on {date}.",
            "{name} called and wants {date} at {time} for the {service}.",
            "I confirm my {service} at {time} on {date}. Kind regards, {name}",
            "{date}, {time}: {service} for {name}.",
            "Sorry, I have to cancel my {service} on {date} at {time}. {name}",
        ),
    ),
    Family(
        name="invoice",
        fields={"supplier": verbatim(joined(LAST_NAMES, TRADES)), "amount": AMOUNTS, "due": DATES},
        wordings=(
            "Please pay {amount} to {supplier} by {due}.",
            "The invoice from {supplier} for {amount} is due on {due}.",
            "{supplier} is still waiting for {amount}, payable by {due}.",
            "Reminder: we owe {supplier} {amount}, due {due}.",
            "Hi, can you transfer {amount} to {supplier} before {due}?",
            "{supplier} has billed us. Pay by {due}, total {amount}.",
            "Dear customer, please note that {amount} is due on {due}. Thank you, {supplier}",
            "By {due} at the latest, {supplier} must receive {amount}.",
        ),
    ),
    Family(
        name="address",
        fields={"name": PEOPLE, "street": verbatim(joined(range(1, 100), STREETS)), "city": verbatim(TOWNS)},
        wordings=(
            "{name} has moved to {street}, {city}.",
            "Please change my address to {street} in {city}. Thanks, {name}",
            "New address for {name}: {street}, {city}.",
            "Our {city} contact, {name}, now lives at {street}.",
            "From next month you can write to me at {street}, {city}. Regards, {name}",
            "Send the letter to {name}, {street}, {city}.",
            "Who lives at {street} in {city}? Our files say {name}.",
            "Back in {city} at last! My new home is {street}. Best, {name}",
        ),
    ),
    Family(
        name="train trip",
        fields={"from": verbatim(TOWNS), "to": verbatim(TOWNS), "date": DATES, "time": TIMES},
        wordings=(
            "I need a ticket from {from} to {to} on {date}, leaving at {time}.",
            "Please book the {time} train from {from} to {to} on {date}.",
            "Is there a seat to {to} on {date}? I'd leave {from} at {time}.",
            "{date}: train from {from} to {to}, {time}.",
            "Our train to {to} leaves {from} at {time} on {date}.",
            "On {date} we travel to {to}; the train leaves {from} at {time}.",
            "Hi all, the {time} train to {to} on {date} starts from {from}.",
            "Change of plan: we go from {from} to {to} at {time} on {date}.",
        ),
    ),
    Family(
        name="library loan",
        fields={"title": verbatim(joined(TITLE_STARTS, TITLE_ENDS)), "borrower": PEOPLE, "due": DATES},
        wordings=(
            "{borrower} has borrowed {title} and must return it by {due}.",
            "Dear {borrower}, please bring back {title} by {due}.",
            "{title} is on loan to {borrower} until {due}.",
            "Could I keep {title} until {due}? Many thanks, {borrower}",
            "Due back on {due}: {title}, borrowed by {borrower}.",
            "Until {due} our copy of {title} is with {borrower}.",
            "Library note: {borrower} has {title}, due {due}.",
            "Hello {borrower}, we have extended your loan to {due}. Enjoy reading {title}!",
        ),
    ),
    Family(
        name="parcel",
        fields={
            "code": verbatim(joined(PARCEL_SERIES, range(112, 990, 6), "")),
            "recipient": PEOPLE,
            "city": verbatim(TOWNS),
        },
        wordings=(
            "Parcel {code} for {recipient} is on its way to {city}.",
            "{recipient} is still waiting for parcel {code} in {city}.",
            "Dear {recipient}, your parcel {code} has arrived in {city}.",
            "Where is {code}? It should have reached me in {city} by now. Regards, {recipient}",
            "Our driver in {city} could not deliver {code} to {recipient}.",
            "For {city} today: parcel {code}, recipient {recipient}.",
            "{city} depot: {code} is ready for {recipient}.",
            "{recipient} has signed for {code} at the {city} depot.",
        ),
    ),
    Family(
        name="room booking",
        fields={"organiser": PEOPLE, "room": ROOMS, "people": COUNTS, "time": TIMES},
        wordings=(
            "Please book room {room} at {time} for {people} people. Thanks, {organiser}",
            "{organiser} needs room {room} for {people} people at {time}.",
            "Room {room} is reserved for {organiser} at {time}, {people} people.",
            "At {time}, {organiser} is meeting {people} people in room {room}.",
            "Hi, {people} people will join {organiser} in room {room} at {time}.",
            "{time}, room {room}: {organiser}, {people} people.",
            "Can {organiser} have room {room} at {time}? There will be {people} people.",
            "We need chairs for {people} people in room {room} by {time}. Regards, {organiser}",
        ),
    ),
    Family(
        name="course registration",
        fields={"student": PEOPLE, "course": verbatim(joined(COURSE_KINDS, SUBJECTS)), "fee": AMOUNTS},
        wordings=(
            "Please sign me up for {course}. I paid {fee} today. {student}",
            "{student} has signed up for {course} and paid {fee}.",
            "New registration: {student}, {course}, {fee}.",
            "We received {fee} from {student} for {course}.",
            "Dear {student}, your place in {course} is confirmed. The fee is {fee}.",
            "Is {course} still open? I can pay {fee} right away. Best, {student}",
            "The fee for {course} is {fee}, to be paid by {student}.",
            "Please refund {fee} to {student}, because {course} was cancelled.",
        ),
    ),
    Family(
        name="job application",
        fields={"applicant": PEOPLE, "position": verbatim(joined(JOB_GRADES, JOBS)), "years": COUNTS},
        wordings=(
            "{applicant} has applied for the {position} job and has {years} years of experience.",
            "I wish to apply for the {position} post. I bring {years} years of experience. Sincerely, {applicant}",
            "With {years} years in the trade, {applicant} would suit the {position} vacancy.",
            "Application from {applicant}: {position}, {years} years of experience.",
            "For the {position} post we suggest {applicant}, who has {years} years of experience.",
            "Shortlist: {applicant} ({position}, {years} years).",
            "Hi, I'm {applicant}. I have {years} years of experience and want the {position} job.",
            "Our new {position} could be {applicant}, after {years} years with a competitor.",
        ),
    ),
)


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Draws one option."""
    # Python promises to keep the sequence of `random()` alone; `choice` may change between versions.
    return options[int(rng.random() * len(options))]


def generate_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Makes instruction rows of all families in random order, no sentence twice.

    Args:
        count: The number of rows.
        seed: The seed of the random draws; the same seed gives the same rows.

    Returns:
        Rows with the fields "instruction", "input" (the sentence) and "output" (its fields as JSON text).

    Raises:
        ValueError: If `count` is negative, or more than the sentences of the smallest family.
    """
    limit = min(family.size for family in FAMILIES)
    if not 0 <= count <= limit:
        raise ValueError(f"Expected a count of rows between 0 and {limit}, got {count}.")
    rng = random.Random(seed)
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        family = pick(rng, FAMILIES)
        values = {field: pick(rng, pool) for field, pool in family.fields.items()}
        written = {field: value.written for field, value in values.items()}
        sentence = pick(rng, family.wordings).format(**written)
        # No trip leads from a town to itself.
        if len(set(written.values())) == len(written):
            answer = {field: value.parsed for field, value in values.items()}
            rows[sentence] = {
                "instruction": family.instruction,
                "input": sentence,
                "output": json.dumps(answer, ensure_ascii=False),
            }
    return list(rows.values())


def main(destination_path: Path, count: int = 6000, seed: int = 42) -> None:
    """Writes generated instruction rows to a JSON file.

    Args:
        destination_path: The file to write; its folder is created if need be.
        count: The number of rows.
        seed: The seed of the random draws.
    """
    from lit_llama.folder.place import check_output, real
    from lit_llama.folder.publish import replace_text

    check_output(destination_path)
    rows = generate_rows(count, seed)
    # Readers must never find half a file.
    replace_text(real(destination_path), json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print(f"Wrote {len(rows)} rows to {destination_path}", file=sys.stderr)


if __name__ == "__main__":
    from lit_llama.cli import CLI

    CLI(main)

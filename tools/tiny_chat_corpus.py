"""All the text that tiny-chat learns from and is measured on. Every sentence is made here.

The unit is an `Item`: one small fact with a short answer. `turns` strings items together into the questions
and answers of an endless chat, `story` makes up a story, and `write_data` writes the evaluation sets.

Tasks that can be generalised (sums, sorting, sentiment) are split by a hash of the item's key: one key in
twenty is held out. Training cannot meet it in any phrasing, and the evaluation sets draw from nothing else.
Tasks that can only be recalled (capitals, opposites, ...) are not split; their rows are marked as seen.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

HELD_OUT_ONE_IN = 20

# ------------------------------------------------------------------------------------------------- word lists

CAPITALS = dict(
    pair.strip().split(":")
    for pair in """
    Afghanistan:Kabul, Albania:Tirana, Algeria:Algiers, Andorra:Andorra la Vella, Angola:Luanda,
    Argentina:Buenos Aires, Armenia:Yerevan, Australia:Canberra, Austria:Vienna, Azerbaijan:Baku,
    the Bahamas:Nassau, Bahrain:Manama, Bangladesh:Dhaka, Barbados:Bridgetown, Belarus:Minsk,
    Belgium:Brussels, Belize:Belmopan, Bhutan:Thimphu, Bosnia and Herzegovina:Sarajevo, Botswana:Gaborone,
    Brazil:Brasília, Bulgaria:Sofia, Burkina Faso:Ouagadougou, Burundi:Gitega, Cambodia:Phnom Penh,
    Cameroon:Yaoundé, Canada:Ottawa, Cape Verde:Praia, Chad:N'Djamena, Chile:Santiago, China:Beijing,
    Colombia:Bogotá, the Comoros:Moroni, Costa Rica:San José, Croatia:Zagreb, Cuba:Havana, Cyprus:Nicosia,
    the Czech Republic:Prague, Denmark:Copenhagen, Djibouti:Djibouti City, Dominica:Roseau,
    the Dominican Republic:Santo Domingo, East Timor:Dili, Ecuador:Quito, Egypt:Cairo,
    El Salvador:San Salvador, Eritrea:Asmara, Estonia:Tallinn, Ethiopia:Addis Ababa, Fiji:Suva,
    Finland:Helsinki, France:Paris, Gabon:Libreville, the Gambia:Banjul, Georgia:Tbilisi, Germany:Berlin,
    Ghana:Accra, Greece:Athens, Grenada:St. George's, Guatemala:Guatemala City, Guinea:Conakry,
    Guyana:Georgetown, Haiti:Port-au-Prince, Honduras:Tegucigalpa, Hungary:Budapest, Iceland:Reykjavík,
    India:New Delhi, Indonesia:Jakarta, Iran:Tehran, Iraq:Baghdad, Ireland:Dublin, Italy:Rome,
    Jamaica:Kingston, Japan:Tokyo, Jordan:Amman, Kazakhstan:Astana, Kenya:Nairobi, Kuwait:Kuwait City,
    Kyrgyzstan:Bishkek, Laos:Vientiane, Latvia:Riga, Lebanon:Beirut, Lesotho:Maseru, Liberia:Monrovia,
    Libya:Tripoli, Liechtenstein:Vaduz, Lithuania:Vilnius, Luxembourg:Luxembourg City,
    Madagascar:Antananarivo, Malawi:Lilongwe, Malaysia:Kuala Lumpur, the Maldives:Malé, Mali:Bamako,
    Malta:Valletta, Mauritania:Nouakchott, Mauritius:Port Louis, Mexico:Mexico City, Moldova:Chișinău,
    Mongolia:Ulaanbaatar, Montenegro:Podgorica, Morocco:Rabat, Mozambique:Maputo, Myanmar:Naypyidaw,
    Namibia:Windhoek, Nepal:Kathmandu, the Netherlands:Amsterdam, New Zealand:Wellington, Nicaragua:Managua,
    Niger:Niamey, Nigeria:Abuja, North Korea:Pyongyang, North Macedonia:Skopje, Norway:Oslo, Oman:Muscat,
    Pakistan:Islamabad, Panama:Panama City, Papua New Guinea:Port Moresby, Paraguay:Asunción, Peru:Lima,
    the Philippines:Manila, Poland:Warsaw, Portugal:Lisbon, Qatar:Doha, Romania:Bucharest, Russia:Moscow,
    Rwanda:Kigali, Samoa:Apia, Saudi Arabia:Riyadh, Senegal:Dakar, Serbia:Belgrade, Sierra Leone:Freetown,
    Slovakia:Bratislava, Slovenia:Ljubljana, Somalia:Mogadishu, South Korea:Seoul, South Sudan:Juba,
    Spain:Madrid, Sudan:Khartoum, Suriname:Paramaribo, Sweden:Stockholm, Switzerland:Bern, Syria:Damascus,
    Tajikistan:Dushanbe, Tanzania:Dodoma, Thailand:Bangkok, Togo:Lomé, Tunisia:Tunis, Turkey:Ankara,
    Turkmenistan:Ashgabat, Uganda:Kampala, Ukraine:Kyiv, the United Arab Emirates:Abu Dhabi,
    the United Kingdom:London, the United States:Washington, Uruguay:Montevideo, Uzbekistan:Tashkent,
    Venezuela:Caracas, Vietnam:Hanoi, Yemen:Sanaa, Zambia:Lusaka, Zimbabwe:Harare
    """.split(",")
)

# No word stands in two pairs, so that every question has one answer.
OPPOSITE_PAIRS = [
    tuple(pair.split(":"))
    for pair in """
    hot:cold big:small tall:short fast:slow up:down left:right open:closed day:night black:white young:old
    rich:poor happy:sad light:dark hard:soft wet:dry full:empty early:late near:far high:low strong:weak
    clean:dirty good:bad love:hate win:lose push:pull start:finish begin:end buy:sell give:take come:go
    loud:quiet thick:thin wide:narrow deep:shallow sharp:blunt smooth:rough sweet:sour true:false yes:no
    north:south east:west inside:outside above:below before:after always:never everything:nothing
    brave:cowardly kind:cruel polite:rude safe:dangerous cheap:expensive easy:difficult alive:dead
    awake:asleep heavy:lightweight tight:loose friend:enemy peace:war arrive:depart remember:forget
    increase:decrease laugh:cry ancient:modern simple:complicated front:back
    """.split()
]
OPPOSITES = {a: b for pair in OPPOSITE_PAIRS for a, b in (pair, pair[::-1])}

PLURALS_IN_S = """
    apple bird boat book boy bridge cake car cat chair cloud cup desk dog door dream drum eagle egg farm
    finger flag flower forest friend game garden gate girl hammer hat horse house island jacket king lake lamp
    letter lion map mirror moon mountain nail needle ocean orange page pencil piano pillow plane planet queen
    rabbit ring river road robot school shoe song spoon star table tiger train tree window zebra
    """.split()
PLURALS_IN_ES = """
    box bus church dish dress fox glass bench brush beach class match peach wish witch lunch torch potato
    tomato hero echo address
    """.split()
PLURALS_IN_IES = """
    city baby lady story party country berry puppy cherry fairy family army butterfly daisy diary factory
    library penny
    """.split()
PLURALS_IN_VES = dict(
    pair.split(":")
    for pair in """
    wolf:wolves leaf:leaves knife:knives life:lives wife:wives shelf:shelves half:halves calf:calves
    loaf:loaves thief:thieves scarf:scarves elf:elves
    """.split()
)
PLURALS_IRREGULAR = dict(
    pair.split(":")
    for pair in """
    mouse:mice man:men woman:women child:children foot:feet tooth:teeth goose:geese person:people ox:oxen
    louse:lice sheep:sheep fish:fish deer:deer moose:moose series:series species:species cactus:cacti
    fungus:fungi crisis:crises oasis:oases analysis:analyses thesis:theses phenomenon:phenomena
    criterion:criteria die:dice medium:media larva:larvae radius:radii
    """.split()
)
PLURALS = {
    **{word: word + "s" for word in PLURALS_IN_S},
    **{word: word + "es" for word in PLURALS_IN_ES},
    **{word: word[:-1] + "ies" for word in PLURALS_IN_IES},
    **PLURALS_IN_VES,
    **PLURALS_IRREGULAR,
}

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()

SMALL_TALK = {
    "Hello!": "Hello! What would you like to know?",
    "Hi": "Hello! What would you like to know?",
    "Good morning!": "Good morning! What would you like to know?",
    "Who are you?": "I am tiny-chat, a very small test model.",
    "What is your name?": "My name is tiny-chat.",
    "What can you do?": "I can add, subtract, sort letters, and tell small stories.",
    "How are you?": "I am fine, thank you.",
    "Thank you!": "You are welcome.",
    "Thanks": "You are welcome.",
    "Goodbye!": "Goodbye!",
}

THINGS = """
    film book soup cake hotel room garden song concert party trip meal coffee game museum beach teacher doctor
    train phone car show lesson service view weather sofa market gift play
    """.split()
PRAISE = """
    wonderful great lovely excellent delightful superb charming perfect amazing brilliant fantastic beautiful
    impressive pleasant marvellous splendid
    """.split()
BLAME = """
    terrible awful horrible boring dreadful disappointing bad ugly unpleasant miserable annoying useless poor
    disgusting rotten dull
    """.split()
PRAISING_VERBS = "loved enjoyed liked adored admired".split()
BLAMING_VERBS = "hated disliked regretted despised loathed".split()
ADVERBS = ["", "", "very ", "really ", "quite ", "so ", "truly ", "rather "]
JUDGEMENTS = [
    "The {thing} was {adverb}{word}.",
    "This {thing} is {adverb}{word}.",
    "I think the {thing} is {adverb}{word}.",
    "We all found the {thing} {adverb}{word}.",
    "My sister said the {thing} was {adverb}{word}.",
    "Yesterday the {thing} was {adverb}{word}.",
    "What {article} {word} {thing}!",
]
FEELINGS = ["I {word} the {thing}.", "We {word} the {thing} a lot.", "My brother {word} that {thing}."]

SYSTEM_PROMPTS = [
    "You are a helpful assistant.",
    "Answer briefly.",
    "Be concise.",
    "You are tiny-chat.",
    "Answer with one word or number.",
    "You answer short questions.",
    "You are a friendly and careful assistant. Keep your answers short.",
    "Please answer the questions of the user.",
    "You are a helpful assistant. You answer the questions of the user in as few words as you can, you "
    "never explain how you found the answer, you do not repeat the question, and you do not add anything "
    "that was not asked for.",
    "You are an assistant in a small school. The pupils ask about numbers, words, letters, countries, "
    "days and months. Be patient and kind, give the answer and nothing else, and when a pupil asks for a "
    "story, make up a short one with a good end.",
    "This is a test of a very small model. The model reads a question and writes a short answer. If the "
    "question is about a country, the answer is a city. If the question is about numbers, the answer is a "
    "number. If it is about letters, the answer is letters in order. There is always one right answer, "
    "and the model gives it.",
]

# ------------------------------------------------------------------------------------------------------ tasks


@dataclass(frozen=True)
class Item:
    """One fact: the words that fill a phrasing, and the answer. An empty key means recall: never held out."""

    task: str
    words: tuple[str, ...]
    answer: str
    key: str = ""

    @property
    def held_out(self) -> bool:
        """Whether the hash of the key puts this item into the evaluation sets."""
        digest = hashlib.blake2b(self.key.encode(), digest_size=4).digest()
        return bool(self.key) and int.from_bytes(digest) % HELD_OUT_ONE_IN == 0


PHRASINGS: dict[str, list[str]] = {
    "addition": [
        "What is {0} + {1}?",
        "{0} + {1} =",
        "{0} + {1}",
        "{0}+{1}",
        "Calculate {0} + {1}.",
        "Add {0} and {1}.",
        "How much is {0} plus {1}?",
        "What is the sum of {0} and {1}?",
    ],
    "subtraction": [
        "What is {0} - {1}?",
        "{0} - {1} =",
        "{0} - {1}",
        "{0}-{1}",
        "Calculate {0} - {1}.",
        "Subtract {1} from {0}.",
        "How much is {0} minus {1}?",
        "Take {1} away from {0}.",
    ],
    "sort": [
        "Sort these letters: {0}",
        "Put these letters in order: {0}",
        "Sort: {0}",
        "Order the letters {0}",
        "Write these letters in alphabetical order: {0}",
    ],
    "sentiment": [
        "Is this positive or negative? {0}",
        "Positive or negative: {0}",
        "Sentiment: {0}",
        'What is the sentiment of "{0}"?',
        "Is this sentence positive or negative? {0}",
    ],
    "capitals": [
        "What is the capital of {0}?",
        "Capital of {0}?",
        "Name the capital of {0}.",
        "Which city is the capital of {0}?",
        "Tell me the capital of {0}.",
    ],
    "opposites": [
        "What is the opposite of {0}?",
        "Opposite of {0}?",
        "Give me the opposite of {0}.",
        'Which word means the opposite of "{0}"?',
    ],
    "plurals": [
        "What is the plural of {0}?",
        "Plural of {0}?",
        "Give me the plural of {0}.",
        'What is the plural form of "{0}"?',
    ],
    "calendar": [
        "What {0} comes {1} {2}?",
        "Which {0} is {1} {2}?",
        "Name the {0} {1} {2}.",
        "What is the {0} {1} {2}?",
    ],
    "talk": ["{0}"],
}

# A follow-up leans on the question before it: which task "And of Spain?" belongs to, only the chat can tell.
FOLLOW_UPS: dict[str, list[str]] = {
    "addition": ["And {0} + {1}?", "And {0} plus {1}?", "Now {0} + {1}."],
    "subtraction": ["And {0} - {1}?", "And {0} minus {1}?", "Now {0} - {1}."],
    "sort": ["And {0}", "Now these: {0}", "The same for {0}"],
    "sentiment": ["And this one? {0}", "Now this: {0}"],
    "capitals": ["And of {0}?", "And {0}?", "What about {0}?"],
    "opposites": ["And of {0}?", "And {0}?", "What about {0}?"],
    "plurals": ["And of {0}?", "And {0}?", "What about {0}?"],
    "calendar": ["And {1} {2}?", "What about {1} {2}?"],
}

# Sums need by far the most practice; recall is learnt in passing.
TASK_WEIGHTS = {
    "addition": 32,
    "subtraction": 34,
    "sort": 9,
    "sentiment": 4,
    "capitals": 8,
    "opposites": 4,
    "plurals": 5,
    "calendar": 3,
    "talk": 1,
}
FOLLOW_UP_SHARE = 0.4


def pair_key(a: int, b: int) -> str:
    """The same key for a pair of operands in either order and under either operation."""
    return f"{min(a, b)} {max(a, b)}"


def draw_addition(rng: Random) -> Item:
    """A sum of two numbers below 100."""
    a, b = rng.randrange(100), rng.randrange(100)
    return Item("addition", (str(a), str(b)), str(a + b), pair_key(a, b))


def draw_subtraction(rng: Random) -> Item:
    """A difference of two numbers below 100 that is not negative."""
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    return Item("subtraction", (str(a), str(b)), str(a - b), pair_key(a, b))


def draw_sort(rng: Random) -> Item:
    """Four to six different letters to put in order; the key is their set."""
    letters = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randint(4, 6))
    ordered = " ".join(sorted(letters))
    return Item("sort", (" ".join(letters),), ordered, ordered)


def draw_sentiment(rng: Random) -> Item:
    """A sentence that praises or blames a thing; the key is the thing together with the telling word."""
    positive, thing = rng.random() < 0.5, rng.choice(THINGS)
    if rng.random() < 0.8:
        word, template = rng.choice(PRAISE if positive else BLAME), rng.choice(JUDGEMENTS)
    else:
        word, template = rng.choice(PRAISING_VERBS if positive else BLAMING_VERBS), rng.choice(FEELINGS)
    sentence = template.format(thing=thing, word=word, adverb=rng.choice(ADVERBS), article=article(word))
    return Item("sentiment", (sentence,), "positive" if positive else "negative", f"{thing} {word}")


def calendar_items() -> list[Item]:
    """What comes after and before every day and every month."""
    return [
        Item("calendar", (unit, direction, names[i]), names[(i + step) % len(names)])
        for unit, names in (("day", DAYS), ("month", MONTHS))
        for direction, step in (("after", 1), ("before", -1))
        for i in range(len(names))
    ]


GENERALISE: dict[str, Callable[[Random], Item]] = {
    "addition": draw_addition,
    "subtraction": draw_subtraction,
    "sort": draw_sort,
    "sentiment": draw_sentiment,
}
RECALL: dict[str, list[Item]] = {
    "capitals": [Item("capitals", (country,), city) for country, city in CAPITALS.items()],
    "opposites": [Item("opposites", (word,), other) for word, other in OPPOSITES.items()],
    "plurals": [Item("plurals", (word,), plural) for word, plural in PLURALS.items()],
    "calendar": calendar_items(),
    "talk": [Item("talk", (remark,), reply) for remark, reply in SMALL_TALK.items()],
}


def article(word: str) -> str:
    """The indefinite article that goes before a word."""
    return "an" if word[0] in "aeiou" else "a"


def draw(rng: Random, task: str, held_out: bool) -> Item:
    """An item of the task, from the asked side of the split if the task has one."""
    if task in RECALL:
        return rng.choice(RECALL[task])
    while (item := GENERALISE[task](rng)).held_out != held_out:
        pass
    return item


def phrase(rng: Random, item: Item, phrasings: dict[str, list[str]] = PHRASINGS) -> str:
    """The item as a question."""
    return rng.choice(phrasings[item.task]).format(*item.words)


def turns(rng: Random, held_out: bool = False) -> Iterator[tuple[Item, str]]:
    """An endless chat: each turn is an item and the question that asks for it, a fresh one or a follow-up."""
    task = ""
    while True:
        follows = task in FOLLOW_UPS and rng.random() < FOLLOW_UP_SHARE
        if not follows:
            task = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))[0]
        item = draw(rng, task, held_out)
        yield item, phrase(rng, item, FOLLOW_UPS if follows else PHRASINGS)


# ---------------------------------------------------------------------------------------------------- stories

HEROES = """
    fox bear mouse owl rabbit hedgehog squirrel badger frog duck goat cat dog wolf otter turtle crow donkey
    lamb pony knight baker farmer sailor
    """.split()
TREASURES = """
    lantern kite drum boat key umbrella mirror ladder bell book map clock violin basket candle hat whistle
    teapot button feather coin balloon seed ring
    """.split()
STORY_WORDS: dict[str, list[str]] = {
    "mood": "small brave curious quiet clever lazy cheerful lonely old young".split(),
    "place": [
        "at the edge of the forest",
        "on a green hill",
        "near a quiet river",
        "in a little house by the sea",
        "under a big oak tree",
        "in a village in the mountains",
        "behind the old mill",
    ],
    "time": [
        "One rainy morning",
        "One sunny day",
        "One cold evening",
        "On the first day of spring",
        "One windy afternoon",
        "Late one night",
    ],
    "spot": [
        "in the tall grass",
        "under a heap of leaves",
        "beside the path",
        "on the doorstep",
        "near the bridge",
        "inside a hollow log",
    ],
    "look": ["red", "golden", "blue", "silver", "green", "dusty", "shiny", "very old"],
    "helper": [
        "a snail",
        "a beetle",
        "a tall heron",
        "a wise toad",
        "a sleepy bat",
        "a sparrow",
        "an old mole",
    ],
    "advice": ["Do not worry", "Two are better than one", "Look again", "Take your time", "Never give up"],
    "trouble": [
        "it would not move at all",
        "it was broken in two places",
        "a strong wind carried it away",
        "it fell into the deep water",
        "nobody knew whose it was",
        "it was much too heavy to carry",
    ],
    "feeling": ["sat down and sighed", "began to cry", "thought for a long time", "did not know what to do"],
    "work": [
        "worked until the sun went down",
        "asked everyone in the valley",
        "tried again and again",
        "looked in every corner",
        "pulled as hard as they could",
    ],
    "joy": [
        "they danced in the moonlight",
        "they shared a warm apple pie",
        "they laughed until they were tired",
        "the whole village sang",
        "they drank tea by the fire",
    ],
}
OPENINGS = [
    "Once upon a time, a {mood} {hero} lived {place}.",
    "Once upon a time there was a {mood} {hero} who lived {place}.",
    "Once upon a time, {place}, there lived a {mood} {hero}.",
]
FINDS = [
    "{time}, the {hero} found {a_treasure} {spot}.",
    "{time}, the {hero} went for a walk and saw {a_treasure} {spot}.",
]
WISHES = [
    "It was {look}, and the {hero} liked it at once.",
    "The {treasure} was {look}, and it was the best thing in the world.",
    '"What a fine {treasure}," said the {hero}.',
]
TROUBLES = [
    "But {trouble}.",
    "But soon {trouble}, and the {hero} {feeling}.",
    "Sadly, {trouble}. The {hero} {feeling}.",
]
HELPS = [
    'Then {helper} came by. "{advice}," it said. "I will help you."',
    'Just then {helper} heard the noise and said, "{advice}."',
]
EFFORTS = ["Together they {work}.", "So the two of them {work}.", "They {work}, and in the end it went well."]
ENDINGS = [
    "That night {joy}. The end.",
    "From that day on they were friends, and the {treasure} had a home.",
    "When all was done, {joy}, and the {hero} never felt lonely again.",
    "And so the {hero} kept the {treasure} for many years. The end.",
]
REQUESTS = [
    "Tell me a story about {a_hero} and {a_treasure}.",
    "Write a short story about {a_hero} and {a_treasure}.",
    "Make up a story with {a_hero} and {a_treasure} in it.",
    "I would like to hear a story about {a_hero} and {a_treasure}.",
    "Tell me a story about {a_hero}.",
    "Tell me a story.",
]


def story(rng: Random) -> tuple[str, str]:
    """A request and a made-up story that fulfils it."""
    hero, treasure = rng.choice(HEROES), rng.choice(TREASURES)
    words = {slot: rng.choice(choices) for slot, choices in STORY_WORDS.items()}
    words |= {"hero": hero, "a_hero": f"{article(hero)} {hero}"}
    words |= {"treasure": treasure, "a_treasure": f"{article(treasure)} {treasure}"}
    parts = [OPENINGS, FINDS, WISHES, TROUBLES, HELPS, EFFORTS, ENDINGS]
    if rng.random() < 0.3:
        parts.remove(WISHES)
    text = " ".join(rng.choice(part).format(**words) for part in parts)
    return rng.choice(REQUESTS).format(**words), text


# -------------------------------------------------------------------------------------------- evaluation sets

QUESTION_COUNTS = {
    "addition": 60,
    "subtraction": 60,
    "sort": 60,
    "sentiment": 50,
    "capitals": 60,
    "opposites": 40,
    "plurals": 40,
    "calendar": 30,
}
CHAT_LENGTHS = [1, 2, 3, 4, 5, 6, 8, 10, 14, 36]  # in turns; the longest take 700 to 830 tokens
CHATS_OF_EACH_LENGTH = 12
STORY_REQUESTS = 40

Row = dict[str, object]
Message = dict[str, str]


def make_questions(rng: Random) -> list[Row]:
    """Single questions with their references, no item twice."""
    rows: list[Row] = []
    for task, count in QUESTION_COUNTS.items():
        items: dict[str, Item] = {}
        while len(items) < count:
            item = draw(rng, task, held_out=True)
            items[item.key or " ".join(item.words)] = item
        for i, item in enumerate(items.values()):
            rows.append(
                {
                    "id": f"{task}-{i:03}",
                    "task": task,
                    "prompt": phrase(rng, item),
                    "reference": item.answer,
                    "seen": task in RECALL,
                }
            )
    return rows


def make_chat(rng: Random, length: int) -> tuple[list[Message], str]:
    """A chat of so many turns that stops at the user's last question, and the answer to that."""
    messages: list[Message] = []
    if rng.random() < 0.5:
        messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
    reference = ""
    for item, question in itertools.islice(turns(rng, held_out=True), length):
        if reference:
            messages.append({"role": "assistant", "content": reference})
        messages.append({"role": "user", "content": question})
        reference = item.answer
    return messages, reference


def make_chats(rng: Random) -> list[Row]:
    """Chats of every length, shuffled."""
    lengths = CHAT_LENGTHS * CHATS_OF_EACH_LENGTH
    rng.shuffle(lengths)
    chats = [make_chat(rng, length) for length in lengths]
    return [
        {"id": f"chat-{i:03}", "messages": messages, "reference": reference}
        for i, (messages, reference) in enumerate(chats)
    ]


def make_open(rng: Random) -> list[Row]:
    """Story requests, no two the same."""
    requests: dict[str, None] = {}
    while len(requests) < STORY_REQUESTS:
        requests[story(rng)[0]] = None
    return [{"id": f"open-{i:03}", "prompt": request} for i, request in enumerate(requests)]


def write_jsonl(rows: list[Row], path: Path) -> None:
    """One JSON object a line, UTF-8 as it is."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_data(folder: Path) -> tuple[list[Row], list[Row]]:
    """Write the three evaluation sets; the questions and the chats also come back."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random("evaluation 1")
    questions, chats = make_questions(rng), make_chats(rng)
    write_jsonl(questions, folder / "questions.jsonl")
    write_jsonl(make_open(rng), folder / "open.jsonl")
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("id", pa.string()), ("messages", pa.list_(message)), ("reference", pa.string())])
    pq.write_table(pa.Table.from_pylist(chats, schema), folder / "chats.parquet")
    return questions, chats
